"""What is needed where, and who holds it: needs, storage and hosts as arrays, for the router. Pure.

A cell is one key of one sample, and a number: the key's place * num_samples + the sample's place. Samples are numbered
in the order in which ranks need them, keys by the width of their type, widest first, so that a parcel whose cells
ascend is aligned. A place is a host, or a part of one with more than 64 workers; a worker's slot is its bit in a mask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, compress, pairwise
from typing import NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from ..api.batch import KeyColumn, Samples
from ..api.errors import RunError
from .rpc.parcels import KeyType
from .storage import NO_ROW, Numbers, Storage, spans, starts_of_runs

Masks = npt.NDArray[np.uint64]
Codes = TypeVar("Codes", Numbers, npt.NDArray[np.int32])
NUM_SLOTS = 64
_NONE: Numbers = np.zeros(0, np.int64)
Needs = Mapping[int, tuple[Samples, Sequence[str]]]
"""By rank: samples, and the keys of them that it reads."""


class Places:
    """Which worker sits where."""

    def __init__(self, hosts: Sequence[str], num_ranks: int) -> None:
        """`hosts` by rank; workers beyond are together on another."""
        numbers: dict[str, int] = {}
        names = [hosts[rank] if rank < len(hosts) else "" for rank in range(num_ranks)]
        host = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int64)
        sizes = np.bincount(host)
        seat = np.empty(num_ranks, np.int64)  # on its host
        seat[np.argsort(host, kind="stable")] = spans(np.zeros_like(sizes), sizes)
        parts = -(-sizes // NUM_SLOTS)
        self.place, self.slot = (np.cumsum(parts) - parts)[host] + seat // NUM_SLOTS, seat % NUM_SLOTS
        """`[rank]`"""
        self.num_ranks, self.num_places = num_ranks, int(parts.sum())
        self.num_slots = int(self.slot.max(initial=-1)) + 1
        self.ranks = np.full((self.num_places, self.num_slots), num_ranks)
        """`[place, slot]`; `num_ranks` where there is no worker."""
        self.ranks[self.place, self.slot] = np.arange(num_ranks)

    def bits(self, ranks: Numbers) -> Masks:
        return np.uint64(1) << self.slot[ranks].astype(np.uint64)

    def is_member(self, masks: Masks) -> npt.NDArray[np.bool_]:
        """`[mask, slot]`"""
        octets = masks.astype("<u8")[:, None].view(np.uint8)
        return np.unpackbits(octets, axis=1, count=self.num_slots, bitorder="little").view(np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What each cell is. Arrays are `[cell]`; a cell of which no need speaks has no size."""

    ids: tuple[str, ...]
    """Of the samples."""
    rows: Numbers
    """Of the samples, in the storage."""
    keys: tuple[KeyType, ...]
    size_bytes: Numbers
    counts: Numbers
    """Of its sequences."""
    has_counts: bool
    """Whether any has another number of sequences than one."""
    starts: Numbers
    """Where its first sequence is in `lengths`."""
    lengths: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Cells that some worker lacks, by place: one entry for each pair of the two, cells ascending, then places."""

    places: Places
    cells: Cells
    cell: Numbers
    place: Numbers
    lacking: Masks
    """Workers of the place that need the cell and do not hold it. Never empty."""
    holding: Masks
    """Workers of the place that hold it."""
    first_holder: Numbers
    """`[entry]`: where the cell's holders begin in `holders`."""
    num_holders: Numbers
    holders: Numbers
    """Ranks, wherever they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """What some workers need alike."""

    ranks: list[int]
    samples: Samples
    keys: tuple[str, ...]


def demand_of(needs: Needs, storage: Storage, hosts: Sequence[str]) -> Demand:
    """Raises `RunError` naming sequence and key if nobody holds what is needed."""
    shares = _shares(needs, storage)
    cells, wanted = _number(shares, storage)
    places = _places(tuple(hosts), max(len(hosts), storage.num_ranks, *(rank + 1 for rank in needs), 0))
    codes, masks = _entries(shares, wanted, places)
    entry_cells, entry_places = split(codes, places.num_places)
    first = starts_of_runs(entry_cells)
    num_holders, holders = _holders(entry_cells[first], cells, storage)
    if not num_holders.all():
        _refuse(shares, storage)
    held = np.repeat(entry_cells[first] * places.num_places, num_holders) + places.place[holders]
    holding = _masks(codes, held, places.slot[holders])
    lacking = masks & ~holding
    found = np.flatnonzero(lacking)
    at = np.repeat(np.arange(len(first)), np.diff(first, append=len(codes)))[found]
    return Demand(
        places=places,
        cells=cells,
        cell=entry_cells[found],
        place=entry_places[found],
        lacking=lacking[found],
        holding=holding[found],
        first_holder=(np.cumsum(num_holders) - num_holders)[at],
        num_holders=num_holders[at],
        holders=holders,
    )


@lru_cache(maxsize=1)
def _places(hosts: tuple[str, ...], num_ranks: int) -> Places:
    """The same at every step of a run. Leave them as they are."""
    return Places(hosts, num_ranks)


def _shares(needs: Needs, storage: Storage) -> list[_Share]:
    """In the order of their first ranks. Workers that are given one object of samples share it.

    Keys that a worker holds of all of them, as after a call on the same share, are left out before they are looked at
    one by one.
    """
    shares: dict[tuple[int, tuple[str, ...]], _Share] = {}
    for rank in sorted(needs):
        samples, names = needs[rank]
        held = storage.held_together(rank, samples.ids)
        keys = tuple(name for name in names if name not in held)
        if (id(samples), keys) in shares:
            shares[id(samples), keys].ranks.append(rank)
        elif samples.ids and keys:
            shares[id(samples), keys] = _Share(ranks=[rank], samples=samples, keys=keys)
    return list(shares.values())


def _number(shares: list[_Share], storage: Storage) -> tuple[Cells, list[Numbers]]:
    """All cells, and those that each share wants."""
    blocks = {id(share.samples): share.samples for share in shares}
    ids = list(chain.from_iterable(samples.ids for samples in blocks.values()))
    rows = np.concatenate([_NONE, *(storage.rows(samples.ids) for samples in blocks.values())])
    if (rows == NO_ROW).any() or any(not share.samples.keys.keys() >= set(share.keys) for share in shares):
        _refuse(shares, storage)
    first = np.full(storage.num_rows, NO_ROW)
    first[rows[::-1]] = np.arange(len(ids))[::-1]
    is_first = first[rows] == np.arange(len(ids))
    numbers = (np.cumsum(is_first) - 1)[first[rows]]
    ends = np.cumsum([len(samples) for samples in blocks.values()], dtype=np.int64)
    positions = dict(zip(blocks, np.split(numbers, ends[:-1]), strict=False))  # none of none
    return _describe(tuple(compress(ids, is_first.tolist())), rows[is_first], shares, positions)


def _describe(
    ids: tuple[str, ...], rows: Numbers, shares: list[_Share], positions: Mapping[int, Numbers]
) -> tuple[Cells, list[Numbers]]:
    """`positions`: the places of samples among `ids`, by the identity of their object."""
    columns: dict[tuple[int, str, str, tuple[int, ...]], dict[int, KeyColumn]] = {}
    """By type, and by the samples' identity."""
    for share in shares:
        for key in share.keys:
            column = share.samples.keys[key]
            columns.setdefault(_type_of(key, column), {})[id(share.samples)] = column
    types = sorted(columns)
    first = {each: place * len(ids) for place, each in enumerate(types)}
    size_bytes, starts = (np.zeros(len(ids) * len(types), np.int64) for _ in range(2))
    counts = np.ones_like(starts)
    lengths, num_lengths = [np.zeros(0, np.int32)], 0
    for each in types:
        column = KeyColumn.gather(list(columns[each].values()))
        cells = first[each] + np.concatenate([positions[samples] for samples in columns[each]])
        size_bytes[cells] = column.sizes * _width(column.dtype) * math.prod(column.trailing)
        counts[cells] = 1 if column.counts is None else column.counts
        starts[cells] = num_lengths + np.cumsum(counts[cells]) - counts[cells]
        lengths.append(column.lengths)
        num_lengths += len(column.lengths)
    table = Cells(
        ids=ids,
        rows=rows,
        keys=tuple(KeyType(name=name, dtype=dtype, trailing=trailing) for _, name, dtype, trailing in types),
        size_bytes=size_bytes,
        counts=counts,
        has_counts=bool((counts != 1).any()),
        starts=starts,
        lengths=np.concatenate(lengths),
    )
    return table, [
        np.concatenate(
            [first[_type_of(key, share.samples.keys[key])] + positions[id(share.samples)] for key in share.keys]
        )
        for share in shares
    ]


def _type_of(key: str, column: KeyColumn) -> tuple[int, str, str, tuple[int, ...]]:
    """Sorts wider types first."""
    return -_width(column.dtype), key, column.dtype, column.trailing


@lru_cache
def _width(dtype: str) -> int:
    """Bytes: the bits stand in the name of every torch type but `bool`."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def _holders(needed: Numbers, cells: Cells, storage: Storage) -> tuple[Numbers, Numbers]:
    """Of each cell that is needed, how many hold it; and their ranks, ascending, one after the other."""
    firsts = np.searchsorted(needed, np.arange(len(cells.keys) + 1) * len(cells.ids)).tolist()
    found = [
        storage.look_up(key.name, cells.rows[needed[start:end] - place * len(cells.ids)])
        for place, (key, (start, end)) in enumerate(zip(cells.keys, pairwise(firsts), strict=True))
    ]
    num_holders, holders = zip((_NONE, _NONE), *found, strict=True)
    return np.concatenate(num_holders), np.concatenate(holders)


def _entries(shares: list[_Share], wanted: list[Numbers], places: Places) -> tuple[Numbers, Masks]:
    """Pairs of a cell and a place that needs it, as `cell * num_places + place`, ascending; and who needs it there."""
    if not shares:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    ranks = np.concatenate([share.ranks for share in shares])
    teams = np.repeat(np.arange(len(shares)), [len(share.ranks) for share in shares])
    teams = teams * places.num_places + places.place[ranks]  # who needs a share at one place
    order = np.argsort(teams, kind="stable")
    first = starts_of_runs(teams[order])
    team_masks = np.bitwise_or.reduceat(places.bits(ranks)[order], first)
    share, place = split(teams[order][first], places.num_places)
    counts = np.asarray([len(mine) for mine in wanted])
    num_wanted = counts[share]
    cells = np.concatenate(wanted)[spans((np.cumsum(counts) - counts)[share], num_wanted)]
    codes = cells * places.num_places + np.repeat(place, num_wanted)
    tags = np.repeat(np.arange(len(share)), num_wanted)  # sorted along: many times faster than an index
    codes, tags = split(np.sort(codes * len(share) + tags), len(share))
    masks = team_masks[tags]
    first = starts_of_runs(codes)
    if len(first) < len(codes):
        masks = np.bitwise_or.reduceat(masks, first)
    return codes[first], masks


def _masks(codes: Numbers, held: Numbers, slots: Numbers) -> Masks:
    """For each of the codes, which ascend, the slots that come with it; those of other codes are left out."""
    held, slots = split(np.sort(held * NUM_SLOTS + slots), NUM_SLOTS)
    at = np.searchsorted(codes, held)
    is_here = codes[np.minimum(at, len(codes) - 1)] == held
    masks = np.zeros(len(codes), np.uint64)
    np.bitwise_or.at(masks, at[is_here], np.uint64(1) << slots[is_here].astype(np.uint64))
    return masks


def split(codes: Codes, base: int) -> tuple[Codes, Codes]:
    """Quotient and remainder; numpy's own `divmod` is slower."""
    quotient = codes // max(1, base)
    return quotient, codes - quotient * base


def _refuse(shares: list[_Share], storage: Storage) -> NoReturn:
    """Names what the first worker lacks first."""
    for share in shares:
        rows = storage.rows(share.samples.ids)
        lacking = [
            (int(at), place)
            for place, key in enumerate(share.keys)
            for at in np.flatnonzero((storage.look_up(key, rows)[0] == 0) | (key not in share.samples.keys))[:1]
        ]
        if lacking:
            at, place = min(lacking)
            raise RunError(
                f"no worker holds key {share.keys[place]} of sequence {share.samples.ids[at]}, which worker "
                f"{share.ranks[0]} needs"
            )
    raise AssertionError("something is missing")
