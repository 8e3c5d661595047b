"""What an algorithm offers a shard: the sum of its loss over a microbatch, and how that sum is normalised."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..data.microbatch import Microbatch
from ..models.stage import Stage


class Algorithm(Protocol):
    """Stateless. Called on the last stage only."""

    @property
    def last_stage_keys(self) -> tuple[str, ...]:
        """Keys that it reads there, besides `tokens`."""

    def weight(self, microbatch: Microbatch) -> float:
        """What the microbatch counts for; a minibatch's loss is `sum of losses / sum of weights`."""

    def loss(self, stage: Stage, hidden: Tensor, microbatch: Microbatch) -> Tensor:
        """The summed loss of the microbatch, a scalar. `hidden` is `[1, T, H]`, after the model's last norm."""
