"""Supervised fine-tuning as one dataclass.

dataset --tokens, loss_mask--> train(model)
"""

from __future__ import annotations

from dataclasses import field

from pydantic import PositiveFloat, PositiveInt

from ..algorithms import SupervisedLoss
from ..config import Dataset, Model, Optimizer, RunOptions
from ..errors import ConfigError
from ..graph import CallKind, Graph, Microbatching, ModelFunctionCall
from ..record import record
from .base import CompiledExperiment, EvaluationPlan, PlacedModel, check_run

MODEL = "model"
KEYS = ("tokens", "loss_mask")


@record
class SFT:
    """Trains one model on answers, given their prompts.

    The loss of a minibatch is the mean, over all its answer tokens, of the cross-entropy of each given what precedes
    it in its sequence (see `workers/algorithms/sft.py`); it does not depend on the layout or on how the minibatch is
    cut into microbatches.
    """

    model: Model
    """What is trained."""
    dataset: Dataset
    """What it is trained on."""
    evaluation: Dataset | None = None
    """Held-out rows: the mean loss over all of them is reported as `evaluation/loss`."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How it is trained."""
    batch_size: PositiveInt = 32
    """Sequences a step (one traversal of the graph)."""
    minibatch_size: PositiveInt | None = None
    """Sequences an optimizer step; by default the whole batch. `batch_size` must be a multiple of it."""
    microbatch_tokens: PositiveInt = 4096
    """The most tokens in one pipeline slot. It bounds the memory of activations."""
    target_loss: PositiveFloat | None = None
    """End the run early, once `evaluation/loss` is at or below this: one more step is taken, and saved."""
    run: RunOptions = field(default_factory=lambda: RunOptions(name="sft"))
    """Name, length, seed, cadence."""

    def __post_init__(self) -> None:
        size, dp = self.resolved_minibatch_size, self.model.layout.dp
        if self.batch_size % size:
            raise ConfigError(
                "batch_size",
                self.batch_size,
                f"must be a multiple of minibatch_size ({size})",
                f"use for example {max(size, self.batch_size // size * size)}",
            )
        if size < dp:
            raise ConfigError(
                "minibatch_size", size, f"must be at least model.layout.dp ({dp})", "raise it, or lower model.layout.dp"
            )
        if self.target_loss is not None and self.run.evaluate_every is None:
            raise ConfigError(
                "target_loss",
                self.target_loss,
                "it is compared with evaluation/loss, which is not taken between steps",
                "set run.evaluate_every and give `evaluation` a dataset",
            )
        check_run(self.run, self.model.layout.num_workers, has_evaluation=self.evaluation is not None)

    @property
    def resolved_minibatch_size(self) -> int:
        return self.batch_size if self.minibatch_size is None else self.minibatch_size

    def compile(self) -> CompiledExperiment:
        """The graphs, models and datasets that the master runs."""
        microbatching = Microbatching(max_tokens=self.microbatch_tokens, min_count=self.model.layout.pp)
        train = ModelFunctionCall(
            name="train",
            model=MODEL,
            kind=CallKind.TRAIN_STEP,
            settings=SupervisedLoss(),
            inputs=KEYS,
            batch_size=self.batch_size,
            minibatch_size=self.resolved_minibatch_size,
            microbatching=microbatching,
        )
        evaluation = None
        if self.evaluation is not None:
            evaluate = ModelFunctionCall(
                name="evaluate",
                model=MODEL,
                kind=CallKind.INFERENCE,
                settings=SupervisedLoss(),
                inputs=KEYS,
                batch_size=self.batch_size,
                minibatch_size=self.batch_size,
                microbatching=microbatching,
            )
            evaluation = EvaluationPlan(
                graph=Graph("evaluation", (evaluate,), KEYS), dataset=self.evaluation, dataset_field="evaluation"
            )
        return CompiledExperiment(
            run=self.run,
            models={MODEL: PlacedModel(model=self.model, optimizer=self.optimizer, field="model")},
            graph=Graph("sft", (train,), KEYS),
            dataset=self.dataset,
            dataset_field="dataset",
            evaluation=evaluation,
            target_loss=self.target_loss,
        )
