"""Cutting a batch by tokens: how even and how fast, beside a first-fit cut of the same lengths, in turns.

    python benchmarks/balance.py --json

8,192 lengths, lognormal with sigma 1, from a fixed seed, into 8 to 1,024 groups.

`max_over_ideal`   the heaviest group over the best that can be hoped for: the mean, or the longest sequence
`ms`               median of the rounds
`first_fit`        each sequence, as it comes, to the first group that has room under the ideal, else to the lightest
`plan`             `plan_microbatches`: 65,536 such sequences, 64 ranks, at most 16,384 tokens a microbatch
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from trainmaster.api.balance import balance, plan_microbatches

NUM_LENGTHS, MEDIAN_LENGTH, SEED = 8192, 512, 0
NUM_GROUPS = (8, 64, 128, 512, 1024)
PLAN_LENGTHS, PLAN_RANKS, PLAN_TOKENS = 65_536, 64, 16_384
BARS = {"max_over_ideal_128": 1.005, "ms_1024": 50.0}
Cut = Callable[[Sequence[int], int], list[list[int]]]


def draw(count: int) -> list[int]:
    drawn = np.random.default_rng(SEED).lognormal(np.log(MEDIAN_LENGTH), 1.0, count)
    return [int(length) for length in np.ceil(drawn)]


def ideal(lengths: Sequence[int], num_groups: int) -> float:
    return max(sum(lengths) / num_groups, max(lengths))


def first_fit(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    room = ideal(lengths, num_groups)
    loads, groups = [0] * num_groups, [[] for _ in range(num_groups)]
    for at, length in enumerate(lengths):
        group = next((group for group, load in enumerate(loads) if load + length <= room), loads.index(min(loads)))
        groups[group].append(at)
        loads[group] += length
    return groups


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and the result."""
    start_s = time.perf_counter()
    result = action()
    return 1e3 * (time.perf_counter() - start_s), result


def compare(rounds: int) -> dict[str, Any]:
    lengths = draw(NUM_LENGTHS)
    sides: dict[str, Cut] = {"ours": balance, "first_fit": first_fit}
    figures: dict[str, dict[str, dict[str, float]]] = {side: {} for side in sides}
    for num_groups in NUM_GROUPS:
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, cut in sides.items():
                milliseconds, groups = timed(lambda cut=cut, num_groups=num_groups: cut(lengths, num_groups))
                taken[side].append(milliseconds)
                heaviest = max(sum(lengths[at] for at in group) for group in groups)
                figures[side][str(num_groups)] = {"max_over_ideal": heaviest / ideal(lengths, num_groups)}
        for side, milliseconds in taken.items():
            figures[side][str(num_groups)]["ms"] = statistics.median(milliseconds)
    return {
        "max_over_ideal_128": figures["ours"]["128"]["max_over_ideal"],
        "ms_1024": figures["ours"]["1024"]["ms"],
        "groups": figures["ours"],
        "first_fit": figures["first_fit"],
    }


def plan(rounds: int) -> dict[str, float]:
    lengths = [min(length, PLAN_TOKENS) for length in draw(PLAN_LENGTHS)]
    names = [f"bench/0/{at}/0" for at in range(PLAN_LENGTHS)]
    taken = []
    for _ in range(rounds):
        milliseconds, ranks = timed(lambda: plan_microbatches(lengths, PLAN_RANKS, PLAN_TOKENS, 1, names))
        taken.append(milliseconds)
    totals = [sum(lengths[at] for microbatch in rank for at in microbatch) for rank in ranks]
    return {
        "ms": statistics.median(taken),
        "microbatches_per_rank": max(map(len, ranks)),
        "fewest_per_rank": -(-sum(lengths) // (PLAN_RANKS * PLAN_TOKENS)),
        "max_over_mean_rank": max(totals) / statistics.fmean(totals),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {**compare(options.rounds), "plan": plan(options.rounds), "rounds": options.rounds, "machine": machine}
    if options.json:
        print(json.dumps(result))
        return
    for name, bar in BARS.items():
        print(f"{name:24} {result[name]:.4f} (bar {bar})")
    for side in ("groups", "first_fit"):
        for num_groups, each in result[side].items():
            print(f"{side:10} {num_groups:>5}  max_over_ideal {each['max_over_ideal']:.5f}  ms {each['ms']:.2f}")
    print("plan      ", "  ".join(f"{name} {value:,.4g}" for name, value in result["plan"].items()))


if __name__ == "__main__":
    main()
