"""Whether an optimizer step may be taken: losses and gradient norm are finite, on all workers of a model.

Looked at once a step, for on an accelerator each look waits for the work before it.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from ..api.errors import PeerLost, RunError
from .data.microbatch import Microbatch
from .parallel.groups import Group

_MOST_NAMED = 8
"""Sequences."""


class Losses:
    """Of one optimizer step, where they are: with the last stage. Empty on other workers."""

    def __init__(self) -> None:
        self._losses: list[tuple[Tensor, Microbatch]] = []

    def add(self, loss: Tensor, microbatch: Microbatch) -> None:
        """Of each microbatch, in their order."""
        self._losses.append((loss.detach(), microbatch))

    def agree(self, squares: Tensor, replicas: Group | None, pipe: Group | None) -> tuple[float, int]:
        """The gradient norm over all stages, and how many microbatches of all replicas have a loss that is not finite.

        `squares`: the sum of squares of this worker's gradients, a scalar. `replicas`: of those with the last stage.
        """
        bad = squares.new_zeros(())
        if self._losses:
            bad = (~torch.stack([loss for loss, _ in self._losses]).isfinite()).sum().to(squares)
        if replicas is not None:
            replicas.all_reduce(bad)
        both = torch.stack([squares, bad])
        if pipe is not None:
            pipe.all_reduce(both)
        total, num_bad = both.tolist()
        return math.sqrt(total), int(num_bad)

    def refuse(self, norm: float, num_bad: int, step: int) -> NoReturn:
        """Raises RunError where a bad loss is, or if none is anywhere; elsewhere PeerLost, for the cause is there."""
        rest = f"at optimizer step {step}; the weights are as before it"
        for index, (loss, microbatch) in enumerate(self._losses):
            if not loss.isfinite():
                named = ", ".join(microbatch.ids[:_MOST_NAMED]) or "unnamed"
                more = len(microbatch.ids) - _MOST_NAMED
                raise RunError(
                    f"the loss of microbatch {index} is {float(loss)} {rest}. Its sequences: {named}"
                    f"{f' and {more} more' if more > 0 else ''}. Look at them, lower the learning rate, or set "
                    "optimizer.on_nan_loss to skip"
                )
        if num_bad:
            raise PeerLost(f"{num_bad} microbatches have a loss that is not finite {rest}")
        raise RunError(
            f"the gradient norm is {norm} {rest}. Lower the learning rate, look for bad data in this step, or set "
            "optimizer.on_nan_loss to skip"
        )
