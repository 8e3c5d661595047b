"""A microbatch: packed sequences as a stage takes them. T is the number of tokens of all its sequences together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..models.attention import PackedBatch


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Sequences laid end to end in one row."""

    tokens: Tensor
    """`[1, T]`, int64."""
    packed: PackedBatch
    """Where each sequence starts and ends."""
    keys: dict[str, Tensor]
    """The other keys, each `[T, *trailing]`; on the stages that use them."""
    ids: tuple[str, ...] = ()
    """Of its sequences, for messages."""

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[1]
