"""Who holds which key of which sequence. Pure bookkeeping in the master; the values are in the workers' stores.

A holding is a number, and all of them are one sorted array; what was added after a look is sorted in at the next.

    | 31 bits: the sequence's row | 12 bits: the key | 20 bits: the rank |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

from ..api.batch import Samples

Numbers = npt.NDArray[np.int64]
AnyNumbers = npt.NDArray[np.int64] | npt.NDArray[np.int32]
_RANK_BITS, _KEY_BITS = 20, 12
_RANKS = (1 << _RANK_BITS) - 1
NO_ROW = -1


class Storage:
    """Holders by sequence and key. What it answers does not depend on the order in which they came to hold it."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._free_rows: list[int] = []
        self._keys: dict[str, int] = {}
        self._holdings: Numbers = np.zeros(0, np.int64)
        self._starts: Numbers = np.zeros(1, np.int64)
        self._added: list[Numbers] = []
        self._last: tuple[tuple[str, ...], Numbers] = (), np.zeros(0, np.int64)
        """Sequences that were added last, and their rows: workers of a replica come to hold the same."""
        self.num_ranks = 0
        """Above every rank that holds something, or held it once."""

    def add(self, rank: int, samples: Samples) -> None:
        """This worker holds every key of these samples from now on."""
        assert 0 <= rank <= _RANKS, f"rank {rank} is between 0 and {_RANKS}"
        if samples.ids is not self._last[0]:
            for identity in samples.ids:
                if identity not in self._rows:
                    self._rows[identity] = self._free_rows.pop() if self._free_rows else len(self._rows)
            self._last = samples.ids, self.rows(samples.ids)
        for key in samples.keys:
            self._keys.setdefault(key, len(self._keys))
        assert len(self._keys) < 1 << _KEY_BITS, "there are fewer keys than that"
        self.num_ranks = max(self.num_ranks, rank + 1)
        keys = np.fromiter((self._keys[key] for key in samples.keys), np.int64)
        self._added.append((_cells(self._last[1][:, None], keys) << _RANK_BITS | rank).ravel())

    def holders(self, sequence: str, key: str) -> tuple[int, ...]:
        """In ascending order."""
        _, ranks = self.look_up(self.rows([sequence]), self.keys([key]))
        return tuple(ranks.tolist())

    def rows(self, sequences: Iterable[str]) -> Numbers:
        """The number of each sequence, below `num_rows`, until it is released; `NO_ROW` where nobody holds anything."""
        return np.fromiter(map(self._rows.get, sequences, repeat(NO_ROW)), np.int64)

    @property
    def num_rows(self) -> int:
        return len(self._rows) + len(self._free_rows)

    def keys(self, names: Iterable[str]) -> Numbers:
        """The number of each key; that of none where nobody ever held it."""
        return np.fromiter(map(self._keys.get, names, repeat(len(self._keys))), np.int64)

    def look_up(self, rows: Numbers, keys: Numbers) -> tuple[Numbers, Numbers]:
        """Of each key of a row, how many hold it; and their ranks, ascending, one after the other."""
        holdings, starts = self._sorted(), self._starts
        cells = np.where(rows == NO_ROW, len(starts) - 2, rows * (len(self._keys) + 1) + keys)
        counts = starts[cells + 1] - starts[cells]
        return counts, holdings[spans(starts[cells], counts)] & _RANKS

    def release(self, sequences: Sequence[str]) -> dict[int, tuple[str, ...]]:
        """Forgets sequences; returns who has to forget which."""
        rows = np.fromiter(map(self._rows.pop, sequences), np.int64)
        place = np.full(self.num_rows + len(rows), NO_ROW)
        place[rows] = np.arange(len(rows))
        holdings = self._sorted()
        places = place[holdings >> _RANK_BITS + _KEY_BITS]
        self._holdings = holdings[places == NO_ROW]
        self._free_rows += rows.tolist()
        self._index()
        gone = places != NO_ROW
        pairs = np.unique((holdings[gone] & _RANKS) * max(1, len(rows)) + places[gone])
        self._last = (), rows[:0]
        ranks, places = np.divmod(pairs, max(1, len(rows)))
        first = np.flatnonzero(np.diff(ranks, prepend=-1))
        names = np.array(sequences, dtype=object)[places]
        of_ranks = np.split(names, first[1:])
        return {rank: tuple(ids.tolist()) for rank, ids in zip(ranks[first].tolist(), of_ranks, strict=False)}

    def __len__(self) -> int:
        return len(self._rows)

    def _sorted(self) -> Numbers:
        """All holdings. `_starts` says where those of each cell begin, row by row; behind each row's keys is none's."""
        if self._added:
            everything = np.sort(np.concatenate([self._holdings, *self._added]))
            self._holdings = everything[np.diff(everything, prepend=-1) != 0]
            self._added.clear()
            self._index()
        return self._holdings

    def _index(self) -> None:
        cells = self._holdings >> _RANK_BITS
        width = len(self._keys) + 1
        places = (cells >> _KEY_BITS) * width + (cells & (1 << _KEY_BITS) - 1)
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(places, minlength=self.num_rows * width + 1))])


def spans(starts: AnyNumbers, counts: AnyNumbers) -> Numbers:
    """`start ... start + count - 1` of each, one after the other."""
    before: Numbers = starts - np.cumsum(counts, dtype=np.int64) + counts
    return np.arange(counts.sum(), dtype=np.int64) + np.repeat(before, counts)


def _cells(rows: Numbers, keys: Numbers) -> Numbers:
    return rows << _KEY_BITS | keys
