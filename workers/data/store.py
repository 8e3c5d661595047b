"""The worker's store: values of keys of sequences, on the CPU, until the master says that nobody reads them again."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ...api.batch import KeyColumn, Samples
from ..models.attention import PackedBatch
from .microbatch import Microbatch


class Store:
    """Used by the compute lane and the transfer lane at once. A value is never changed after it was put."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], Tensor] = {}
        self._lock = threading.Lock()

    def put(self, sequence: str, key: str, value: Tensor) -> None:
        """`value` is `[length, *trailing]`."""
        with self._lock:
            self._values[sequence, key] = value

    def get(self, sequence: str, key: str) -> Tensor:
        with self._lock:
            assert (sequence, key) in self._values, f"the plan says that this worker holds {key} of {sequence}"
            return self._values[sequence, key]

    def release(self, sequences: Iterable[str]) -> None:
        """Forgets every key of these sequences."""
        gone = set(sequences)
        with self._lock:
            for address in [address for address in self._values if address[0] in gone]:
                del self._values[address]

    def __len__(self) -> int:
        return len(self._values)

    def packed(self, samples: Samples, key: str) -> Tensor:
        """One key of all these sequences: `[sum(lengths), *trailing]`."""
        return torch.cat([self.get(sequence, key) for sequence in samples.ids])

    def microbatch(self, samples: Samples, keys: Iterable[str], device: torch.device) -> Microbatch:
        """These sequences as a stage takes them, with these keys besides `tokens`."""
        return Microbatch(
            tokens=self.packed(samples, "tokens")[None].to(device),
            packed=PackedBatch(samples.lengths("tokens"), device),
            keys={key: self.packed(samples, key).to(device) for key in keys},
        )


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
