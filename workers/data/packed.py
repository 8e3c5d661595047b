"""Samples with their values: the twin of `api.batch.Samples`, with the same operations by the same names.

    samples   ids a, b; tokens: int64, lengths 3 and 2; scores: float32, lengths 1 and 1, trailing (2,)
    values    {"tokens": [5], "scores": [2, 2]}      each key's packed behind one another; None: absent, metadata only

What an operation returns may share memory with what it was asked of: values are never changed. Its metadata is what the
operation of the same name makes of the metadata alone, and whatever is made is checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...api.batch import KeyColumn, Samples, places_in
from ...api.errors import ConfigError

Positions = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedSamples:
    """Raises `ConfigError` naming key, value and rule if values are not as the metadata says."""

    samples: Samples
    values: Mapping[str, Tensor | None]
    """By key, `[sum(lengths), *trailing]`; None where the data is absent."""

    def __post_init__(self) -> None:
        if self.values.keys() != self.samples.keys.keys():
            raise ConfigError(
                "values",
                sorted(self.values),
                f"must have the keys of the metadata, which are {sorted(self.samples.keys)}",
                "give None for a key whose data is absent",
            )
        for key, value in self.values.items():
            if value is not None:
                _check(key, value, self.samples.keys[key])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: str) -> Tensor:
        """Values that must be there."""
        value = self.values[key]
        assert value is not None, f"the data of key {key} is absent"
        return value

    @property
    def present(self) -> tuple[str, ...]:
        """Keys whose data is there."""
        return tuple(key for key, value in self.values.items() if value is not None)

    @property
    def bytes_by_sample(self) -> npt.NDArray[np.int64]:
        """Of all keys whose data is there."""
        total = np.zeros(len(self), np.int64)
        for key in self.present:
            total += self.samples.keys[key].sizes * bytes_per_value(key, self.samples.keys[key])
        return total

    def select(self, positions: Positions) -> PackedSamples:
        """The samples at these positions, in this order."""
        values = {key: _select(value, self.samples.keys[key], positions) for key, value in self.values.items()}
        return PackedSamples(samples=self.samples.select(positions), values=values)

    def only(self, keys: Iterable[str]) -> PackedSamples:
        """With these of its keys."""
        chosen = tuple(keys)
        return PackedSamples(samples=self.samples.only(chosen), values={key: self.values[key] for key in chosen})

    def split(self, groups: Sequence[Sequence[int]]) -> list[PackedSamples]:
        """One part for each group of positions. `unsplit` undoes it."""
        return [self.select(group) for group in groups]

    @staticmethod
    def unsplit(parts: Sequence[PackedSamples], groups: Sequence[Sequence[int]]) -> PackedSamples:
        """The parts of a `split` by these groups, which hold every position once, back in the order before it."""
        return PackedSamples.gather(parts).select(places_in(groups))

    def unpack(self) -> list[PackedSamples]:
        """Each sample by itself."""
        return [self.select([at]) for at in range(len(self))]

    def by_sample(self, key: str) -> Sequence[Tensor]:
        """One key's values of each sample, `[size, *trailing]`."""
        return self[key].split(self.samples.keys[key].sizes.tolist())

    def update(self, more: PackedSamples) -> PackedSamples:
        """With the keys of `more` besides or in place of its own. `more` has the same samples, in any order."""
        samples = self.samples.update(more.samples)
        at = {identity: position for position, identity in enumerate(more.samples.ids)}
        ordered = more.select([at[identity] for identity in self.samples.ids])
        return PackedSamples(samples=samples, values={**self.values, **ordered.values})

    def remap(self, names: Mapping[str, str]) -> PackedSamples:
        """With keys renamed, all at once: `{"a": "b", "b": "a"}` swaps two. Keys that are not named stay."""
        values = {names.get(key, key): value for key, value in self.values.items()}
        return PackedSamples(samples=self.samples.remap(names), values=values)

    @staticmethod
    def gather(parts: Sequence[PackedSamples]) -> PackedSamples:
        """The parts one after the other. All have the same keys, of the same types; absent in all or in none."""
        values: dict[str, Tensor | None] = {}
        for key in parts[0].values:
            found = [value for part in parts if (value := part.values[key]) is not None]
            assert len(found) in (0, len(parts)), f"the data of key {key} is absent in some of the parts"
            values[key] = torch.cat(found) if found else None
        return PackedSamples(samples=Samples.gather([part.samples for part in parts]), values=values)


def dtype_of(key: str, column: KeyColumn) -> torch.dtype:
    """Raises `ConfigError` if this torch has no such type."""
    dtype = getattr(torch, column.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{key}.dtype", column.dtype, "must name a torch type", "write int64, bfloat16 or the like")
    return dtype


def bytes_per_value(key: str, column: KeyColumn) -> int:
    """Of one place of the token axis: all that trails behind it."""
    return dtype_of(key, column).itemsize * math.prod(column.trailing)


def _check(key: str, value: Tensor, column: KeyColumn) -> None:
    shape = (int(column.lengths.sum()), *column.trailing)
    if value.dtype != dtype_of(key, column) or value.shape != shape:
        raise ConfigError(
            f"values.{key}",
            f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}",
            f"must be {column.dtype} {list(shape)}, as the metadata says",
            "pack the key's sequences behind one another, in their own type",
        )


def _select(value: Tensor | None, column: KeyColumn, positions: Positions) -> Tensor | None:
    """A run of positions is a view."""
    if value is None:
        return None
    chosen, sizes = np.asarray(positions, np.int64), column.sizes
    if len(chosen) == 0:
        return value[:0]
    if (np.diff(chosen) == 1).all() and chosen[0] >= 0:
        start = int(sizes[: chosen[0]].sum())
        return value[start : start + int(sizes[chosen].sum())]
    parts = value.split(sizes.tolist())
    return torch.cat([parts[at] for at in chosen.tolist()])
