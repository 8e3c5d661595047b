"""What algorithms offer a shard. All are called on the last stage only, and keep nothing between calls.

Which keys they read and write, their settings in `api/algorithms.py` say.

Shapes: T tokens of a packed microbatch, H hidden size.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..data.microbatch import Microbatch
from ..models.stage import Stage
from .statistics import Statistics


class TrainingAlgorithm(Protocol):
    """For `train_step`: a minibatch's loss is `sum of losses / sum of weights`, over all microbatches and replicas."""

    def weight(self, microbatch: Microbatch) -> float:
        """What the microbatch counts for."""

    def loss(self, stage: Stage, hidden: Tensor, microbatch: Microbatch, statistics: Statistics) -> Tensor:
        """The summed loss of the microbatch, a scalar. `hidden` is `[1, T, H]`, after the model's last norm."""


class InferenceAlgorithm(Protocol):
    """For `inference`."""

    def infer(self, stage: Stage, hidden: Tensor, microbatch: Microbatch, statistics: Statistics) -> dict[str, Tensor]:
        """New keys of the microbatch's sequences, each `[T]`; none if only the statistics matter."""
