"""What a worker is: its rank, its device, its experiment, its groups. Passed to whoever needs it, never global."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch

from ..api.config import Layout
from ..api.experiments.base import CompiledExperiment, PlacedModel
from .data.store import Store
from .memory import Room
from .parallel.groups import Group, form_group, join_store


@dataclass(frozen=True, slots=True)
class Place:
    """Where a shard stands in its model's layout."""

    layout: Layout
    first_rank: int
    dp: int
    """Index of the replica."""
    pp: int
    """Index of the pipeline rank."""

    @classmethod
    def of(cls, placed: PlacedModel, rank: int) -> Place:
        dp, pp = divmod(rank - placed.first_rank, placed.model.layout.pp)
        return cls(placed.model.layout, placed.first_rank, dp, pp)

    def rank(self, dp: int, pp: int) -> int:
        """The worker that is pipeline rank `pp` of replica `dp`."""
        return self.first_rank + dp * self.layout.pp + pp

    @property
    def stages(self) -> range:
        """Indices of the stages it holds, of `layout.num_stages`: chunk c of pipeline rank r is stage c * pp + r."""
        return range(self.pp, self.layout.num_stages, self.layout.pp)


@dataclass(frozen=True, slots=True)
class ShardGroups:
    """The groups of one shard; None where it would be alone."""

    pipe: Group | None = None
    """All workers of its replica, by pipeline rank: activations, and sums over stages."""
    gradients: Group | None = None
    """The same members: gradients have a channel of their own (NCCL knows no tags, and would wait crosswise)."""
    data: Group | None = None
    """Its stages in all replicas."""
    ends: Group | None = None
    """The workers with first and last stage of its replica, which share tied embeddings."""

    @property
    def all(self) -> tuple[Group | None, ...]:
        return self.pipe, self.gradients, self.data, self.ends


@dataclass(slots=True)
class WorkerContext:
    """One worker."""

    rank: int
    num_workers: int
    device: torch.device
    compiled: CompiledExperiment
    name: str
    """Of the run and epoch: the prefix of every group's name."""
    address: str
    """Of this worker, for other workers."""
    store: Store = field(default_factory=Store)
    groups: dict[str, ShardGroups] = field(default_factory=dict)
    """By model."""
    room: Room | None = None
    """For models, where it is known."""
    transfer: Group | None = None
    """All workers, for redistribution; None if there is one."""

    @property
    def deadline(self) -> timedelta:
        """For everything that waits for other workers inside a call."""
        return timedelta(seconds=self.compiled.run.deadlines.call_s)

    def leave_groups(self) -> None:
        """Leaves all groups: whatever waits for this worker in one of them fails."""
        mine = [self.transfer, *(group for groups in self.groups.values() for group in groups.all)]
        for group in mine:
            if group is not None:
                group.leave()

    def join_groups(self, host: str, port: int) -> None:
        """Forms this worker's groups. All workers do so at once, in the same order of groups."""
        store = join_store(host, port, timedelta(seconds=self.compiled.run.deadlines.setup_s))

        def join(name: str, members: list[int], device: torch.device) -> Group | None:
            if self.rank not in members or len(set(members)) < 2:
                return None
            full_name = f"{self.name}/{name}/{'-'.join(map(str, members))}"
            return form_group(store, full_name, members, self.rank, device, self.address, self.deadline)

        self.transfer = join("transfer", list(range(self.num_workers)), torch.device("cpu"))
        for role, placed in self.compiled.models.items():
            if self.rank not in placed.ranks:
                continue
            place, layout = Place.of(placed, self.rank), placed.model.layout
            pipe = [place.rank(place.dp, pp) for pp in range(layout.pp)]
            data = [place.rank(dp, place.pp) for dp in range(layout.dp)]
            self.groups[role] = ShardGroups(
                pipe=join(f"{role}/pipe", pipe, self.device),
                gradients=join(f"{role}/gradients", pipe, self.device),
                data=join(f"{role}/data", data, self.device),
                ends=join(f"{role}/ends", [pipe[0], pipe[-1]], self.device),
            )
