"""Group relative policy optimisation as one dataclass.

prompts --prompt--> generate(actor) --tokens, loss_mask--> reward ------------advantage-----------> train(actor)
                        |                \\--> reference(reference) --reference_log_probabilities---/
                        \\---------------------- log_probabilities --------------------------------/
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from ..algorithms import (
    KLEstimator,
    LogProbabilities,
    LossNormalisation,
    PolicyLoss,
)
from ..config import Dataset, Model, Optimizer, RunOptions
from ..errors import ConfigError
from ..functions import RewardFunction
from ..graph import Call, CallKind, FunctionCall, Graph, Microbatching, ModelFunctionCall
from ..hooks import Reshard
from ..record import record
from ..rewards import Reward
from ..sampling import Sampling
from .answers import PROMPT_KEYS, AnswerEvaluation, generate_call
from .base import CompiledExperiment, FedGraph, PlacedModel, check_run

ACTOR, REFERENCE = "actor", "reference"


@record
class GRPO:
    """Trains an actor on rewards of its own responses, compared within the group of responses to one prompt.

    The loss, its sources and its normalisation stand in `workers/algorithms/grpo.py`.
    """

    actor: Model
    """What is trained."""
    prompts: Dataset
    """What it is asked. Rows need the prompt's field (or the chat's); the reward sees the whole row."""
    reward: Reward
    """How a response is scored."""
    sampling: Sampling
    """How responses are drawn; the temperature is above 0."""
    reference: Model | None = None
    """Where the KL penalty pulls to; by default the actor's own start, laid out like it. Of an actor with `lora` that
    is its base, without adapters, and the weights of both are in memory once. Only with a `kl_coefficient`."""
    reference_apart: bool = False
    """Whether the reference has workers of its own; otherwise it shares the actor's. Only with a
    `kl_coefficient`."""
    reference_eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """After each step the reference moves towards the actor: `reference = reference_eta * actor + (1 - reference_eta) *
    reference` (TRL: `sync_ref_model`, `ref_model_mixup_alpha`). 0 leaves it where it is, 1 copies the actor. Only with
    a `kl_coefficient`, a reference laid out like the actor, and not with `reference_apart`."""
    evaluation: AnswerEvaluation | None = None
    """Held-out prompts that the actor answers: the mean reward is reported as `evaluation/reward`."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How the actor is trained."""
    batch_size: PositiveInt = 32
    """Prompts a step."""
    group_size: PositiveInt = 8
    """Responses to each prompt, at least 2: they are judged against each other."""
    minibatches: PositiveInt = 1
    """Optimizer steps that one pass over a step's responses takes. Divides `batch_size * group_size` into parts of at
    least a response for each replica."""
    passes: PositiveInt = 1
    """Passes over a step's responses."""
    clip_low: NonNegativeFloat = 0.2
    """The probability ratio is clipped below 1 by this much; itself below 1."""
    clip_high: NonNegativeFloat = 0.2
    """And above 1 by this much (DAPO: 0.28)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL penalty towards the reference; 0 needs no reference."""
    kl_estimator: KLEstimator = KLEstimator.K3
    """How the KL is estimated from one token."""
    loss_normalisation: LossNormalisation = LossNormalisation.TOKEN
    """Whether the loss is a mean over tokens or over responses."""
    normalise_by_std: bool = True
    """Whether advantages are divided by their group's standard deviation (Dr. GRPO, arXiv 2503.20783: False)."""
    drop_zero_variance: bool = False
    """Whether groups whose rewards are all alike leave the batch (DAPO's dynamic sampling, without drawing anew)."""
    microbatch_tokens: PositiveInt = 4096
    """The most tokens in one pipeline slot."""
    run: RunOptions = field(default_factory=lambda: RunOptions(name="grpo"))
    """Name, length, seed, cadence."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                "group_size", self.group_size, "a response is compared with others of its group", "raise it"
            )
        if self.sampling.temperature == 0:
            raise ConfigError(
                "sampling.temperature", 0.0, "greedy responses to one prompt are all the same", "use for example 1.0"
            )
        num_sequences, dp = self.batch_size * self.group_size, self.actor.layout.dp
        if num_sequences % self.minibatches or num_sequences // self.minibatches < dp:
            raise ConfigError(
                "minibatches",
                self.minibatches,
                f"must divide the {num_sequences} responses of a step (batch_size * group_size) into parts of at least "
                f"actor.layout.dp ({dp})",
                "lower it, or change batch_size",
            )
        if self.clip_low >= 1:
            raise ConfigError(
                "clip_low", self.clip_low, "a probability ratio is never negative", "use a value below 1, such as 0.2"
            )
        self._check_reference(num_sequences)
        has_evaluation = self.evaluation is not None
        check_run(self.run, self._num_workers, has_evaluation=has_evaluation, has_reward=has_evaluation)

    def _check_reference(self, num_sequences: int) -> None:
        if self.reference is not None and self.reference.layout.dp > num_sequences:
            raise ConfigError(
                "reference.layout.dp",
                self.reference.layout.dp,
                f"a step has only {num_sequences} responses (batch_size * group_size)",
                "lower it, or raise batch_size",
            )
        if self.reference is not None and self.kl_coefficient == 0:
            raise ConfigError(
                "reference",
                "a model",
                "nothing reads it while kl_coefficient is 0",
                "raise kl_coefficient, or leave it out",
            )
        for name, value in (("reference_apart", self.reference_apart), ("reference_eta", self.reference_eta)):
            if value and self.kl_coefficient == 0:
                raise ConfigError(
                    name, value, "there is no reference while kl_coefficient is 0", "raise it, or leave this out"
                )
        if self.reference_eta > 0 and self.actor.lora is not None:
            raise ConfigError(
                "reference_eta",
                self.reference_eta,
                "the reference is the base of the actor's adapters, which never changes",
                "leave it out, or train the actor without lora",
            )
        if self.reference_eta > 0 and self.reference_apart:
            raise ConfigError(
                "reference_eta",
                self.reference_eta,
                "this version moves a reference on the actor's workers only",
                "leave reference_apart out, or this",
            )
        if self.reference_eta > 0 and self.reference is not None and self.reference.layout != self.actor.layout:
            raise ConfigError(
                "reference_eta",
                self.reference_eta,
                "this version moves a reference of the actor's layout only",
                "make reference.layout and actor.layout equal, or leave this out",
            )

    @property
    def _reference(self) -> Model | None:
        base = replace(self.actor, trainable=(), lora=None)
        return (self.reference or base) if self.kl_coefficient > 0 else None

    @property
    def _num_workers(self) -> int:
        reference = self._reference
        others = reference.layout.num_workers if reference is not None else 0
        actors = self.actor.layout.num_workers
        return actors + others if self.reference_apart else max(actors, others)

    def compile(self) -> CompiledExperiment:
        """The graphs, models and datasets that the master runs."""
        models = {ACTOR: PlacedModel(model=self.actor, optimizer=self.optimizer, field="actor")}
        reference = self._reference
        if reference is not None:
            models[REFERENCE] = PlacedModel(
                model=reference,
                field="actor" if self.reference is None else "reference",
                first_rank=self.actor.layout.num_workers if self.reference_apart else 0,
            )
        evaluations: tuple[FedGraph, ...] = ()
        if self.evaluation is not None:
            evaluations = (self.evaluation.feed("evaluation", ACTOR, self.actor, self.microbatch_tokens),)
        return CompiledExperiment(
            run=self.run,
            models=models,
            training=FedGraph(graph=self._training_graph(), dataset=self.prompts, dataset_field="prompts"),
            evaluations=evaluations,
        )

    def _training_graph(self) -> Graph:
        num_sequences = self.batch_size * self.group_size
        function = RewardFunction(
            reward=self.reward, normalise_by_std=self.normalise_by_std, drop_zero_variance=self.drop_zero_variance
        )
        calls: list[Call] = [
            generate_call(ACTOR, self.actor, self.sampling, num_sequences, self.microbatch_tokens),
            FunctionCall(
                name="reward",
                function=function,
                inputs=function.reads,
                outputs=function.writes,
                batch_size=num_sequences,
            ),
            self._train_call(num_sequences),
        ]
        if self._reference is not None:
            calls.append(self._reference_call(self._reference, num_sequences))
        return Graph("grpo", tuple(calls), PROMPT_KEYS, sequences_per_row=self.group_size)

    def _reference_call(self, reference: Model, num_sequences: int) -> ModelFunctionCall:
        settings, key = LogProbabilities(temperature=self.sampling.temperature), "reference_log_probabilities"
        return ModelFunctionCall(
            name="reference",
            model=REFERENCE,
            kind=CallKind.INFERENCE,
            settings=settings,
            inputs=settings.reads,
            outputs=(key,),
            output_remap={"log_probabilities": key},
            batch_size=num_sequences,
            minibatch_size=num_sequences,
            microbatching=Microbatching(max_tokens=self.microbatch_tokens, min_count=reference.layout.pp),
        )

    def _train_call(self, num_sequences: int) -> ModelFunctionCall:
        settings = PolicyLoss(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_coefficient=self.kl_coefficient,
            kl_estimator=self.kl_estimator,
            normalisation=self.loss_normalisation,
            temperature=self.sampling.temperature,
        )
        return ModelFunctionCall(
            name="train",
            model=ACTOR,
            kind=CallKind.TRAIN_STEP,
            settings=settings,
            inputs=settings.reads,
            post_hooks=(Reshard(source=ACTOR, target=REFERENCE, eta=self.reference_eta),) if self.reference_eta else (),
            batch_size=num_sequences,
            minibatch_size=num_sequences // self.minibatches,
            passes=self.passes,
            microbatching=Microbatching(max_tokens=self.microbatch_tokens, min_count=self.actor.layout.pp),
        )
