"""Redistribution: what a plan costs and how good it is; and, where torch is, how fast workers carry one out.

    python benchmarks/redistribution.py --json

Hosts of 8 workers; groups of 16 on two hosts each need all seven keys of their samples, which are dealt to groups at
random. Each key of each sample is held by one to three workers, two on average, anywhere. From fixed seeds.

`plan_ms`                           256 workers, 4,096 samples: from needs to messages, just after the holders changed
`bytes_received_over_lower_bound`   the bound: what each worker needs and does not hold
`inter_host_over_lower_bound`       the bound: what each host needs and nobody there holds, once
`max_sent_over_mean`                of bytes, the worker that sends most
`largest_payload_bytes`             the largest request that carries a worker's part, encoded
`plan_s_4096`                       4,096 workers, 65,536 samples
`stages`                            the same figures if the first host of each group needs `tokens` only

Figures are the worst over the seeds, times the median; `plan_cpu_ms` is the processor time of the same plans. What
was planned is counted from the messages, and the bounds from what was drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.system.redistribution import plan_redistribution
from trainmaster.system.rpc.codec import encode_body
from trainmaster.system.rpc.messages import Lane, Request
from trainmaster.system.rpc.parcels import Parcels, Redistribute
from trainmaster.system.storage import Storage

HOST_SIZE, GROUP_SIZE, MAX_HOLDERS = 8, 16, 3
SIZES = {"small": (256, 4096), "large": (4096, 65_536)}
"""Workers and samples."""
MEDIAN_LENGTH = 512
DTYPES = {
    "tokens": "int64",
    "loss_mask": "bool",
    "log_probabilities": "float32",
    "reference_log_probabilities": "float32",
    "values": "float32",
    "advantage": "float32",
    "reward": "float32",
}
ONE_VALUE = ("advantage", "reward")
WIDTHS = {"int64": 8, "float32": 4, "bool": 1}
BARS = {
    "plan_ms": 100.0,
    "bytes_received_over_lower_bound": 1.0,
    "inter_host_over_lower_bound": 1.05,
    "max_sent_over_mean": 1.2,
    "largest_payload_bytes": 65_536,
    "plan_s_4096": 3.0,
}
Ranks = npt.NDArray[np.int64]


# -- what is drawn ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    num_workers: int
    samples: Samples
    holders: dict[str, Ranks]
    """By key, `[sample, MAX_HOLDERS]`; -1 where there are fewer."""
    groups: tuple[npt.NDArray[np.int64], ...]
    """Positions of each group's samples."""
    has_stages: bool

    def keys(self, rank: int) -> tuple[str, ...]:
        is_first_stage = self.has_stages and rank % GROUP_SIZE < HOST_SIZE
        return ("tokens",) if is_first_stage else tuple(DTYPES)

    def storage(self) -> Storage:
        storage = Storage()
        for key, holders in self.holders.items():
            positions = np.repeat(np.arange(len(holders)), MAX_HOLDERS)
            order = np.argsort(holders.ravel(), kind="stable")
            starts = np.searchsorted(holders.ravel()[order], np.arange(self.num_workers + 1))
            for rank in range(self.num_workers):
                chosen = positions[order[starts[rank] : starts[rank + 1]]]
                ids = tuple(self.samples.ids[at] for at in chosen.tolist())
                storage.add(rank, Samples(ids=ids, keys={key: self.samples.keys[key].select(chosen)}))
        return storage

    def needs(self) -> dict[int, tuple[Samples, tuple[str, ...]]]:
        shares = [self.samples.select(group) for group in self.groups]
        return {rank: (shares[rank // GROUP_SIZE], self.keys(rank)) for rank in range(self.num_workers)}

    def hosts(self) -> list[str]:
        return [f"host{rank // HOST_SIZE}" for rank in range(self.num_workers)]

    def bounds(self) -> tuple[int, int]:
        """Bytes that workers have to receive, and hosts."""
        received = entered = 0
        for group, positions in enumerate(self.groups):
            for first in range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE, HOST_SIZE):
                for key in self.keys(first):
                    column, held = self.samples.keys[key], self.holders[key][positions]
                    sizes = column.sizes[positions] * WIDTHS[column.dtype]
                    num_here = ((held >= first) & (held < first + HOST_SIZE)).sum(axis=1)
                    received += int((sizes * (HOST_SIZE - num_here)).sum())
                    entered += int(sizes[num_here == 0].sum())
        return received, entered


def draw(num_workers: int, num_samples: int, seed: int, has_stages: bool = False) -> Situation:
    random = np.random.default_rng(seed)
    lengths = np.ceil(random.lognormal(np.log(MEDIAN_LENGTH), 0.5, num_samples)).astype(np.int32)
    columns = {
        key: KeyColumn(dtype=dtype, lengths=np.ones_like(lengths) if key in ONE_VALUE else lengths)
        for key, dtype in DTYPES.items()
    }
    holders = {}
    for key in DTYPES:
        ranks = random.integers(0, num_workers, (num_samples, MAX_HOLDERS))
        while len(again := np.flatnonzero((np.diff(np.sort(ranks, axis=1), axis=1) == 0).any(axis=1))):
            ranks[again] = random.integers(0, num_workers, (len(again), MAX_HOLDERS))
        counts = random.integers(1, MAX_HOLDERS + 1, num_samples)
        holders[key] = np.where(np.arange(MAX_HOLDERS) < counts[:, None], ranks, -1)
    num_groups = num_workers // GROUP_SIZE
    dealt = random.permutation(num_samples)
    return Situation(
        num_workers=num_workers,
        samples=Samples(ids=tuple(f"gsm8k/0/{at // 8}/{at % 8}" for at in range(num_samples)), keys=columns),
        holders=holders,
        groups=tuple(np.sort(dealt[group::num_groups]) for group in range(num_groups)),
        has_stages=has_stages,
    )


# -- what was planned -------------------------------------------------------------------------------------------------


def bytes_of(part: Redistribute, parcels: Parcels) -> npt.NDArray[np.int64]:
    """Of each parcel."""
    widths = np.array([WIDTHS[key.dtype] for key in part.keys])
    tables = parcels.tables
    sizes = tables.lengths.astype(np.int64) * widths[tables.cells // len(part.ids)]
    return np.diff(np.concatenate([[0], np.cumsum(sizes)])[np.concatenate([[0], np.cumsum(tables.num_cells)])])


def payload_bytes(part: Redistribute) -> int:
    request = Request(
        run="bench",
        epoch=1,
        id=1,
        lane=Lane.TRANSFER,
        deadline_s=60.0,
        submitted_s=0.0,
        command=part,
    )
    return sum(map(len, encode_body(request)))


def judge(situation: Situation, plan: dict[int, Redistribute]) -> dict[str, float]:
    received = entered = 0
    sent = np.zeros(situation.num_workers)
    for rank, part in plan.items():
        arriving = bytes_of(part, part.incoming)
        received += int(arriving.sum())
        entered += int(arriving[part.incoming.tables.peers // HOST_SIZE != rank // HOST_SIZE].sum())
        sent[rank] = bytes_of(part, part.outgoing) @ part.outgoing.tables.num_peers
    must_receive, must_enter = situation.bounds()
    return {
        "bytes_received_over_lower_bound": received / must_receive,
        "inter_host_over_lower_bound": entered / must_enter,
        "max_sent_over_mean": float(sent.max() / sent.mean()),
        "largest_payload_bytes": max(payload_bytes(part) for part in plan.values()),
        "parcels_per_worker": statistics.mean(
            len(part.outgoing.tables.kinds) + len(part.incoming.tables.kinds) for part in plan.values()
        ),
    }


def planned(situation: Situation) -> dict[str, float]:
    needs, storage, hosts = situation.needs(), situation.storage(), situation.hosts()
    start_s, cpu_s = time.perf_counter(), time.process_time()
    plan = plan_redistribution(needs, storage, 1, hosts)
    times = {"plan_ms": 1e3 * (time.perf_counter() - start_s), "plan_cpu_ms": 1e3 * (time.process_time() - cpu_s)}
    return times | judge(situation, plan)


def over_seeds(size: tuple[int, int], num_seeds: int, has_stages: bool = False) -> dict[str, float]:
    found = [planned(draw(*size, seed, has_stages)) for seed in range(num_seeds)]
    return {
        name: (statistics.median if name.endswith("_ms") else max)(each[name] for each in found) for name in found[0]
    }


def measure(num_seeds: int) -> dict[str, Any]:
    planned(draw(2 * GROUP_SIZE, 64, 0))  # warm
    small = over_seeds(SIZES["small"], num_seeds)
    stages = over_seeds(SIZES["small"], num_seeds, has_stages=True)
    large = over_seeds(SIZES["large"], 1)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {**small, "plan_s_4096": large["plan_ms"] / 1e3, "large": large, "stages": stages}
    if (
        importlib.util.find_spec("redistribution_transfer") is not None
        and importlib.util.find_spec("torch") is not None
    ):
        from redistribution_transfer import transfer

        result["transfer"] = transfer()
    return {**result, "seeds": num_seeds, "machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    result = measure(options.seeds)
    if options.json:
        print(json.dumps(result))
        return
    for name, bar in BARS.items():
        print(f"{name:34} {result[name]:,.3f} (bar {bar:,})")
    for name in ("large", "stages", "transfer"):
        if name in result:
            print(f"{name:10}", "  ".join(f"{figure} {value:,.3f}" for figure, value in result[name].items()))


if __name__ == "__main__":
    main()
