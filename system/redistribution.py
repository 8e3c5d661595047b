"""The planner: from who holds what and who needs what to parcels between pairs of workers. Pure.

A worker receives what it needs and does not hold, no more. Each worker is told of its own parcels only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..api.batch import Samples
from ..api.errors import RunError
from .rpc.commands import Parcel, Redistribute
from .storage import Storage

EVERY_STAGE_KEYS = ("tokens", "prompt")
"""Keys that every pipeline stage reads; all others are read by the last stage only."""


def keys_of_stage(keys: Sequence[str], is_last: bool) -> tuple[str, ...]:
    """Which of a call's keys a stage reads."""
    return tuple(key for key in keys if is_last or key in EVERY_STAGE_KEYS)


def plan_redistribution(
    needs: Mapping[int, tuple[Samples, Sequence[str]]], storage: Storage, tag: int
) -> dict[int, Redistribute]:
    """`needs` by rank: samples, and the keys of them that it reads. Returns each worker's part, if it has one.

    Raises `RunError` naming sequence and key if nobody holds what is needed.
    """
    sends: dict[int, list[Parcel]] = {}
    receives: dict[int, list[Parcel]] = {}
    for target, (samples, keys) in sorted(needs.items()):
        for (source, missing), positions in _missing(target, samples, keys, storage).items():
            chosen = samples.select(positions)
            parcel = Samples(ids=chosen.ids, keys={key: chosen.keys[key] for key in missing})
            sends.setdefault(source, []).append(Parcel(peers=(target,), blocks=(parcel,)))
            receives.setdefault(target, []).append(Parcel(peers=(source,), blocks=(parcel,)))
    return {
        rank: Redistribute(
            tag=tag,
            sends=tuple(sends[rank]) if rank in sends else (),
            receives=tuple(receives[rank]) if rank in receives else (),
        )
        for rank in sorted(sends.keys() | receives.keys())
    }


def _missing(
    target: int, samples: Samples, keys: Sequence[str], storage: Storage
) -> dict[tuple[int, tuple[str, ...]], list[int]]:
    """Positions of sequences by (source, keys to get from there)."""
    wanted: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for position, sequence in enumerate(samples.ids):
        by_source: dict[int, list[str]] = {}
        for key in keys:
            holders = storage.holders(sequence, key)
            if not holders:
                raise RunError(f"no worker holds key {key} of sequence {sequence}, which worker {target} needs")
            if target not in holders:
                by_source.setdefault(holders[target % len(holders)], []).append(key)
        for source, missing in by_source.items():
            wanted.setdefault((source, tuple(missing)), []).append(position)
    return wanted
