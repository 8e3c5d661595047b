"""Sample metadata: which samples there are, and the type and lengths of each of their keys. Never their values.

    sample   "gsm8k/0/17"                    "gsm8k/0/18"
    tokens   5 values                        7 values                     one sequence a sample
    choices  2 + 3 values                    4 values                     several: `counts` is (2, 1)

A sample's segments (a prompt, a model's turn, a tool's answer) are keys like others: `segment_lengths` and
`segment_sources` have one value a segment.

The values themselves are in the workers' stores; `workers.data.packed` is this module's twin there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any  # Any: what a caller gives as lengths, before it is checked

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, InstanceOf, NonNegativeInt

from .record import record, unchecked

Whole = npt.NDArray[np.int32]
MAX_LENGTH = int(np.iinfo(np.int32).max)


def _whole(values: Any) -> Whole:
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind != "i"):
        raise ValueError("must be a list of whole numbers")
    if found.size and not 0 <= found.min() <= found.max() <= MAX_LENGTH:
        raise ValueError(f"must lie between 0 and {MAX_LENGTH}")
    return found.astype(np.int32, copy=False)


Lengths = Annotated[InstanceOf[np.ndarray], BeforeValidator(_whole)]
"""int32, whatever whole numbers are given."""


@record
class KeyColumn:
    """One key of a run of samples: values are packed as `[sum(lengths), *trailing]`."""

    dtype: str
    """The torch name of the type, such as `int64`."""
    lengths: Lengths
    """Of the sequences, sample by sample. Zero is a length."""
    trailing: tuple[NonNegativeInt, ...] = ()
    """The shape behind the token axis."""
    counts: Lengths | None = None
    """How many of the sequences belong to each sample; None for one each."""

    def __post_init__(self) -> None:
        if self.counts is not None and int(self.counts.sum()) != len(self.lengths):
            raise ValueError(f"counts add up to {self.counts.sum()}, but there are {len(self.lengths)} lengths")

    def __len__(self) -> int:
        """Samples."""
        return len(self.lengths if self.counts is None else self.counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyColumn):
            return NotImplemented
        return (
            self.has_type_of(other)
            and np.array_equal(self.lengths, other.lengths)
            and np.array_equal(_counts(self), _counts(other))
        )

    __hash__ = None  # type: ignore[assignment]  # arrays can change

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Values of each sample, over all its sequences."""
        if self.counts is None:
            return self.lengths.astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        sizes: npt.NDArray[np.int64] = np.diff(ends[np.concatenate([[0], np.cumsum(self.counts)])])
        return sizes

    def has_type_of(self, other: KeyColumn) -> bool:
        return (self.dtype, self.trailing) == (other.dtype, other.trailing)

    def select(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> KeyColumn:
        """The samples at these positions, in this order."""
        chosen = np.asarray(positions, dtype=np.int64)
        if self.counts is None:
            return self._with(self.lengths[chosen])
        counts = self.counts[chosen]
        starts = (np.cumsum(self.counts) - self.counts)[chosen]
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._with(self.lengths[np.repeat(starts, counts) + within], counts)

    def cut(self, ends: Sequence[int]) -> list[KeyColumn]:
        """Parts, one after the other: where each ends. They share the memory of their lengths."""
        pairs = list(pairwise([0, *ends]))
        if self.counts is None:
            return [self._with(self.lengths[start:end]) for start, end in pairs]
        firsts = np.concatenate([[0], np.cumsum(self.counts)]).tolist()
        return [self._with(self.lengths[firsts[start] : firsts[end]], self.counts[start:end]) for start, end in pairs]

    @staticmethod
    def gather(columns: Sequence[KeyColumn]) -> KeyColumn:
        """One after the other. All are of one type."""
        first = columns[0]
        assert all(column.has_type_of(first) for column in columns), "columns of one key have one type"
        counts = None
        if any(column.counts is not None for column in columns):
            counts = np.concatenate([_counts(column) for column in columns])
        return first._with(np.concatenate([column.lengths for column in columns]), counts)

    def _with(self, lengths: Whole, counts: Whole | None = None) -> KeyColumn:
        """Of the same type."""
        return unchecked(KeyColumn, dtype=self.dtype, lengths=lengths, trailing=self.trailing, counts=counts)


def places_in(groups: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Where each position stands among the groups, one after the other, that hold every position once."""
    return np.argsort(np.concatenate([np.asarray(group, np.int64) for group in groups]), kind="stable")


def _counts(column: KeyColumn) -> Whole:
    return np.ones(len(column), np.int32) if column.counts is None else column.counts


@record
class Samples:
    """Samples in order, each with a unique id. All have the same keys."""

    ids: tuple[str, ...]
    keys: dict[str, KeyColumn]

    def __post_init__(self) -> None:
        for name, column in self.keys.items():
            if len(column) != len(self.ids):
                raise ValueError(f"key {name} has {len(column)} samples, but there are {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self, key: str) -> tuple[int, ...]:
        """Of the key's sequences."""
        return tuple(self.keys[key].lengths.tolist())

    def sizes(self, key: str) -> tuple[int, ...]:
        """Values of the key in each sample, over all its sequences."""
        return tuple(self.keys[key].sizes.tolist())

    def select(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order."""
        chosen = np.asarray(positions, dtype=np.int64)
        columns = {name: column.select(chosen) for name, column in self.keys.items()}
        return unchecked(Samples, ids=tuple(map(self.ids.__getitem__, chosen.tolist())), keys=columns)

    def only(self, keys: Iterable[str]) -> Samples:
        """With these of its keys."""
        return unchecked(Samples, ids=self.ids, keys={key: self.keys[key] for key in keys})

    def named_as(self, others: Samples) -> Samples:
        """With the very ids of others, if they are equal: one object of each is kept, and known again faster."""
        return unchecked(Samples, ids=others.ids, keys=self.keys) if self.ids == others.ids else self

    def split(self, groups: Sequence[Sequence[int]]) -> list[Samples]:
        """One part for each group of positions. `unsplit` undoes it."""
        return [self.select(group) for group in groups]

    def cut(self, sizes: Sequence[int]) -> list[Samples]:
        """Parts of these sizes, one after the other. They share the memory of their lengths."""
        ends = list(accumulate(sizes))
        assert ends[-1:] in ([], [len(self)]), f"parts of {sizes} samples are all of {len(self)}"
        columns = {name: column.cut(ends) for name, column in self.keys.items()}
        return [
            unchecked(Samples, ids=self.ids[start:end], keys={name: parts[at] for name, parts in columns.items()})
            for at, (start, end) in enumerate(pairwise([0, *ends]))
        ]

    @staticmethod
    def unsplit(parts: Sequence[Samples], groups: Sequence[Sequence[int]]) -> Samples:
        """The parts of a `split` by these groups, which hold every position once, back in the order before it."""
        return Samples.gather(parts).select(places_in(groups))

    def unpack(self) -> list[Samples]:
        """Each sample by itself."""
        return [self.select([at]) for at in range(len(self))]

    def update(self, more: Samples) -> Samples:
        """With the keys of `more` besides or in place of its own. `more` has the same samples, in any order."""
        at = {identity: position for position, identity in enumerate(more.ids)}
        assert len(more) == len(self), "keys are added to the same samples"
        assert at.keys() == set(self.ids), "keys are added to the same samples"
        return Samples(ids=self.ids, keys=self.keys | more.select([at[identity] for identity in self.ids]).keys)

    def remap(self, names: Mapping[str, str]) -> Samples:
        """With keys renamed, all at once: `{"a": "b", "b": "a"}` swaps two. Keys that are not named stay."""
        renamed = {names.get(key, key): column for key, column in self.keys.items()}
        assert len(renamed) == len(self.keys), f"two keys would have one name: {sorted(self.keys)} by {dict(names)}"
        return Samples(ids=self.ids, keys=renamed)

    @staticmethod
    def gather(parts: Sequence[Samples]) -> Samples:
        """The parts one after the other. All must have the same keys, of the same types."""
        first = parts[0]
        columns = {}
        for name, column in first.keys.items():
            assert all(name in part.keys and part.keys[name].has_type_of(column) for part in parts), (
                f"key {name} differs in type"
            )
            columns[name] = KeyColumn.gather([part.keys[name] for part in parts])
        return Samples(ids=tuple(identity for part in parts for identity in part.ids), keys=columns)
