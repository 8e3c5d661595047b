"""Parcels: what workers send one another in a redistribution, and the hook that tells each worker of its own.

    keys      tokens, scores      a cell is one key of one sample; its number is the key's place * len(ids)
    ids       a, b, c             + the sample's place: 1 is the tokens of b, 3 the scores of a

    outgoing  kinds      direct   broadcast
              num_peers  1        3          peers  4 | 4 5 6
              num_cells  2        1          cells  0 1 | 3        lengths  5 7 | 1

A worker has hundreds of parcels, mostly of a cell or two. A record for each would take longer than the plan itself and
fill the message with names; so they are tables of numbers on the wire, and `Parcel`s for who reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt

from ...api.batch import KeyColumn, Lengths, Samples
from ...api.record import message

Whole = npt.NDArray[np.int32]
NONE = np.zeros(0, np.int32)


class StepKind(StrEnum):
    """What a parcel is part of."""

    DIRECT = "direct"
    """One worker's to one other."""
    GATHER = "gather"
    """Several workers' to one."""
    SCATTER = "scatter"
    """One worker's different parts to several."""
    BROADCAST = "broadcast"
    """The same part to several."""


NUM_TABLES = 8
KINDS = tuple(StepKind)
"""On the wire a kind is its place here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """What one worker sends to others: these keys of these samples, in this order, as one packed buffer."""

    kind: StepKind = StepKind.DIRECT
    wave: int = 0
    """What a worker passes on in a wave, it has held before or received in an earlier one."""
    peers: tuple[int, ...]
    """Ranks: the receivers of a parcel that is sent, the one sender of a parcel that is received."""
    blocks: tuple[Samples, ...]
    """In a plan each has one key, and wider types come first."""


@message
class KeyType:
    """A key and the type of its values, as in `KeyColumn`."""

    name: str
    dtype: str
    trailing: tuple[NonNegativeInt, ...] = ()


class Tables(NamedTuple):
    """Parcels of one direction, in order of their waves; those of one pair are in one order on both sides."""

    kinds: Whole
    """Places in `KINDS`."""
    waves: Whole
    num_peers: Whole
    """Of each parcel, at least one."""
    num_cells: Whole
    """Of each parcel."""
    peers: Whole
    """Ranks, parcel by parcel."""
    cells: Whole
    """Parcel by parcel, in the order in which they lie in its buffer."""
    counts: Whole
    """How many sequences each cell has; empty for one each."""
    lengths: Whole
    """Of the sequences, cell by cell."""


@message
class Parcels:
    """`Tables`, one after the other, behind their sizes: one array is written and read faster than eight."""

    numbers: Lengths

    @staticmethod
    def of(tables: Tables) -> Parcels:
        return Parcels(numbers=np.concatenate([np.array([*map(len, tables)], np.int32), *tables]))

    @property
    def tables(self) -> Tables:
        ends = np.cumsum([NUM_TABLES, *self.numbers[:NUM_TABLES].tolist()]).tolist()
        return Tables(*(self.numbers[start:end] for start, end in pairwise(ends)))

    def __post_init__(self) -> None:
        """For what comes from the wire."""
        announced = NUM_TABLES + int(self.numbers[:NUM_TABLES].sum(dtype=np.int64))
        if len(self.numbers) != announced:
            raise ValueError(f"there are {len(self.numbers)} numbers, where {announced} are announced")
        tables = self.tables
        if not len(tables.kinds) == len(tables.waves) == len(tables.num_peers) == len(tables.num_cells):
            raise ValueError(f"there are {len(tables.kinds)} kinds: as many waves, num_peers and num_cells are needed")
        if len(tables.counts) not in (0, len(tables.cells)):
            raise ValueError(f"there are {len(tables.counts)} counts of {len(tables.cells)} cells")
        num_lengths = int(tables.counts.sum(dtype=np.int64)) if len(tables.counts) else len(tables.cells)
        expected = {
            "peers": int(tables.num_peers.sum(dtype=np.int64)),
            "cells": int(tables.num_cells.sum(dtype=np.int64)),
            "lengths": num_lengths,
        }
        for name, count in expected.items():
            if len(getattr(tables, name)) != count:
                raise ValueError(f"there are {len(getattr(tables, name))} {name}, where {count} are announced")
        if len(tables.kinds) and (tables.kinds.max() >= len(KINDS) or tables.num_peers.min() < 1):
            raise ValueError(f"a kind is below {len(KINDS)}, and a parcel has a peer")

    def __eq__(self, other: object) -> bool:
        return np.array_equal(self.numbers, other.numbers) if isinstance(other, Parcels) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # arrays can change


@message
class Redistribute:
    """Before a call: exchange parcels so that the call finds its inputs."""

    type: Literal["redistribute"] = "redistribute"
    tag: NonNegativeInt
    """Tells the messages of one redistribution from those of another."""
    ids: tuple[str, ...]
    """Of the samples that this worker's parcels are about."""
    keys: tuple[KeyType, ...]
    outgoing: Parcels
    incoming: Parcels

    def __post_init__(self) -> None:
        """For what comes from the wire."""
        num_cells = len(self.ids) * len(self.keys)
        for cells in (self.outgoing.tables.cells, self.incoming.tables.cells):
            if len(cells) and cells.max() >= num_cells:
                raise ValueError(f"cell {cells.max()} of {len(self.ids)} samples with {len(self.keys)} keys")

    @property
    def sends(self) -> tuple[Parcel, ...]:
        return tuple(self._read(self.outgoing.tables))

    @property
    def receives(self) -> tuple[Parcel, ...]:
        return tuple(self._read(self.incoming.tables))

    def _read(self, tables: Tables) -> Iterable[Parcel]:
        counts = tables.counts if len(tables.counts) else np.ones(len(tables.cells), np.int32)
        peers_to, cells_to, lengths_to = (
            np.concatenate([[0], np.cumsum(each)]) for each in (tables.num_peers, tables.num_cells, counts)
        )
        for at in range(len(tables.kinds)):
            start, stop = int(cells_to[at]), int(cells_to[at + 1])
            places, positions = np.divmod(tables.cells[start:stop], max(1, len(self.ids)))
            turns = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), stop - start] if stop > start else []
            blocks = []
            for first, last in pairwise(turns):
                key = self.keys[places[first]]
                column = KeyColumn(
                    dtype=key.dtype,
                    lengths=tables.lengths[lengths_to[start + first] : lengths_to[start + last]],
                    trailing=key.trailing,
                    counts=counts[start + first : start + last] if len(tables.counts) else None,
                )
                ids = tuple(self.ids[position] for position in positions[first:last])
                blocks.append(Samples(ids=ids, keys={key.name: column}))
            yield Parcel(
                kind=KINDS[tables.kinds[at]],
                wave=int(tables.waves[at]),
                peers=tuple(tables.peers[peers_to[at] : peers_to[at + 1]].tolist()),
                blocks=tuple(blocks),
            )

    @staticmethod
    def of(tag: int, sends: Sequence[Parcel] = (), receives: Sequence[Parcel] = ()) -> Redistribute:
        """From parcels, with blocks of any keys."""
        blocks = [block for parcel in (*sends, *receives) for block in parcel.blocks]
        ids = tuple(dict.fromkeys(identity for block in blocks for identity in block.ids))
        found = [_key_type(name, column) for block in blocks for name, column in block.keys.items()]
        keys = tuple(key for at, key in enumerate(found) if key not in found[:at])
        at = {identity: position for position, identity in enumerate(ids)}
        return Redistribute(
            tag=tag,
            ids=ids,
            keys=keys,
            outgoing=_columns(sends, at, keys),
            incoming=_columns(receives, at, keys),
        )


def _key_type(name: str, column: KeyColumn) -> KeyType:
    return KeyType(name=name, dtype=column.dtype, trailing=column.trailing)


def _columns(parcels: Sequence[Parcel], at: dict[str, int], keys: tuple[KeyType, ...]) -> Parcels:
    cells: list[list[int]] = [[] for _ in parcels]
    columns: list[KeyColumn] = []
    for parcel, numbers in zip(parcels, cells, strict=True):
        for block in parcel.blocks:
            for name, column in block.keys.items():
                start = keys.index(_key_type(name, column)) * len(at)
                numbers += [start + at[identity] for identity in block.ids]
                columns.append(column)
    counts = [np.ones(len(column), np.int32) if column.counts is None else column.counts for column in columns]
    return Parcels.of(
        Tables(
            kinds=_whole(KINDS.index(parcel.kind) for parcel in parcels),
            waves=_whole(parcel.wave for parcel in parcels),
            num_peers=_whole(len(parcel.peers) for parcel in parcels),
            num_cells=_whole(len(numbers) for numbers in cells),
            peers=_whole(peer for parcel in parcels for peer in parcel.peers),
            cells=_whole(number for numbers in cells for number in numbers),
            counts=np.concatenate([NONE, *counts]) if any(column.counts is not None for column in columns) else NONE,
            lengths=np.concatenate([NONE, *(column.lengths for column in columns)]),
        )
    )


def _whole(values: Iterable[int]) -> Whole:
    return np.fromiter(values, np.int32)
