"""Bringing workers up: ranks, process groups, models and datasets, in the order that they need each other."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from pathlib import Path

from ..api.errors import ConfigError
from ..api.experiment_file import LoadedExperiment
from ..api.experiments.base import FedGraph, PlacedModel
from .cadence import optimizer_steps
from .dispatch import settle
from .executor import DATA_RANK
from .rpc.commands import (
    Command,
    DatasetOpened,
    HostStore,
    JoinGroups,
    LoadModel,
    ModelLoaded,
    OpenDataset,
    OpenFunction,
    Result,
    StoreAddress,
)
from .rpc.messages import Register, Welcome
from .rpc.peer import Asked
from .rpc.server import Server
from .service.addresses import is_loopback

logger = logging.getLogger(__name__)


def check_groups(placed: PlacedModel, used: Container[int]) -> None:
    """Raises `ConfigError` for the first group of the optimizer that has no parameter. `used`: indices of all others.

    A worker cannot tell: its stages have a part of the model's parameters.
    """
    for index, group in enumerate(placed.optimizer.groups if placed.optimizer is not None else ()):
        if index not in used:
            raise ConfigError(
                f"optimizer.groups[{index}].parameters",
                group.parameters,
                f"none of {placed.field}'s parameters is in it: no name matches, or groups before it have them all",
                "correct it (names are those of the model's parameters in transformers), or take the group out",
            )


class Cluster:
    """The workers of one run, by rank."""

    def __init__(self, server: Server, loaded: LoadedExperiment, is_recorded: bool = False) -> None:
        """`is_recorded`: workers record the first of each call."""
        self.server, self._loaded, self._is_recorded = server, loaded, is_recorded
        self._run = loaded.compiled.run
        self.token_readers: dict[str, set[int]] = {}
        """By model, once it is loaded: ranks whose shards have a use for token ids."""

    async def assemble(self, log_directory: Path) -> list[Register]:
        """Waits for all workers, gives them their ranks, and has them form their process groups."""
        workers = await self.server.workers(self._run.deadlines.register_s)
        hosts = [worker.host for worker in workers]
        unreachable = [worker for worker in workers if is_loopback(worker.address)]
        if len(set(hosts)) > 1 and unreachable:
            raise ConfigError(
                "--advertise",
                unreachable[0].address,
                f"workers are on several hosts, and those elsewhere cannot reach {unreachable[0].host} at this address",
                f"start the worker on {unreachable[0].host} with --advertise and its address in your network",
            )

        installed = {", ".join(f"{name} {version}" for name, version in worker.versions.items()) for worker in workers}
        if len(installed) > 1:
            logger.warning("results may depend on who computes what: workers have %s", "; or ".join(sorted(installed)))

        def welcome(rank: int) -> Welcome:
            return Welcome(
                run=self.server.run,
                epoch=self.server.epoch,
                rank=rank,
                num_workers=len(workers),
                num_local_workers=hosts.count(hosts[rank]),
                overrides=self._loaded.overrides,
                experiment_digest=self._loaded.experiment_digest,
                log_directory=str(log_directory),
                log_json=self._run.log_json,
                is_recorded=self._is_recorded,
                orphan_s=self._run.deadlines.orphan_s,
                silence_s=self._run.deadlines.silence_s,
            )

        self.server.welcome(welcome)
        if len(workers) > 1:
            store = (await self._ask("open the store", {0: HostStore()}))[0]
            assert isinstance(store, StoreAddress), "HostStore is answered by StoreAddress"
            join = JoinGroups(store_host=store.host, store_port=store.port)
            await self._ask("form process groups", dict.fromkeys(range(len(workers)), join))
        return workers

    async def load_models(self, num_steps: int) -> dict[str, int]:
        """Has every worker load its shards, all at once. Returns the number of parameters by model.

        `num_steps`: of the run. Raises `ConfigError` for a group of an optimizer that none of the model's parameters
        are in.
        """
        models, graph = self._loaded.compiled.models, self._loaded.compiled.training.graph
        commands = {
            role: LoadModel(model=role, num_optimizer_steps=num_steps * optimizer_steps(graph, role)) for role in models
        }
        asked = [
            self._submit("load models", dict.fromkeys(placed.ranks, commands[role])) for role, placed in models.items()
        ]
        num_parameters = dict.fromkeys(models, 0)
        for (role, placed), answers in zip(models.items(), await settle(self.server, *asked), strict=True):
            groups_used: set[int] = set()
            for rank, answer in answers.items():
                loaded = answer.success.result
                assert isinstance(loaded, ModelLoaded), "LoadModel is answered by ModelLoaded"
                num_parameters[role] += loaded.num_parameters
                groups_used.update(loaded.groups_used)
                if loaded.reads_tokens:
                    self.token_readers.setdefault(role, set()).add(rank)
            check_groups(placed, groups_used)
        return {role: total // models[role].model.layout.dp for role, total in num_parameters.items()}

    async def open_dataset(self, fed: FedGraph) -> DatasetOpened:
        """Has the data worker read and check the dataset of a graph."""
        answers = await self._ask(f"open {fed.dataset_field}", {DATA_RANK: OpenDataset(graph=fed.graph.name)})
        opened = answers[DATA_RANK]
        assert isinstance(opened, DatasetOpened), "OpenDataset is answered by DatasetOpened"
        return opened

    async def open_functions(self) -> None:
        """Has the data worker start the processes of all function calls."""
        asked = [
            self._submit("start functions", {DATA_RANK: OpenFunction(graph=name, call=call.name)})
            for name, fed in self._loaded.compiled.graphs.items()
            for call in fed.graph.function_calls
        ]
        if asked:
            await settle(self.server, *asked)

    async def _ask(self, name: str, commands: Mapping[int, Command]) -> dict[int, Result]:
        """What each worker answers, by rank."""
        (answers,) = await settle(self.server, self._submit(name, commands))
        return {rank: answer.success.result for rank, answer in answers.items()}

    def _submit(self, name: str, commands: Mapping[int, Command]) -> Asked:
        return self.server.ask(commands, name=name, deadline_s=self._run.deadlines.setup_s)
