"""Supervised fine-tuning as one dataclass.

dataset --tokens, loss_mask--> train(model)
"""

from __future__ import annotations

from dataclasses import field

from pydantic import PositiveInt

from ..algorithms import SupervisedLoss
from ..config import Dataset, Model, Optimizer, RunOptions
from ..errors import ConfigError
from ..graph import CallKind, Graph, Microbatching, ModelFunctionCall
from ..record import record
from .answers import AnswerEvaluation
from .base import CompiledExperiment, FedGraph, PlacedModel, check_run

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
    answers: AnswerEvaluation | None = None
    """Held-out prompts that the model answers: the mean reward is reported as `evaluation/reward`."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How it is trained."""
    batch_size: PositiveInt = 32
    """Sequences a step (one traversal of the graph)."""
    minibatch_size: PositiveInt | None = None
    """Sequences an optimizer step; by default the whole batch. `batch_size` must be a multiple of it, and it needs a
    sequence for each replica."""
    microbatch_tokens: PositiveInt = 4096
    """The most tokens in one pipeline slot. It bounds the memory of activations."""
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
        check_run(
            self.run,
            self.model.layout.num_workers,
            has_evaluation=self.evaluation is not None or self.answers is not None,
            has_reward=self.answers is not None,
        )

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
        evaluations = []
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
            graph = Graph("evaluation", (evaluate,), KEYS)
            evaluations.append(FedGraph(graph=graph, dataset=self.evaluation, dataset_field="evaluation"))
        if self.answers is not None:
            evaluations.append(self.answers.feed("answers", MODEL, self.model, self.microbatch_tokens))
        return CompiledExperiment(
            run=self.run,
            models={MODEL: PlacedModel(model=self.model, optimizer=self.optimizer, field="model")},
            training=FedGraph(graph=Graph("sft", (train,), KEYS), dataset=self.dataset, dataset_field="dataset"),
            evaluations=tuple(evaluations),
        )
