"""How many steps a run takes, and after which of them it saves and evaluates. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..api.config import RunOptions
from ..api.errors import ConfigError
from ..api.graph import CallKind, Graph


@dataclass(frozen=True, slots=True)
class Cadence:
    """Steps count from 1."""

    num_steps: int
    save_every: int | None
    evaluate_every: int | None
    is_saved: bool = True
    """Whether anything is."""

    def saves_after(self, step: int) -> bool:
        """The last step is always saved."""
        is_due = step == self.num_steps or (self.save_every is not None and step % self.save_every == 0)
        return self.is_saved and is_due

    def evaluates_after(self, step: int) -> bool:
        """Step 0 is before the first; the last step is always evaluated."""
        return step in (0, self.num_steps) or (self.evaluate_every is not None and step % self.evaluate_every == 0)


def plan_cadence(run: RunOptions, num_sequences: int, batch_size: int) -> Cadence:
    """Turns passes into steps: whole batches only. Raises `ConfigError` if there is not one."""
    if run.steps is not None:
        num_steps = run.steps
    else:
        passes = 1.0 if run.passes is None else run.passes
        num_steps = int(passes * num_sequences / batch_size + 1e-9)
        if num_steps == 0:
            raise ConfigError(
                "batch_size",
                batch_size,
                f"{passes:g} passes over {num_sequences} sequences do not fill one batch",
                "lower batch_size, or raise run.passes",
            )
    return Cadence(num_steps=num_steps, save_every=run.save_every, evaluate_every=run.evaluate_every)


def optimizer_steps(graph: Graph, role: str) -> int:
    """Of this model in one traversal, if no sequence is dropped."""
    return sum(
        graph.num_sequences // call.batch_size * math.ceil(call.batch_size / call.minibatch_size) * call.passes
        for call in graph.model_calls
        if call.kind is CallKind.TRAIN_STEP and call.model == role
    )
