"""What every experiment compiles to: the form in which the master and the workers know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..config import Dataset, Model, Optimizer, RunOptions
from ..errors import ConfigError
from ..graph import Graph
from ..hooks import Reshard
from .validation import check_graph, check_models


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModel:
    """A model in its role, on the workers `first_rank ... first_rank + layout.num_workers - 1`."""

    model: Model
    field: str
    """The experiment's field that holds the model, for error messages."""
    optimizer: Optimizer | None = None
    """None: the model is never trained."""
    first_rank: int = 0

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.model.layout.num_workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedGraph:
    """A graph and the dataset that feeds it."""

    graph: Graph
    dataset: Dataset
    dataset_field: str
    """The experiment's field that holds the dataset, for error messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledExperiment:
    """An experiment as the master runs it. Raises `ConfigError` if its parts do not fit together."""

    run: RunOptions
    models: dict[str, PlacedModel]
    """By role."""
    training: FedGraph
    """Traversed once a step."""
    evaluations: tuple[FedGraph, ...] = ()
    """Each runs between steps, over the whole of its own dataset."""

    def __post_init__(self) -> None:
        check_models(self.models)
        for fed in (self.training, *self.evaluations):
            check_graph(fed.graph, self.models)

    @property
    def graphs(self) -> dict[str, FedGraph]:
        """By name."""
        return {fed.graph.name: fed for fed in (self.training, *self.evaluations)}

    def owner_of(self, role: str) -> str | None:
        """The model whose weights, as they begin, are this model's on each of its workers; None without.

        That is one that is trained in part or by LoRA, from the same base, in the same pieces on the same workers; it
        is listed before. This model then has copies of what the other trains, and the rest in the other's memory.
        """
        mine = self.models[role]
        calls = [call for fed in self.graphs.values() for call in fed.graph.model_calls]
        hooks = [hook for call in calls for hook in (*call.pre_hooks, *call.post_hooks)]
        is_moved = any(isinstance(hook, Reshard) and role in (hook.source, hook.target) for hook in hooks)
        if mine.optimizer is not None or mine.model.lora is not None or is_moved:
            return None
        for other, placed in self.models.items():
            if other == role:
                return None
            has_frozen = placed.model.lora is not None or placed.model.trainable
            if placed.optimizer is not None and has_frozen and _is_base(mine, placed):
                return other
        return None

    @property
    def num_workers(self) -> int:
        return max(placed.ranks.stop for placed in self.models.values())


def _is_base(mine: PlacedModel, trained: PlacedModel) -> bool:
    """Whether both have the same weights on each worker, before any training."""
    one, other = mine.model, trained.model
    same_weights = (one.path, one.config, one.dtype) == (other.path, other.config, other.dtype)
    return same_weights and mine.first_rank == trained.first_rank and one.layout.is_cut_like(other.layout)


def check_run(run: RunOptions, num_workers: int, has_evaluation: bool, has_reward: bool) -> None:
    """What every recipe asks of its run options. Raises `ConfigError`.

    `has_evaluation` and `has_reward`: whether anything is evaluated between steps, and whether by a reward.
    """
    if run.workers is not None and run.workers != num_workers:
        raise ConfigError(
            "run.workers",
            run.workers,
            f"the layouts ask for {num_workers} (dp * pp * tp * sp)",
            "leave run.workers out, or change the layout",
        )
    if run.evaluate_every is not None and not has_evaluation:
        raise ConfigError(
            "run.evaluate_every",
            run.evaluate_every,
            "there is nothing to evaluate on",
            "give `evaluation` a dataset, or leave run.evaluate_every out",
        )
    if run.target_reward is not None and (run.evaluate_every is None or not has_reward):
        raise ConfigError(
            "run.target_reward",
            run.target_reward,
            "it is compared with evaluation/reward, which nothing takes between steps",
            "set run.evaluate_every, and evaluate answers with a reward",
        )


class Experiment(Protocol):
    """What a recipe must offer: `SFT` is the pattern."""

    @property
    def run(self) -> RunOptions: ...

    def compile(self) -> CompiledExperiment: ...
