"""The worker's store: values of keys of samples, on the CPU, until the master says that nobody reads them again.

    put      a value with memory of its own, which is freed as it is released
    add      packed samples, kept where they are: views of memory that they share

    shared memory [ a.tokens b.tokens c.tokens | a.mask b.mask c.mask ]     a is released: kept as it is
                                                                            b too: c moves out, and it is freed

Shared memory of which less than half is in use is freed. So the store keeps at most twice of what was not released, and
nothing once all is, unless somebody else holds it. (A copy of each value that arrives would cost as much as the wire.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...api.batch import KeyColumn, Samples
from ..models.attention import PackedBatch
from .microbatch import Microbatch
from .packed import PackedSamples, dtype_of


@dataclass(slots=True, eq=False)
class _Shared:
    """Memory that several samples share."""

    keys: frozenset[str]
    used: dict[str, int]
    """Bytes by sample, of those that were not released."""
    used_bytes: int
    total_bytes: int


class Store:
    """Used by the compute lane and the transfer lane at once. A value is never changed after it was put."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, Tensor]] = {}
        """By sample, then by key."""
        self._shared: dict[str, list[_Shared]] = {}
        """By sample."""
        self._lock = threading.Lock()

    def put(self, sequence: str, key: str, value: Tensor) -> None:
        """`value` is `[length, *trailing]`."""
        with self._lock:
            self._values.setdefault(sequence, {})[key] = value

    def put_all(self, sequences: Sequence[tuple[str, Mapping[str, Tensor]]]) -> Samples:
        """Keys of sequences, at least one, all with the same keys. Returns their metadata."""
        for sequence, values in sequences:
            for key, value in values.items():
                self.put(sequence, key, value)
        keys = sequences[0][1]
        return describe(
            {key: [values[key] for _, values in sequences] for key in keys}, [each for each, _ in sequences]
        )

    def add(self, parts: Sequence[PackedSamples]) -> None:
        """Everything that is there of these; the parts share memory."""
        used: dict[str, int] = {}
        values = []
        for part in parts:
            values += [(part.samples.ids, key, part.by_sample(key)) for key in part.present]
            for sequence, num_bytes in zip(part.samples.ids, part.bytes_by_sample.tolist(), strict=True):
                used[sequence] = used.get(sequence, 0) + num_bytes
        total_bytes = sum(used.values())
        shared = _Shared(frozenset(key for _, key, _ in values), used, total_bytes, total_bytes)
        with self._lock:
            for sequence in used:
                self._values.setdefault(sequence, {})
                self._shared.setdefault(sequence, []).append(shared)
            for ids, key, tensors in values:
                for sequence, tensor in zip(ids, tensors, strict=True):
                    self._values[sequence][key] = tensor

    def get(self, sequence: str, key: str) -> Tensor:
        with self._lock:
            return self._get(sequence, key)

    def release(self, sequences: Iterable[str]) -> None:
        """Forgets every key of these samples."""
        touched: set[_Shared] = set()
        with self._lock:
            for sequence in sequences:
                self._values.pop(sequence, None)
                for shared in self._shared.pop(sequence, ()):
                    shared.used_bytes -= shared.used.pop(sequence)
                    touched.add(shared)
            for shared in touched:
                if shared.used_bytes * 2 < shared.total_bytes:
                    self._move_out(shared)

    def __len__(self) -> int:
        """Values."""
        with self._lock:
            return sum(map(len, self._values.values()))

    def __contains__(self, address: tuple[str, str]) -> bool:
        """Whether there is a value, by sample and key."""
        sequence, key = address
        with self._lock:
            return key in self._values.get(sequence, {})

    def packed(self, samples: Samples, into: PackedSamples | None = None) -> PackedSamples:
        """All keys of these samples; `into` memory that is there, if it is given."""
        values: dict[str, Tensor | None] = {}
        for key, column in samples.keys.items():
            tensors = self._held(samples, key, column)
            if not tensors:
                values[key] = torch.empty(0, *column.trailing, dtype=dtype_of(key, column))
            else:
                values[key] = torch.cat(tensors) if into is None else torch.cat(tensors, out=into[key])
        return PackedSamples(samples=samples, values=values)

    def microbatch(
        self, samples: Samples, names: Iterable[str], device: torch.device, keys: Mapping[str, str] | None = None
    ) -> Microbatch:
        """These samples as a stage takes them, with what it knows by these names; tokens that are not named are zeros.

        `keys`: the store's key of each name; by default they are the same.
        """
        key_of = {name: name if keys is None else keys[name] for name in names}
        packed = self.packed(samples.only(key_of.values()))
        values = {name: packed[key].to(device) for name, key in key_of.items()}
        batch = PackedBatch(samples.lengths("tokens" if keys is None else keys["tokens"]), device)
        tokens = values.pop("tokens", torch.zeros(batch.num_tokens, dtype=torch.int64, device=device))
        return Microbatch(tokens=tokens[None], packed=batch, keys=values, ids=tuple(samples.ids))

    def _get(self, sequence: str, key: str) -> Tensor:
        held = self._values.get(sequence, {})
        assert key in held, f"the plan says that this worker holds {key} of {sequence}"
        return held[key]

    def _held(self, samples: Samples, key: str, column: KeyColumn) -> list[Tensor]:
        """One key of these samples, which must be as long and of the type that the metadata says."""
        with self._lock:
            tensors = [self._get(sequence, key) for sequence in samples.ids]
        shapes, dtype = [(size, *column.trailing) for size in column.sizes.tolist()], dtype_of(key, column)
        is_right = [tensor.shape for tensor in tensors] == shapes and {tensor.dtype for tensor in tensors} <= {dtype}
        assert is_right, _mismatch(samples.ids, key, column, tensors)
        return tensors

    def _move_out(self, shared: _Shared) -> None:
        """Gives what is left there memory of its own."""
        for sequence in shared.used:
            self._shared[sequence].remove(shared)
            held = self._values[sequence]
            for key in shared.keys & held.keys():
                held[key] = held[key].clone()
        shared.used.clear()


def _mismatch(ids: Sequence[str], key: str, column: KeyColumn, tensors: Sequence[Tensor]) -> str:
    """The first value that is not as the metadata says."""
    for sequence, tensor, size in zip(ids, tensors, column.sizes.tolist(), strict=True):
        shape, dtype = [size, *column.trailing], dtype_of(key, column)
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{key} of {sequence} is {tensor.dtype} {list(tensor.shape)}, but the plan says {dtype} {shape}"
    raise AssertionError("all are as the plan says")


def describe(values: dict[str, list[Tensor]], ids: Iterable[str]) -> Samples:
    """The metadata of sequences with these values, by key."""
    columns = {
        key: KeyColumn(
            dtype=str(tensors[0].dtype).removeprefix("torch."),
            lengths=np.asarray([len(tensor) for tensor in tensors], np.int32),
            trailing=tuple(tensors[0].shape[1:]),
        )
        for key, tensors in values.items()
    }
    return Samples(ids=tuple(ids), keys=columns)
