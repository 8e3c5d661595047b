"""A model's shard on this worker: a stage, its optimizer, its place, and how a call runs on it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..api.errors import RunError
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
from .parallel.gradients import all_reduce_gradients, squared_norm
from .pipeline.generation import Prompt, Response, generate
from .pipeline.lowering import inference_program, training_program
from .pipeline.runner import Runner


class ModelShard:
    """Owns weights and optimizer state. `version` counts the optimizer steps behind the weights.

    Between calls they may be in the host's memory (`is_offloaded`); whatever uses them brings them back first.
    """

    def __init__(self, placed: PlacedModel, context: WorkerContext, groups: ShardGroups) -> None:
        self.placed, self.groups = placed, groups
        self.place = Place.of(placed, context.rank)
        self.device = context.device
        self._seed = context.compiled.run.seed
        self.stage = _make_stage(placed, self.place, context)
        self.version = 0
        self.is_offloaded = False
        self._optimizer: torch.optim.AdamW | None = None
        if placed.optimizer is not None:
            self._optimizer = make_optimizer(list(self.stage.parameters()), placed.optimizer)
        self._runner = Runner(self.stage, groups.pipe, groups.gradients, context.device, torch.float32)

    @property
    def owns_outputs(self) -> bool:
        """Whether this is the data-parallel head: the last stage of the first replica."""
        return self.place.dp == 0 and self.stage.is_last

    def own_parameters(self) -> list[nn.Parameter]:
        """Parameters, less the copies of those that another stage of the replica owns."""
        copies = set()
        if not self.stage.is_first:
            copies = {id(parameter) for _, parameter in self.stage.replicated}
            copies.add(id(self.stage.tied_embedding))
        return [parameter for parameter in self.stage.parameters() if id(parameter) not in copies]

    def train(self, algorithm: TrainingAlgorithm, microbatches: Sequence[Microbatch]) -> dict[str, Mean]:
        """One optimizer step on this replica's share of a minibatch. Statistics are those of the whole minibatch."""
        assert self._optimizer is not None, "the graph trains models with an optimizer only"
        self.restore()
        statistics = Statistics(self.device)
        weight = self._total_weight(algorithm, microbatches)
        norm: list[float] = []

        def loss(stage: Stage, hidden: Tensor, microbatch: Microbatch) -> Tensor:
            return algorithm.loss(stage, hidden, microbatch, statistics) / weight

        self._optimizer.zero_grad(set_to_none=True)
        self.stage.train()
        self._seed_dropout()
        program = training_program(self.place.layout.pp, len(microbatches))
        self._runner.run(
            program.ranks[self.place.pp],
            microbatches,
            loss,
            reduce=self._reduce,
            step=lambda: norm.append(self._step()),
        )
        self.version += 1
        merged = statistics.merged(self.groups.data)
        merged["gradient_norm"] = Mean(total=norm[0], weight=1)
        merged["learning_rate"] = Mean(total=self._optimizer.param_groups[0]["lr"], weight=1)
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

        self.stage.eval()
        program = inference_program(self.place.layout.pp, len(microbatches))
        self._runner.run(program.ranks[self.place.pp], microbatches, score)
        return statistics.merged(self.groups.data), outputs

    def generate(
        self, microbatches: Sequence[Sequence[Prompt]], sampling: Sampling, stop_ids: Sequence[int]
    ) -> list[Response]:
        """Responses to this replica's prompts, in their order; none but on the last stage."""
        self.restore()
        groups, seed = self.groups, self._seed
        responses = generate(
            self.stage, groups.pipe, microbatches, sampling, stop_ids, seed, self.device, home=groups.gradients
        )
        return responses or []

    def move_towards(self, source: ModelShard, eta: float) -> None:
        """Weights become `eta * source + (1 - eta) * their own`, and the version the source's. It is not trained."""
        assert self._optimizer is None, "the state of an optimizer belongs to weights that it stepped itself"
        source.restore()
        self.restore()
        blend(source.stage, self.stage, eta)
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
        self.stage.to(device)
        if self._optimizer is not None:
            move_state(self._optimizer, device)

    def _total_weight(self, algorithm: TrainingAlgorithm, microbatches: Sequence[Microbatch]) -> float:
        """Of the whole minibatch, over all replicas; on the last stage, where losses are."""
        if not self.stage.is_last:
            return 1.0
        total = torch.tensor(sum(map(algorithm.weight, microbatches)), dtype=torch.float64, device=self.device)
        if self.groups.data is not None:
            self.groups.data.all_reduce(total)
        return max(float(total), 1.0)

    def _seed_dropout(self) -> None:
        """Of this optimizer step on this shard: dropout repeats in a run of the same seed and layout."""
        name = f"{self._seed}/{self.placed.field}/{self.version}/{self.place.dp}/{self.place.pp}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big"))

    def _reduce(self) -> None:
        if self.groups.data is not None:
            all_reduce_gradients(list(self.stage.parameters()), self.groups.data)
        if self.groups.ends is not None and self.stage.tied_embedding is not None:
            all_reduce_gradients([self.stage.tied_embedding], self.groups.ends)
        if self.groups.pipe is not None and self.stage.replicated:
            all_reduce_gradients([parameter for _, parameter in self.stage.replicated], self.groups.pipe)

    def _step(self) -> float:
        """Clips and steps; returns the gradient norm before clipping, over all stages."""
        assert self._optimizer is not None, "checked by train"
        assert self.placed.optimizer is not None, "checked by train"
        squares = squared_norm(self.own_parameters()).to(self.device)
        if self.groups.pipe is not None:
            self.groups.pipe.all_reduce(squares)
        norm = float(squares.sqrt())
        if not math.isfinite(norm):
            raise RunError(
                f"the gradient norm is {norm} at optimizer step {self.version + 1}; the weights are as before it. "
                "Lower the learning rate, or look for bad data in this step"
            )
        clip(list(self.stage.parameters()), norm, self.placed.optimizer.max_gradient_norm)
        rate = learning_rate(self.placed.optimizer, self.version + 1)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return norm


def _make_stage(placed: PlacedModel, place: Place, context: WorkerContext) -> Stage:
    model = placed.model
    if model.path is not None:
        make = partial(load_stage, model.path)
    else:
        make = partial(init_stage, model.config, context.compiled.run.seed)
    return make(place.pp, model.layout.pp, context.device, torch.float32)
