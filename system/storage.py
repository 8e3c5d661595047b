"""Who holds which key of which sequence. Pure bookkeeping in the master; the values are in the workers' stores.

A holding is a number, and all of them are one sorted array; what is added is taken in all at once, at the next look.

    | 31 bits: the sequence's row | 12 bits: the key | 20 bits: the rank |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..api.batch import Samples

Numbers = npt.NDArray[np.int64]
AnyNumbers = npt.NDArray[np.int64] | npt.NDArray[np.int32]
V = TypeVar("V", bound=np.generic)
_RANK_BITS, _KEY_BITS = 20, 12
_RANKS = (1 << _RANK_BITS) - 1
NO_ROW = -1


class Storage:
    """Holders by sequence and key. What it answers does not depend on the order in which they came to hold it."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._known: dict[tuple[str, ...], Numbers] = {}
        """Rows that were looked up together, since the last release."""
        self._free_rows: list[int] = []
        self._keys: dict[str, int] = {}
        self._holdings: Numbers = np.zeros(0, np.int64)
        self._starts: Numbers = np.zeros(1, np.int64)
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
        _, ranks = self.look_up(self.rows((sequence,)), self.keys([key]))
        return tuple(ranks.tolist())

    def rows(self, sequences: tuple[str, ...]) -> Numbers:
        """The number of each sequence, below `num_rows`, until it is released; `NO_ROW` where nobody holds anything."""
        self._take_in()
        known = self._known.get(sequences)
        if known is None:
            known = np.fromiter(map(self._rows.get, sequences, repeat(NO_ROW)), np.int64)
        return known

    @property
    def num_rows(self) -> int:
        self._take_in()
        return len(self._rows) + len(self._free_rows)

    def keys(self, names: Iterable[str]) -> Numbers:
        """The number of each key; that of none where nobody ever held it."""
        self._take_in()
        return np.fromiter(map(self._keys.get, names, repeat(len(self._keys))), np.int64)

    def look_up(self, rows: Numbers, keys: Numbers) -> tuple[Numbers, Numbers]:
        """Of each key of a row, how many hold it; and their ranks, ascending, one after the other."""
        self._take_in()
        holdings, starts = self._holdings, self._starts
        cells = np.where(rows == NO_ROW, len(starts) - 2, rows * (len(self._keys) + 1) + keys)
        counts = starts[cells + 1] - starts[cells]
        return counts, holdings[spans(starts[cells], counts)] & _RANKS

    def release(self, sequences: Sequence[str]) -> dict[int, tuple[str, ...]]:
        """Forgets sequences; returns who has to forget which."""
        self._take_in()
        rows = np.fromiter(map(self._rows.pop, sequences), np.int64)
        self._known.clear()
        place = np.full(self.num_rows + len(rows), NO_ROW)
        place[rows] = np.arange(len(rows))
        holdings = self._holdings
        places = place[holdings >> _RANK_BITS + _KEY_BITS]
        self._holdings = holdings[places == NO_ROW]
        self._free_rows += rows.tolist()
        self._index()
        gone = places != NO_ROW
        pairs = distinct((holdings[gone] & _RANKS) * max(1, len(rows)) + places[gone])
        ranks, places = np.divmod(pairs, max(1, len(rows)))
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
        rows: dict[int, Numbers] = {}
        """By the identity of who is looked up."""
        alike: dict[tuple[str, ...], list[tuple[int, Numbers]]] = {}
        """Ranks and rows, by the keys that they hold."""
        for rank, samples in self._added:
            if id(samples.ids) not in rows:
                rows[id(samples.ids)] = self._numbered(samples.ids)
            alike.setdefault(tuple(samples.keys), []).append((rank, rows[id(samples.ids)]))
        parts = [self._holdings]
        for names, held in alike.items():
            for name in names:
                self._keys.setdefault(name, len(self._keys))
            keys = np.fromiter(map(self._keys.__getitem__, names), np.int64)
            ranks = np.repeat([rank for rank, _ in held], [len(each) for _, each in held])
            cells = np.concatenate([each for _, each in held])[:, None] << _KEY_BITS | keys
            parts.append((cells << _RANK_BITS | ranks[:, None]).ravel())
        assert len(self._keys) < 1 << _KEY_BITS, "there are fewer keys than that"
        self._added.clear()
        self._holdings = distinct(np.concatenate(parts))
        self._index()

    def _numbered(self, sequences: tuple[str, ...]) -> Numbers:
        """Rows of sequences that may be new."""
        if sequences not in self._known:
            for identity in sequences:
                if identity not in self._rows:
                    self._rows[identity] = self._free_rows.pop() if self._free_rows else len(self._rows)
            self._known[sequences] = np.fromiter(map(self._rows.__getitem__, sequences), np.int64)
        return self._known[sequences]

    def _index(self) -> None:
        """`_starts` says where the holdings of each cell begin, row by row; behind each row's keys is none's."""
        cells = self._holdings >> _RANK_BITS
        width = len(self._keys) + 1
        places = (cells >> _KEY_BITS) * width + (cells & (1 << _KEY_BITS) - 1)
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(places, minlength=self.num_rows * width + 1))])


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
