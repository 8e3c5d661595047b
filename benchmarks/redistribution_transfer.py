"""A redistribution among four workers, beside a plain exchange over gloo of one tensor a pair.

    python benchmarks/redistribution_transfer.py        (`redistribution.py --json` has it too)

Each worker sends each other 64 MiB: hundreds of samples of five keys, as GRPO has them, out of its store and into the
other's. Each worker is a process with one thread; sides take turns, and a round takes as long as its slowest worker.

`ours`    `redistribute`: values are packed, sent, received into new memory, and put into the store sample by sample
`plain`   one tensor of as many bytes to each other worker, received into new tensors: whoever keeps what arrives has to
`kept`    the same, received into tensors that were there before: what the wire alone would give
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.queues import Queue

import numpy as np
import torch
from torch import Tensor
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.system.rpc.parcels import Parcel, Redistribute
from trainmaster.workers.data.store import Store
from trainmaster.workers.data.transfer import redistribute
from trainmaster.workers.parallel.groups import Group, form_group, host_store, join_store

NUM_WORKERS, NUM_ROUNDS, PAIR_BYTES = 4, 9, 64 * 2**20
KEYS = {
    "tokens": torch.int64,
    "loss_mask": torch.bool,
    "log_probabilities": torch.float32,
    "values": torch.bfloat16,
    "versions": torch.int32,
}
TOKEN_BYTES = sum(dtype.itemsize for dtype in KEYS.values())
LONGEST = 8192
NUM_SAMPLES = 2 * PAIR_BYTES // TOKEN_BYTES // LONGEST
SIDES = ("ours", "plain", "kept")
CPU, DEADLINE, ADDRESS = torch.device("cpu"), timedelta(seconds=120), "127.0.0.1"


def transfer() -> dict[str, float]:
    """Gigabytes a second that arrive at all workers together; `ratio` of ours to the plain exchange, by round."""
    context = get_context("spawn")
    meeting, port = host_store(ADDRESS)  # lives until all are done
    results: Queue[list[dict[str, float]]] = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, port, results)) for rank in range(NUM_WORKERS)]
    for worker in workers:
        worker.start()
    by_worker = [results.get(timeout=DEADLINE.total_seconds()) for _ in workers]
    for worker in workers:
        worker.join()
    del meeting
    num_bytes = sum(_num_bytes(source, target) for source in range(NUM_WORKERS) for target in _others(source))
    rounds = [
        {side: num_bytes / max(seconds[side] for seconds in round_) / 1e9 for side in SIDES}
        for round_ in zip(*by_worker, strict=True)
    ]
    return {
        "transfer_gb_per_s": statistics.median(rates["ours"] for rates in rounds),
        "plain_gb_per_s": statistics.median(rates["plain"] for rates in rounds),
        "kept_gb_per_s": statistics.median(rates["kept"] for rates in rounds),
        "ratio": statistics.median(rates["ours"] / rates["plain"] for rates in rounds),
        "ratio_kept": statistics.median(rates["ours"] / rates["kept"] for rates in rounds),
    }


def _worker(rank: int, port: int, results: Queue[list[dict[str, float]]]) -> None:
    torch.set_num_threads(1)
    meeting = join_store(ADDRESS, port, DEADLINE)
    group = form_group(meeting, "transfer", list(range(NUM_WORKERS)), rank, CPU, ADDRESS, DEADLINE)
    store, others = Store(), _others(rank)
    for other in others:
        _fill(store, _samples(rank, other))
    incoming = {other: _samples(other, rank) for other in others}
    sizes = {other: _num_bytes(other, rank) for other in others}
    plan = Redistribute.of(
        tag=1,
        sends=tuple(Parcel(peers=(other,), blocks=(_samples(rank, other),)) for other in others),
        receives=tuple(Parcel(peers=(other,), blocks=(incoming[other],)) for other in others),
    )
    outgoing = {other: torch.ones(_num_bytes(rank, other), dtype=torch.uint8) for other in others}
    kept = {other: torch.ones(sizes[other], dtype=torch.uint8) for other in others}

    def plain(into: Callable[[int], Tensor]) -> None:
        receivings = [group.expect(into(other), other, 2) for other in others]
        sendings = [group.send(outgoing[other], other, 2) for other in others]
        for each in receivings + sendings:
            each.wait()

    actions: dict[str, Callable[[], None]] = {
        "ours": lambda: redistribute(plan, store, group),
        "plain": lambda: plain(lambda other: torch.empty(sizes[other], dtype=torch.uint8)),
        "kept": lambda: plain(lambda other: kept[other]),
    }
    rounds = []
    for at in range(NUM_ROUNDS + 1):
        turns = SIDES[at % len(SIDES) :] + SIDES[: at % len(SIDES)]
        seconds = {side: _seconds(actions[side], group) for side in turns}
        for samples in incoming.values():
            store.release(samples.ids)
        rounds.append(seconds)
    results.put(rounds[1:])  # in the first, things warm up


def _seconds(action: Callable[[], None], group: Group) -> float:
    """From when all are there."""
    group.all_reduce(torch.zeros(1))
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def _others(rank: int) -> list[int]:
    """In an order in which not all send to the same one first."""
    return [(rank + step) % NUM_WORKERS for step in range(1, NUM_WORKERS)]


def _samples(source: int, target: int) -> Samples:
    """What one sends another."""
    lengths = np.random.default_rng([source, target]).integers(1, LONGEST, NUM_SAMPLES).astype(np.int32)
    columns = {key: KeyColumn(dtype=str(dtype).removeprefix("torch."), lengths=lengths) for key, dtype in KEYS.items()}
    return Samples(ids=tuple(f"{source}/{target}/{at}" for at in range(len(lengths))), keys=columns)


def _num_bytes(source: int, target: int) -> int:
    return sum(_samples(source, target).lengths("tokens")) * TOKEN_BYTES


def _fill(store: Store, samples: Samples) -> None:
    """Each value in memory of its own, as a generation leaves them."""
    for key, dtype in KEYS.items():
        for sequence, size in zip(samples.ids, samples.sizes(key), strict=True):
            store.put(sequence, key, torch.ones(size, dtype=dtype))


if __name__ == "__main__":
    print(json.dumps(transfer(), indent=1))
