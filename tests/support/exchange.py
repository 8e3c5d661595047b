"""Redistributions without a master: workers that hold made-up values, in threads or processes, on a real gloo group.

    Move(0, (1, 2), blocks)           ---plans--->   worker 0 sends one parcel to 1 and 2, which expect one of 0
    Move(1, (3,), blocks, wave=1)                    worker 1 passes on what it received in wave 0

Which values a key has follows from the names of key and sample, so every worker can tell what should arrive.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from preloaded import forking
from torch import Tensor
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.system.rpc.parcels import Parcel, Redistribute, StepKind
from trainmaster.workers.data.packed import PackedSamples
from trainmaster.workers.data.store import Store
from trainmaster.workers.data.transfer import redistribute
from trainmaster.workers.parallel.groups import Group, form_group, host_store, join_store

ADDRESS, CPU, DEADLINE = "127.0.0.1", torch.device("cpu"), timedelta(seconds=60)
NUM_WORKERS = 4
KEYS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "mask": (torch.bool, ()),
    "bytes": (torch.uint8, (3,)),
    "signed": (torch.int8, ()),
    "routing": (torch.int16, (2, 3)),
    "versions": (torch.int32, ()),
    "tokens": (torch.int64, ()),
    "half": (torch.float16, ()),
    "hidden": (torch.bfloat16, (5,)),
    "logprobs": (torch.float32, ()),
    "exact": (torch.float64, (1,)),
    "complex": (torch.complex64, ()),
    "quarter": (torch.float8_e4m3fn, (2,)),
    "fifth": (torch.float8_e5m2, ()),
    "nothing": (torch.float32, (0,)),
}
SEVERAL = ("versions", "quarter", "tokens")
"""Keys of which a sample has any number of sequences."""
Held = Mapping[str, Mapping[str, bytes]]
"""By sample and key."""


def column(ids: Sequence[str], key: str) -> KeyColumn:
    """Lengths from 0 to 4, and 0 to 3 sequences of the keys in `SEVERAL`."""
    dtype, trailing = KEYS[key]
    generators = [np.random.default_rng(zlib.crc32(f"{key} of {sequence}".encode())) for sequence in ids]
    counts = [int(generator.integers(0, 4)) if key in SEVERAL else 1 for generator in generators]
    lengths = [generator.integers(0, 5, count) for generator, count in zip(generators, counts, strict=True)]
    return KeyColumn(
        dtype=str(dtype).removeprefix("torch."),
        lengths=np.concatenate([np.zeros(0, np.int32), *lengths]).astype(np.int32),
        trailing=trailing,
        counts=np.asarray(counts, np.int32) if key in SEVERAL else None,
    )


def samples(ids: Sequence[str], keys: Sequence[str]) -> Samples:
    return Samples(ids=tuple(ids), keys={key: column(ids, key) for key in keys})


def value(sequence: str, key: str) -> Tensor:
    """Any bit pattern of the key's type: not-a-numbers too, and whole numbers past 2**53."""
    (size,) = samples([sequence], [key]).sizes(key)
    dtype, trailing = KEYS[key]
    shape = (size, *trailing)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{sequence} has {key}".encode()))
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def packed(ids: Sequence[str], keys: Sequence[str]) -> PackedSamples:
    values: dict[str, Tensor | None] = {}
    for key in keys:
        dtype, trailing = KEYS[key]
        values[key] = torch.cat([torch.empty(0, *trailing, dtype=dtype), *(value(sequence, key) for sequence in ids)])
    return PackedSamples(samples=samples(ids, keys), values=values)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# -- plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """One parcel: from one worker to others, in a wave."""

    source: int
    targets: tuple[int, ...]
    blocks: tuple[Samples, ...]
    wave: int = 0
    kind: StepKind = StepKind.DIRECT

    @property
    def values(self) -> set[tuple[str, str]]:
        """Sample and key of each."""
        return {(sequence, key) for block in self.blocks for sequence in block.ids for key in block.keys}


def plan(tag: int, sends: Sequence[Parcel] = (), receives: Sequence[Parcel] = ()) -> Redistribute:
    return Redistribute.of(tag=tag, sends=tuple(sends), receives=tuple(receives))


def plans(moves: Sequence[Move], tag: int) -> list[Redistribute]:
    """Each worker's part."""
    sends: list[list[Parcel]] = [[] for _ in range(NUM_WORKERS)]
    receives: list[list[Parcel]] = [[] for _ in range(NUM_WORKERS)]
    for move in moves:
        sends[move.source].append(Parcel(kind=move.kind, wave=move.wave, peers=move.targets, blocks=move.blocks))
        for target in move.targets:
            parcel = Parcel(kind=move.kind, wave=move.wave, peers=(move.source,), blocks=move.blocks)
            receives[target].append(parcel)
    return [plan(tag, sends[rank], receives[rank]) for rank in range(NUM_WORKERS)]


def store_with(values: Sequence[tuple[str, str]]) -> Store:
    """Holds these keys of samples."""
    store = Store()
    for sequence, key in values:
        store.put(sequence, key, value(sequence, key))
    return store


# -- workers ----------------------------------------------------------------------------------------------------------


@contextmanager
def groups_in_threads() -> Iterator[list[Group]]:
    """One group of as many workers, all in this process, by rank."""
    meeting, port = host_store(ADDRESS)
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        joined = list(threads.map(lambda rank: _join(rank, port), range(NUM_WORKERS)))
    yield joined
    for group in joined:
        group.leave()
    del meeting


def run_in_threads(parts: Sequence[Redistribute], stores: Sequence[Store], groups: Sequence[Group]) -> None:
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        for done in [threads.submit(redistribute, *each) for each in zip(parts, stores, groups, strict=True)]:
            done.result(timeout=DEADLINE.total_seconds())


def run_in_processes(
    parts: Sequence[Sequence[Redistribute]], held: Sequence[Sequence[tuple[str, str]]]
) -> list[list[Held]]:
    """Several redistributions, one after the other: what each worker has received after each, and then releases."""
    meeting, port = host_store(ADDRESS)  # lives until all are done
    with ProcessPoolExecutor(NUM_WORKERS, mp_context=forking()) as pool:
        futures: list[Future[list[Held]]] = [
            pool.submit(_process, rank, port, [each[rank] for each in parts], held[rank]) for rank in range(NUM_WORKERS)
        ]
        found = [future.result(timeout=DEADLINE.total_seconds()) for future in futures]
    del meeting
    return [list(each) for each in zip(*found, strict=True)]


def _process(rank: int, port: int, parts: Sequence[Redistribute], held: Sequence[tuple[str, str]]) -> list[Held]:
    torch.set_num_threads(1)
    group = _join(rank, port)
    found = []
    for part in parts:
        store = store_with(held)
        redistribute(part, store, group)
        received: dict[str, dict[str, bytes]] = {}
        for block in (block for parcel in part.receives for block in parcel.blocks):
            for sequence in block.ids:
                for key in block.keys:
                    received.setdefault(sequence, {})[key] = raw(store.get(sequence, key))
        store.release([*received, *(sequence for sequence, _ in held)])
        assert len(store) == 0, "nothing is left once all is released"
        found.append(received)
    return found


def _join(rank: int, port: int) -> Group:
    meeting = join_store(ADDRESS, port, DEADLINE)
    return form_group(meeting, "transfer", list(range(NUM_WORKERS)), rank, CPU, ADDRESS, DEADLINE)
