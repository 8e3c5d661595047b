"""A model's shard on this worker: its stages, their optimizer, its place, and how a call runs on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..api.config import NaNPolicy
from ..api.experiments.base import PlacedModel
from ..api.sampling import Sampling
from ..system.rpc.commands import Mean
from .algorithms.base import InferenceAlgorithm, TrainingAlgorithm
from .algorithms.statistics import Statistics
from .blending import blend
from .context import Place, ShardGroups, WorkerContext
from .data.microbatch import Microbatch
from .models.loading import init_stage, load_stage
from .models.stage import Stage
from .optimizer import clip, learning_rate, make_optimizer, move_state
from .parallel.gradients import all_reduce_gradients, squared_norm, sum_copies
from .pipeline import measured
from .pipeline.generation import Prompt, Response, Round, generate
from .pipeline.lowering import inference_program
from .pipeline.runner import Runner, Training
from .pipeline.timing import Clock
from .verdict import Losses


class ModelShard:
    """Owns weights and optimizer state. `version` counts the optimizer steps behind the weights.

    `stages` are in the order of the model; there are as many as the layout has chunks.
    Between calls they may be in the host's memory (`is_offloaded`); whatever uses them brings them back first.
    """

    def __init__(self, placed: PlacedModel, context: WorkerContext, groups: ShardGroups) -> None:
        self.placed, self.groups = placed, groups
        self.place = Place.of(placed, context.rank)
        self.device = context.device
        self._seed = context.compiled.run.seed
        self.stages = _make_stages(placed, self.place, context)
        self.version = 0
        self.is_offloaded = False
        self._optimizer: torch.optim.AdamW | None = None
        if placed.optimizer is not None:
            self._optimizer = make_optimizer(self._parameters(), placed.optimizer)
        self._runner = Runner(self.stages, groups.pipe, groups.gradients, context.device, torch.float32)

    @property
    def stage(self) -> Stage:
        """The last of its stages: that with the head, if any."""
        return self.stages[-1]

    @property
    def reads_tokens(self) -> bool:
        """Whether it has any use for token ids."""
        return any(stage.reads_tokens for stage in self.stages)

    @property
    def owns_outputs(self) -> bool:
        """Whether this is the data-parallel head: the last stage of the first replica."""
        return self.place.dp == 0 and self.stage.is_last

    def own_parameters(self) -> list[nn.Parameter]:
        """Parameters, less the copies of those that another stage of the replica owns."""
        copies = set()
        for stage in self.stages:
            if not stage.is_first:
                copies |= {id(parameter) for _, parameter in stage.replicated} | {id(stage.tied_embedding)}
        return [parameter for parameter in self._parameters() if id(parameter) not in copies]

    def train(
        self, algorithm: TrainingAlgorithm, microbatches: Sequence[Microbatch], timeline: Path | None = None
    ) -> dict[str, Mean]:
        """One optimizer step on this replica's share of a minibatch. Statistics are those of the whole minibatch.

        If a loss or the gradient norm is not finite, the optimizer's policy says whether no replica takes the step, or
        all raise: RunError where the microbatch is known, PeerLost elsewhere. The weights are as before in both cases.
        `timeline`: a file that gets a line with the times of all instructions.
        """
        assert self._optimizer is not None, "the graph trains models with an optimizer only"
        self.restore()
        statistics, losses = Statistics(self.device), Losses()
        weight = self._total_weight(algorithm, microbatches)
        norm: list[float | None] = []

        def loss(stage: Stage, hidden: Tensor, microbatch: Microbatch) -> Tensor:
            found = algorithm.loss(stage, hidden, microbatch, statistics) / weight
            losses.add(found, microbatch)
            return found

        self._optimizer.zero_grad(set_to_none=True)
        for stage in self.stages:
            stage.train()
        planned = self._planned(len(microbatches))
        clock = Clock(None if timeline is None else self.device)
        seed = f"{self._seed}/{self.placed.field}/{self.version}/{self.place.dp}"
        self._runner.run(
            planned.program,
            microbatches,
            loss,
            Training(seed=seed, reduce=self._reduce, step=lambda: norm.append(self._step(losses))),
            clock,
        )
        if timeline is not None:
            measured.write(timeline, planned, self.place.pp, clock.times)
        if norm[0] is None:
            self._optimizer.zero_grad(set_to_none=True)
            return {"skipped_steps": Mean(total=1, weight=1)}
        self.version += 1
        merged = statistics.merged(self.groups.data)
        merged["gradient_norm"] = Mean(total=norm[0], weight=1)
        merged["learning_rate"] = Mean(total=self._optimizer.param_groups[0]["lr"], weight=1)
        if self._on_nan_loss is NaNPolicy.SKIP:
            merged["skipped_steps"] = Mean(total=0, weight=1)
        return merged

    def infer(
        self, algorithm: InferenceAlgorithm, microbatches: Sequence[Microbatch]
    ) -> tuple[dict[str, Mean], list[dict[str, Tensor]]]:
        """Forward only. Returns statistics of all replicas and, on the last stage, new keys by microbatch."""
        self.restore()
        statistics = Statistics(self.device)
        outputs: list[dict[str, Tensor]] = []

        def score(stage: Stage, hidden: Tensor, microbatch: Microbatch) -> None:
            outputs.append(algorithm.infer(stage, hidden, microbatch, statistics))

        for stage in self.stages:
            stage.eval()
        program = inference_program(self.place.layout.pp, len(microbatches), self.place.layout.chunks)
        self._runner.run(program, microbatches, score)
        return statistics.merged(self.groups.data), outputs

    def generate(
        self,
        microbatches: Sequence[Sequence[Prompt]],
        sampling: Sampling,
        stop_ids: Sequence[int],
        limits: Round | None = None,
    ) -> list[Response]:
        """Responses to this replica's prompts, in their order; none but with the last stage."""
        self.restore()
        pipe, home, seed = self.groups.pipe, self.groups.gradients, self._seed
        responses = generate(self.stages, pipe, microbatches, sampling, stop_ids, seed, self.device, home, limits)
        return responses or []

    def move_towards(self, source: ModelShard, eta: float) -> None:
        """Weights become `eta * source + (1 - eta) * their own`, and the version the source's. It is not trained."""
        assert self._optimizer is None, "the state of an optimizer belongs to weights that it stepped itself"
        source.restore()
        self.restore()
        for given, changed in zip(source.stages, self.stages, strict=True):
            blend(given, changed, eta)
        self.version = source.version

    def offload(self) -> None:
        """Moves weights, gradients and optimizer state to the host's memory, until they are used again."""
        self._move(torch.device("cpu"))
        self.is_offloaded = True

    def restore(self) -> None:
        """Moves them back to where they are used, if they are offloaded."""
        if self.is_offloaded:
            self._move(self.device)
            self.is_offloaded = False

    def _move(self, device: torch.device) -> None:
        for stage in self.stages:
            stage.to(device)
        if self._optimizer is not None:
            move_state(self._optimizer, device)

    def _total_weight(self, algorithm: TrainingAlgorithm, microbatches: Sequence[Microbatch]) -> float:
        """Of the whole minibatch, over all replicas; with the last stage, where losses are."""
        if not self.stage.is_last:
            return 1.0
        total = torch.tensor(sum(map(algorithm.weight, microbatches)), dtype=torch.float64, device=self.device)
        if self.groups.data is not None:
            self.groups.data.all_reduce(total)
        return max(float(total), 1.0)

    def _planned(self, num_microbatches: int) -> measured.Planned:
        layout = self.place.layout
        return measured.Planned(
            model=self.placed.field,
            replica=self.place.dp,
            kind=layout.schedule.value,
            num_ranks=layout.pp,
            num_microbatches=num_microbatches,
            num_chunks=layout.chunks,
            recompute=layout.recompute,
        )

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for stage in self.stages for parameter in stage.parameters()]

    @property
    def _on_nan_loss(self) -> NaNPolicy:
        assert self.placed.optimizer is not None, "checked by train"
        return self.placed.optimizer.on_nan_loss

    def _reduce(self, index: int) -> None:
        """Sums a stage's gradients over replicas; after the last one, those of what several stages hold."""
        stage = self.stages[self.place.stages.index(index)]
        if self.groups.data is not None:
            all_reduce_gradients(list(stage.parameters()), self.groups.data)
        if stage is not self.stages[-1]:
            return
        tied = [[each.tied_embedding] for each in self.stages if each.tied_embedding is not None]
        if tied:
            sum_copies(tied, self.groups.ends)
        replicated = [[parameter for _, parameter in each.replicated] for each in self.stages]
        if replicated[0]:
            sum_copies(replicated, self.groups.pipe)

    def _step(self, losses: Losses) -> float | None:
        """Clips and steps; returns the gradient norm before clipping, over all stages. None: the step was skipped."""
        assert self._optimizer is not None, "checked by train"
        assert self.placed.optimizer is not None, "checked by train"
        squares = squared_norm(self.own_parameters()).to(self.device)
        norm, num_bad = losses.agree(squares, self.groups.data if self.stage.is_last else None, self.groups.pipe)
        if num_bad or not math.isfinite(norm):
            if self._on_nan_loss is NaNPolicy.STOP:
                losses.refuse(norm, num_bad, self.version + 1)
            return None
        clip(self._parameters(), norm, self.placed.optimizer.max_gradient_norm)
        rate = learning_rate(self.placed.optimizer, self.version + 1)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return norm


def _make_stages(placed: PlacedModel, place: Place, context: WorkerContext) -> tuple[Stage, ...]:
    model = placed.model
    if model.path is not None:
        make = partial(load_stage, model.path)
    else:
        make = partial(init_stage, model.config, context.compiled.run.seed)
    num_stages = model.layout.num_stages
    return tuple(make(index, num_stages, context.device, torch.float32) for index in place.stages)
