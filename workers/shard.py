"""A model's shard on this worker: its stages, their optimizer, its place, and how a call runs on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..api.config import NaNPolicy, Recompute
from ..api.experiments.base import PlacedModel
from ..api.sampling import Sampling
from ..system.rpc.commands import Mean
from .adapters import Adapters, is_adapter
from .algorithms.base import InferenceAlgorithm, TrainingAlgorithm
from .algorithms.statistics import Statistics
from .blending import blend
from .context import Place, ShardGroups, WorkerContext
from .data.microbatch import Microbatch
from .memory import Need
from .models import probe
from .models.configs import naming
from .models.loading import init_stage, load_stage
from .models.stage import Stage
from .optimizer import ShardOptimizer, clip
from .optimizer_state import read_state
from .parallel.gradients import all_reduce_gradients, squared_norm, sum_copies
from .pipeline import measured
from .pipeline.generation import Prompt, Response, Round, generate
from .pipeline.lowering import inference_program
from .pipeline.runner import Runner, Training
from .pipeline.timing import Clock
from .precision import round_to, type_of
from .recomputation import recompute_layers
from .recording import Record
from .trained import Trained, trained
from .verdict import Losses


class ModelShard:
    """Owns weights and optimizer state. `version` counts the optimizer steps behind the weights.

    `stages` are in the order of the model; there are as many as the layout has chunks.
    Between calls they may be in the host's memory (`is_offloaded`); whatever uses them brings them back first.
    `adapters`: its own, None without. `owner`: a shard here whose stages, as they begin, are this shard's: without its
    adapters, and with copies in place of the weights that it trains.
    """

    def __init__(
        self,
        placed: PlacedModel,
        context: WorkerContext,
        groups: ShardGroups,
        num_optimizer_steps: int = 0,
        owner: ModelShard | None = None,
    ) -> None:
        """`num_optimizer_steps`: of the whole run, over which its learning rate may fall. `owner` was not trained yet.

        Raises ModelError and ConfigError for a model that cannot be had (see `load_stage`), or has no room here.
        """
        self.placed, self.groups = placed, groups
        self.place = Place.of(placed, context.rank)
        self.device = context.device
        self._seed = context.compiled.run.seed
        self.owner, self.adapters = owner, None
        masters: dict[nn.Parameter, Tensor] = {}
        self._first: dict[nn.Parameter, Tensor] = {}
        """By parameter that the owner trains: what it was. The two change places while this shard computes."""
        if owner is None:
            with naming(placed.field):
                self.stages, masters, self.adapters = _make_stages(placed, self.place, context)
        else:
            self.stages, self._first = owner.stages, _first_values(placed, owner, context)
        self.version = 0
        self.is_offloaded = False
        self._averages: dict[Tensor, Tensor] = {}
        """Of weights of half precision that are moved towards others: see `blend`."""
        self.optimizer: ShardOptimizer | None = None
        if placed.optimizer is not None:
            self.optimizer = ShardOptimizer(
                [pair for stage in self.stages for pair in stage.model.named_parameters() if pair[1].requires_grad],
                placed.optimizer,
                num_optimizer_steps,
                masters,
            )
            if placed.optimizer.state is not None:
                self.version = read_state(self.stages, self.optimizer, placed.optimizer.state)
                self.optimizer.num_steps += self.version
        dtype = type_of(placed.model.dtype)
        self._runner = Runner(self.stages, groups.pipe, groups.gradients, context.device, dtype)

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
        named = [pair for stage in self.stages for pair in stage.own_parameters()]
        return [parameter for name, parameter in named if self.owner is None or not is_adapter(name)]

    def train(
        self,
        algorithm: TrainingAlgorithm,
        microbatches: Sequence[Microbatch],
        timeline: Path | None = None,
        record: Record | None = None,
    ) -> dict[str, Mean]:
        """One optimizer step on this replica's share of a minibatch. Statistics are those of the whole minibatch.

        If a loss or the gradient norm is not finite, the optimizer's policy says whether no replica takes the step, or
        all raise: RunError where the microbatch is known, PeerLost elsewhere. The weights are as before in both cases.
        `timeline`: a file that gets a line with the times of all instructions. `record`: takes down what becomes of the
        microbatches, without dropout.
        """
        assert self.optimizer is not None, "the graph trains models with an optimizer only"
        self.restore()
        statistics, losses = Statistics(self.device), Losses()
        weight = self._total_weight(algorithm, microbatches)
        steps: list[tuple[float, float] | None] = []

        def loss(stage: Stage, hidden: Tensor, microbatch: Microbatch) -> Tensor:
            if record is not None:
                record.saw(stage, hidden, microbatch)
            found = algorithm.loss(stage, hidden, microbatch, statistics) / weight
            losses.add(found, microbatch)
            return found

        self.optimizer.zero_grad()
        for stage in self.stages:
            stage.train(record is None)
        planned = self._planned(len(microbatches))
        clock = Clock(None if timeline is None else self.device)
        seed = f"{self._seed}/{self.placed.field}/{self.version}/{self.place.dp}"
        self._runner.run(
            planned.program,
            microbatches,
            loss,
            Training(seed=seed, reduce=self._reduce, step=lambda: steps.append(self._step(losses, record))),
            clock,
        )
        if timeline is not None:
            measured.write(timeline, planned, self.place.pp, clock.times)
        if steps[0] is None:
            self.optimizer.zero_grad()
            return {"skipped_steps": Mean(total=1, weight=1)}
        self.version += 1
        merged = statistics.merged(self.groups.data)
        for name, value in zip(("gradient_norm", "learning_rate"), steps[0], strict=True):
            merged[name] = Mean(total=value, weight=1)
        if self._on_nan_loss is NaNPolicy.SKIP:
            merged["skipped_steps"] = Mean(total=0, weight=1)
        if record is not None and self.owns_outputs:
            figures = {name: merged[name] for name in ("loss", "gradient_norm")}
            record.figures = {name: mean.total / (mean.weight or 1) for name, mean in figures.items()}
        return merged

    def infer(
        self, algorithm: InferenceAlgorithm, microbatches: Sequence[Microbatch], record: Record | None = None
    ) -> tuple[dict[str, Mean], list[dict[str, Tensor]]]:
        """Forward only. Returns statistics of all replicas and, on the last stage, new keys by microbatch.

        `record`: takes down what becomes of the microbatches.
        """
        self.restore()
        statistics = Statistics(self.device)
        outputs: list[dict[str, Tensor]] = []

        def score(stage: Stage, hidden: Tensor, microbatch: Microbatch) -> None:
            if record is not None:
                record.saw(stage, hidden, microbatch)
            outputs.append(algorithm.infer(stage, hidden, microbatch, statistics))

        for stage in self.stages:
            stage.eval()
        program = inference_program(self.place.layout.pp, len(microbatches), self.place.layout.chunks)
        with self._own_weights():
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
        with self._own_weights():
            responses = generate(self.stages, pipe, microbatches, sampling, stop_ids, seed, self.device, home, limits)
        return responses or []

    def move_towards(self, source: ModelShard, eta: float) -> None:
        """Weights become `eta * source + (1 - eta) * their own`, and the version the source's. It is not trained."""
        assert self.optimizer is None, "the state of an optimizer belongs to weights that it stepped itself"
        source.restore()
        self.restore()
        masters = {} if source.optimizer is None else source.optimizer.masters
        for given, changed in zip(source.stages, self.stages, strict=True):
            blend(given, changed, eta, masters, self._averages)
        self.version = source.version

    def offload(self) -> None:
        """Moves weights, gradients and optimizer state to the host's memory, until they are used again.

        What another shard owns stays where that has it.
        """
        self._move(torch.device("cpu"))
        self.is_offloaded = True

    def restore(self) -> None:
        """Moves them back to where they are used, if they are offloaded."""
        if self.owner is not None:
            self.owner.restore()
        if self.is_offloaded:
            self._move(self.device)
            self.is_offloaded = False

    def _move(self, device: torch.device) -> None:
        for stage in self.stages if self.owner is None else ():
            stage.to(device)
        self._first = {parameter: value.to(device) for parameter, value in self._first.items()}
        if self.optimizer is not None:
            self.optimizer.move(device)
        self._averages = {weight: average.to(device) for weight, average in self._averages.items()}

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
            recompute=layout.recompute is Recompute.STAGE,
        )

    @contextmanager
    def _own_weights(self) -> Iterator[None]:
        """Inside, the stages have this shard's weights, and not what their owner has learnt."""
        adapters = None if self.owner is None else self.owner.adapters
        with nullcontext() if adapters is None else adapters.off():
            self._change_places()
            try:
                yield
            finally:
                self._change_places()

    def _change_places(self) -> None:
        for parameter, value in self._first.items():
            parameter.data, self._first[parameter] = value, parameter.data

    @property
    def _on_nan_loss(self) -> NaNPolicy:
        assert self.placed.optimizer is not None, "checked by train"
        return self.placed.optimizer.on_nan_loss

    def _reduce(self, index: int) -> None:
        """Sums a stage's gradients over replicas; after the last one, those of what several stages hold."""
        stage = self.stages[self.place.stages.index(index)]
        if self.groups.data is not None:
            all_reduce_gradients(trained(stage.parameters()), self.groups.data)
        if stage is not self.stages[-1]:
            return
        tied = [trained([each.tied_embedding]) for each in self.stages if each.tied_embedding is not None]
        if any(tied):
            sum_copies(tied, self.groups.ends)
        replicated = [trained(parameter for _, parameter in each.replicated) for each in self.stages]
        if replicated[0]:
            sum_copies(replicated, self.groups.pipe)

    def _step(self, losses: Losses, record: Record | None) -> tuple[float, float] | None:
        """Clips and steps. Returns the gradient norm before clipping, over all stages, and the learning rate; None if
        the step was skipped."""
        assert self.optimizer is not None, "checked by train"
        assert self.placed.optimizer is not None, "checked by train"
        if record is not None:
            record.stepped(self.stages)
        squares = squared_norm(self.own_parameters()).to(self.device)
        norm, num_bad = losses.agree(squares, self.groups.data if self.stage.is_last else None, self.groups.pipe)
        if num_bad or not math.isfinite(norm):
            if self._on_nan_loss is NaNPolicy.STOP:
                losses.refuse(norm, num_bad, self.version + 1)
            return None
        clip(list(self.optimizer.masters), norm, self.placed.optimizer.max_gradient_norm)
        return norm, self.optimizer.step(self.version + 1)


def _first_values(placed: PlacedModel, owner: ModelShard, context: WorkerContext) -> dict[nn.Parameter, Tensor]:
    """Copies of those of the model's own weights that the owner trains. Raises ModelError if there is no room."""
    named = [pair for stage in owner.stages for pair in stage.model.named_parameters()]
    changing = [parameter for name, parameter in named if parameter.requires_grad and not is_adapter(name)]
    if changing and context.room is not None:
        num_copied = sum(parameter.numel() for parameter in changing)
        context.room.take(placed.field, Need.of(type_of(placed.model.dtype), num_copied, 0))
    return {parameter: parameter.detach().clone() for parameter in changing}


def _make_stages(
    placed: PlacedModel, place: Place, context: WorkerContext
) -> tuple[tuple[Stage, ...], dict[nn.Parameter, Tensor], Adapters | None]:
    """The stages of a place, float32 values of what is trained in another type, and the adapters of all stages."""
    model, dtype, seed = placed.model, type_of(placed.model.dtype), context.compiled.run.seed
    predicate = Trained(placed, seed)
    # float32 values are for masters, and for weights that are drawn: they are those of the float32 model, rounded
    keeps_masters = placed.optimizer is not None
    made_in = torch.float32 if model.path is None or (keeps_masters and model.lora is None) else dtype

    def admit(pruned: PreTrainedModel) -> None:
        if context.room is None:
            return
        need = predicate.need(pruned, dtype)
        rounded = 0 if made_in is dtype else need.num_trained  # beside their masters
        making = need.num_parameters * made_in.itemsize + rounded * dtype.itemsize
        context.room.take(placed.field, need, making)

    if model.path is not None:
        make = partial(load_stage, model.path, survey=predicate.survey, admit=admit)
    else:
        make = partial(init_stage, model.config, seed, survey=predicate.survey, admit=admit)
    stages: list[Stage] = []
    masters: dict[nn.Parameter, Tensor] = {}
    for index in place.stages:
        home = context.device if made_in is dtype else torch.device("cpu")
        stage = make(index, model.layout.num_stages, home, made_in)
        predicate.apply(stage)
        exact = {} if dtype is torch.float32 else round_to(stage, dtype, keeps_masters)
        stage.to(context.device)
        masters |= {parameter: value.to(context.device) for parameter, value in exact.items()}
        if made_in is not dtype:
            probe.check(stage)  # a model may run in one type, and not in the other
        recompute_layers(stage.cut.layers, model.layout.recompute)
        stages.append(stage)
    return tuple(stages), masters, predicate.adapters
