"""Parcels: what workers send one another in a redistribution, and the hook that tells each worker of its own.

    keys      tokens, scores      a cell is one key of one sample; its number is the key's place * len(ids)
    ids       a, b, c             + the sample's place: 1 is the tokens of b, 3 the scores of a

    outgoing  kinds      direct   broadcast
              num_peers  1        3          peers  4 | 4 5 6
              num_cells  2        1          cells  0 1 | 3        lengths  5 7 | 1

A worker has hundreds of parcels, mostly of a cell or two. A record for each would take longer than the plan itself and
fill the message with names; so they are columns of numbers on the wire, and `Parcel`s for who reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Literal

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


@message
class Parcels:
    """Parcels of one direction, in order of their waves; those of one pair are in one order on both sides."""

    kinds: Lengths
    """Places in `KINDS`."""
    waves: Lengths
    num_peers: Lengths
    """Of each parcel, at least one."""
    peers: Lengths
    """Ranks, parcel by parcel."""
    num_cells: Lengths
    """Of each parcel."""
    cells: Lengths
    """Parcel by parcel, in the order in which they lie in its buffer."""
    counts: Lengths | None = None
    """How many sequences each cell has; None for one each."""
    lengths: Lengths
    """Of the sequences, cell by cell."""

    def __post_init__(self) -> None:
        """For what comes from the wire."""
        if not len(self.kinds) == len(self.waves) == len(self.num_peers) == len(self.num_cells):
            raise ValueError(f"there are {len(self.kinds)} kinds: as many waves, num_peers and num_cells are needed")
        num_lengths = len(self.cells) if self.counts is None else int(self.counts.sum())
        expected = {"peers": int(self.num_peers.sum()), "cells": int(self.num_cells.sum()), "lengths": num_lengths}
        for name, count in expected.items():
            if len(getattr(self, name)) != count:
                raise ValueError(f"there are {len(getattr(self, name))} {name}, where {count} are announced")
        if self.counts is not None and len(self.counts) != len(self.cells):
            raise ValueError(f"there are {len(self.counts)} counts of {len(self.cells)} cells")
        if len(self.kinds) and (self.kinds.max() >= len(KINDS) or self.num_peers.min() < 1):
            raise ValueError(f"a kind is below {len(KINDS)}, and a parcel has a peer")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parcels):
            return NotImplemented
        return all(np.array_equal(mine, theirs) for mine, theirs in zip(self.columns(), other.columns(), strict=True))

    __hash__ = None  # type: ignore[assignment]  # arrays can change

    def columns(self) -> tuple[Whole, ...]:
        counts = np.ones(len(self.cells), np.int32) if self.counts is None else self.counts
        return (
            self.kinds,
            self.waves,
            self.num_peers,
            self.peers,
            self.num_cells,
            self.cells,
            counts,
            self.lengths,
        )


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
        for parcels in (self.outgoing, self.incoming):
            if len(parcels.cells) and parcels.cells.max() >= num_cells:
                raise ValueError(f"cell {parcels.cells.max()} of {len(self.ids)} samples with {len(self.keys)} keys")

    @property
    def sends(self) -> tuple[Parcel, ...]:
        return tuple(self._read(self.outgoing))

    @property
    def receives(self) -> tuple[Parcel, ...]:
        return tuple(self._read(self.incoming))

    def _read(self, parcels: Parcels) -> Iterable[Parcel]:
        counts, lengths = parcels.columns()[-2:]
        peers_to, cells_to, lengths_to = (
            np.concatenate([[0], np.cumsum(each)]) for each in (parcels.num_peers, parcels.num_cells, counts)
        )
        for at in range(len(parcels.kinds)):
            start, stop = int(cells_to[at]), int(cells_to[at + 1])
            places, positions = np.divmod(parcels.cells[start:stop], max(1, len(self.ids)))
            turns = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), stop - start] if stop > start else []
            blocks = []
            for first, last in pairwise(turns):
                key = self.keys[places[first]]
                column = KeyColumn(
                    dtype=key.dtype,
                    lengths=lengths[lengths_to[start + first] : lengths_to[start + last]],
                    trailing=key.trailing,
                    counts=None if parcels.counts is None else counts[start + first : start + last],
                )
                ids = tuple(self.ids[position] for position in positions[first:last])
                blocks.append(Samples(ids=ids, keys={key.name: column}))
            yield Parcel(
                kind=KINDS[parcels.kinds[at]],
                wave=int(parcels.waves[at]),
                peers=tuple(parcels.peers[peers_to[at] : peers_to[at + 1]].tolist()),
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
    return Parcels(
        kinds=_whole(KINDS.index(parcel.kind) for parcel in parcels),
        waves=_whole(parcel.wave for parcel in parcels),
        num_peers=_whole(len(parcel.peers) for parcel in parcels),
        peers=_whole(peer for parcel in parcels for peer in parcel.peers),
        num_cells=_whole(len(numbers) for numbers in cells),
        cells=_whole(number for numbers in cells for number in numbers),
        counts=np.concatenate([NONE, *counts]) if any(column.counts is not None for column in columns) else None,
        lengths=np.concatenate([NONE, *(column.lengths for column in columns)]),
    )


def _whole(values: Iterable[int]) -> Whole:
    return np.fromiter(values, np.int32)
