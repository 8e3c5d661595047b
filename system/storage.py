"""Who holds which key of which sequence. Pure bookkeeping in the master; the values are in the workers' stores.

A holding of a key is a number, and all of them are one sorted array; what is added is sorted in at the next look.

    | 43 bits: the sequence's row | 20 bits: the rank |
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..api.batch import Samples

Numbers = npt.NDArray[np.int64]
AnyNumbers = npt.NDArray[np.int64] | npt.NDArray[np.int32]
V = TypeVar("V", bound=np.generic)
_RANK_BITS = 20
_RANKS = (1 << _RANK_BITS) - 1
_NONE: Numbers = np.zeros(0, np.int64)
NO_ROW = -1


class Storage:
    """Holders by sequence and key. Who they are does not depend on the order in which they came to hold it."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._free_rows: list[int] = []
        self._known: dict[tuple[str, ...], Numbers] = {}
        """Rows of sequences that came together, since the last release."""
        self._together: dict[int, list[tuple[Numbers, Samples]]] = {}
        """By rank what it came to hold, since the last release."""
        self._holdings: dict[str, Numbers] = {}
        """By key, ascending."""
        self._new: dict[str, list[Numbers]] = {}
        """By key, not sorted in yet."""
        self._added: list[tuple[int, Samples]] = []
        """Since the last look."""
        self.num_ranks = 0
        """Above every rank that holds something, or held it once."""

    def add(self, rank: int, samples: Samples) -> None:
        """This worker holds every key of these samples from now on."""
        assert 0 <= rank <= _RANKS, f"rank {rank} is between 0 and {_RANKS}"
        self._added.append((rank, samples))
        self.num_ranks = max(self.num_ranks, rank + 1)

    def holders(self, sequence: str, key: str) -> tuple[int, ...]:
        """In ascending order."""
        _, ranks = self.look_up(key, self.rows((sequence,)))
        return tuple(ranks.tolist())

    def rows(self, sequences: tuple[str, ...]) -> Numbers:
        """The number of each sequence, below `num_rows`, until it is released; `NO_ROW` where nobody holds anything."""
        self._take_in()
        known = self._known.get(sequences)
        if known is None:
            known = np.fromiter(map(self._rows.get, sequences, repeat(NO_ROW)), np.int64)
        return known

    def held_together(self, rank: int, sequences: tuple[str, ...]) -> set[str]:
        """Keys of just these sequences that the worker came to hold all at once, since the last release: what is known
        without a look at each. It holds others too, perhaps."""
        self._take_in()
        held = self._together.get(rank, ())
        rows = self._known.get(sequences) if held else None
        return {key for each, samples in held if each is rows for key in samples.keys}

    @property
    def num_rows(self) -> int:
        self._take_in()
        return len(self._rows) + len(self._free_rows)

    def look_up(self, key: str, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Of each row how many hold the key; and their ranks, ascending, one after the other."""
        self._take_in()
        holdings = self._of_key(key)
        counts = np.bincount(holdings >> _RANK_BITS, minlength=self.num_rows + 1)  # at the end, that of `NO_ROW`
        starts = np.cumsum(counts) - counts
        return counts[rows], holdings[spans(starts[rows], counts[rows])] & _RANKS

    def release(self, sequences: Sequence[str]) -> dict[int, tuple[str, ...]]:
        """Forgets sequences; returns who has to forget which."""
        self._take_in()
        rows = np.fromiter(map(self._rows.pop, sequences), np.int64)
        self._known.clear()
        self._together.clear()
        self._free_rows += rows.tolist()
        place = np.full(self.num_rows, NO_ROW)
        place[rows] = np.arange(len(rows))
        arrays = {id(each): each for each in chain(self._holdings.values(), *self._new.values())}
        gone, kept = [_NONE], dict[int, Numbers]()
        for identity, holdings in arrays.items():  # new keys share them
            places = place[holdings >> _RANK_BITS]
            is_gone = places != NO_ROW
            gone.append((holdings[is_gone] & _RANKS) * max(1, len(rows)) + places[is_gone])
            kept[identity] = holdings[~is_gone]
        self._holdings = {key: kept[id(each)] for key, each in self._holdings.items()}
        new = {key: [kept[id(each)] for each in parts if len(kept[id(each)])] for key, parts in self._new.items()}
        self._new = {key: parts for key, parts in new.items() if parts}
        ranks, places = np.divmod(distinct(np.concatenate(gone)), max(1, len(rows)))
        first = starts_of_runs(ranks)
        names = np.array(sequences, dtype=object)[places]
        of_ranks = np.split(names, first[1:])
        return {rank: tuple(ids.tolist()) for rank, ids in zip(ranks[first].tolist(), of_ranks, strict=False)}

    def __len__(self) -> int:
        self._take_in()
        return len(self._rows)

    def _take_in(self) -> None:
        """What was added. Workers hold the same sequences again and again: these are looked up once."""
        if not self._added:
            return
        alike: dict[tuple[str, ...], list[tuple[int, Numbers]]] = {}
        """Ranks and rows, by the keys that they hold."""
        for rank, samples in self._added:
            rows = self._numbered(samples.ids)
            self._together.setdefault(rank, []).append((rows, samples))
            alike.setdefault(tuple(samples.keys), []).append((rank, rows))
        self._added.clear()
        for names, held in alike.items():
            ranks = np.repeat([rank for rank, _ in held], [len(each) for _, each in held])
            holdings = np.concatenate([each for _, each in held]) << _RANK_BITS | ranks
            for name in names:
                self._new.setdefault(name, []).append(holdings)

    def _numbered(self, sequences: tuple[str, ...]) -> Numbers:
        """Rows of sequences that may be new."""
        known = self._known.get(sequences)
        if known is None:
            for identity in sequences:
                if identity not in self._rows:
                    self._rows[identity] = self._free_rows.pop() if self._free_rows else len(self._rows)
            known = self._known[sequences] = np.fromiter(map(self._rows.__getitem__, sequences), np.int64)
        return known

    def _of_key(self, key: str) -> Numbers:
        if key in self._new:
            self._holdings[key] = distinct(np.concatenate([self._holdings.get(key, _NONE), *self._new.pop(key)]))
        return self._holdings.get(key, _NONE)


def distinct(values: npt.NDArray[V]) -> npt.NDArray[V]:
    """Ascending; numpy's `unique` takes many times longer."""
    ordered = np.sort(values)
    return ordered[starts_of_runs(ordered)]


def starts_of_runs(values: npt.NDArray[V]) -> Numbers:
    """Where each value that differs from the one before it is; numpy's `diff` takes longer."""
    is_first = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=is_first[1:])
    return np.flatnonzero(is_first)


def spans(starts: AnyNumbers, counts: AnyNumbers) -> Numbers:
    """`start ... start + count - 1` of each, one after the other."""
    before: Numbers = starts - np.cumsum(counts, dtype=np.int64) + counts
    return np.arange(counts.sum(), dtype=np.int64) + np.repeat(before, counts)
