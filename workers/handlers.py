"""What each command and hook does on this worker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from ..api.experiment_file import LoadedExperiment
from ..api.experiments.base import FedGraph
from ..api.graph import CallKind, FunctionCall, Graph, ModelFunctionCall
from ..api.hub import directory_of
from ..system.rpc.commands import (
    CallDone,
    CallFunction,
    CallModel,
    Command,
    DatasetOpened,
    Done,
    Echo,
    Echoed,
    Fetch,
    Fetched,
    HostStore,
    JoinGroups,
    LoadModel,
    ModelLoaded,
    Offload,
    OpenDataset,
    OpenFunction,
    Redistribute,
    Release,
    Reshard,
    Result,
    Save,
    ShardFile,
    StoreAddress,
)
from ..system.rpc.messages import Welcome
from ..system.service.failpoints import failpoint
from . import recording
from .adapter_files import write_adapter_config, write_adapters
from .calls import call_model
from .context import ShardGroups, WorkerContext
from .data.source import SequenceSource
from .data.tokenization import check_reload, load_tokenizer
from .data.transfer import redistribute
from .device import pick_device, set_threads
from .functions.calls import FunctionRunner
from .limits import check_tokens, limits_of
from .memory import Room
from .models.checkpoint import write_config, write_stage
from .models.configs import config_of
from .optimizer_state import write_state
from .parallel.groups import TCPStore, host_store
from .pipeline import measured
from .recording import Record
from .shard import ModelShard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Handlers:
    """Holds the worker's shards and data sources, and executes commands on them."""

    def __init__(self, welcome: Welcome, loaded: LoadedExperiment, address: str) -> None:
        compiled = loaded.compiled
        device = pick_device(welcome.rank, welcome.num_local_workers)
        self._context = WorkerContext(
            rank=welcome.rank,
            num_workers=welcome.num_workers,
            device=device,
            room=Room.on(device, welcome.num_local_workers),
            compiled=compiled,
            name=f"{welcome.run}/{welcome.epoch}",
            address=address,
        )
        set_threads(compiled.run.threads, welcome.num_local_workers)
        self._directory = Path(welcome.log_directory).parent
        """Of the run."""
        self._is_recorded = welcome.is_recorded
        self._shards: dict[str, ModelShard] = {}
        self._file = loaded.file
        self._sources: dict[str, SequenceSource] = {}
        """By graph."""
        self._functions: dict[tuple[str, str], FunctionRunner] = {}
        """By graph and call."""
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        """By model."""
        self._hosted_store: TCPStore | None = None

    def execute(self, command: Command, step: int = 0) -> Result:
        match command:
            case Echo():
                return Echoed(text=command.text, content=command.content)
            case HostStore():
                self._hosted_store, port = host_store(self._context.address)
                return StoreAddress(host=self._context.address, port=port)
            case JoinGroups():
                self._context.join_groups(command.store_host, command.store_port)
                return Done()
            case LoadModel():
                return self._load_model(command)
            case OpenDataset():
                return self._open_dataset(command.graph)
            case OpenFunction():
                return self._open_function(command)
            case Fetch():
                return self._fetch(command)
            case CallFunction():
                return self._functions[command.graph, command.call].run(command.samples)
            case CallModel():
                return self._call_model(command, step)
            case Redistribute():
                assert self._context.transfer is not None, "one worker alone has everything"
                redistribute(command, self._context.store, self._context.transfer)
                return Done()
            case Release():
                self._context.store.release(command.ids)
                return Done()
            case _:
                assert_never(command)

    @property
    def num_stored(self) -> int:
        """Values that nobody has released."""
        return len(self._context.store)

    def abandon(self) -> None:
        """The epoch is over: whatever waits for this worker fails. Safe from any thread."""
        self._context.leave_groups()

    def close(self) -> None:
        """Leaves the epoch: groups, models, data, function processes."""
        self.abandon()
        for function in self._functions.values():
            function.close()
        self._shards.clear()
        self._hosted_store = None

    def save(self, hook: Save) -> list[ShardFile]:
        """Only the first replica writes, a file a stage; the worker with the first stage adds config and tokenizer.

        Of a model with adapters these alone are written.
        """
        failpoint("worker.save", self._context.rank)
        shard = self._shards[hook.model]
        if shard.place.dp != 0:
            return []
        shard.restore()
        directory = Path(hook.directory)
        if shard.adapters is None:
            files = [write_stage(stage, directory) for stage in shard.stages]
        else:
            masters = {} if shard.optimizer is None else shard.optimizer.masters
            files = [write_adapters(stage, masters, directory) for stage in shard.stages]
        if hook.with_optimizer and shard.optimizer is not None:
            files += [write_state(stage, shard.optimizer, shard.version, directory) for stage in shard.stages]
        if shard.stages[0].is_first:
            if shard.adapters is None:
                write_config(shard.stages[0], directory)
            else:
                write_adapter_config(shard.adapters, shard.placed.model.path, directory)
            self._tokenizer(hook.model).save_pretrained(str(directory))
        return files

    def reshard(self, hook: Reshard) -> None:
        """Both models are on the same workers; nothing happens on others."""
        if hook.target in self._shards:
            self._shards[hook.target].move_towards(self._shards[hook.source], hook.eta)

    def offload(self, hook: Offload) -> None:
        """Nothing happens on a worker without this model."""
        if hook.model in self._shards:
            self._shards[hook.model].offload()

    def _load_model(self, command: LoadModel) -> ModelLoaded:
        failpoint("worker.load_model", self._context.rank)
        role = command.model
        placed = self._context.compiled.models[role]
        groups = self._context.groups[role] if role in self._context.groups else ShardGroups()
        owner = self._context.compiled.owner_of(role)
        shared = None if owner is None else self._shards[owner]
        if shared is not None:
            message = "%s takes no memory: its weights are those of %s, without adapters"
            if shared.adapters is None:
                message = "%s takes memory for copies of what %s trains; all else is where that has it"
            logger.info(message, role, owner)
        shard = ModelShard(placed, self._context, groups, command.num_optimizer_steps, shared)
        self._shards[role] = shard
        num_parameters = sum(parameter.numel() for parameter in shard.own_parameters())
        used = () if shard.optimizer is None else shard.optimizer.groups_used
        return ModelLoaded(num_parameters=num_parameters, reads_tokens=shard.reads_tokens, groups_used=used)

    def _open_dataset(self, name: str) -> DatasetOpened:
        failpoint("worker.open_dataset", self._context.rank)
        source = self._source(self._context.compiled.graphs[name])
        self._sources[name] = source
        return DatasetOpened(
            num_sequences=len(source),
            num_tokens=int(source.lengths.sum()),
            longest=int(source.lengths.max()),
            longest_id=source.longest_id,
        )

    def _source(self, fed: FedGraph) -> SequenceSource:
        graph, models = fed.graph, self._context.compiled.models
        tokenizer = self._tokenizer_of(graph)
        check_tokens(graph, models, graph.model_calls[0].model, tokenizer)
        limits, seed = limits_of(graph, models), self._context.compiled.run.seed
        prompts_each = graph.sequences_per_row if "prompt" in graph.dataset_keys else None
        return SequenceSource(fed.dataset_field, fed.dataset, tokenizer, limits, seed, prompts_each)

    def _tokenizer_of(self, graph: Graph) -> PreTrainedTokenizerBase:
        """Of the graph's first model; all models of a graph read the same tokens (see `limits`)."""
        return self._tokenizer(graph.model_calls[0].model)

    def _tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        if role not in self._tokenizers:
            placed = self._context.compiled.models[role]
            tokenizer = load_tokenizer(directory_of(placed.model.tokenizer_path), f"{placed.field}.tokenizer")
            check_reload(tokenizer, config_of(placed.model, placed.field), f"{placed.field}.tokenizer")
            self._tokenizers[role] = tokenizer
        return self._tokenizers[role]

    def _open_function(self, command: OpenFunction) -> Done:
        graph = self._context.compiled.graphs[command.graph].graph
        call = graph.call(command.call)
        assert isinstance(call, FunctionCall), "the master opens function calls"
        self._functions[command.graph, command.call] = FunctionRunner(
            call, self._file, self._tokenizer_of(graph), self._sources[command.graph], self._context.store
        )
        return Done()

    def _fetch(self, command: Fetch) -> Fetched:
        sequences = self._sources[command.graph].read(command.start, command.count)
        return Fetched(samples=self._context.store.put_all([(sequence.id, sequence.keys) for sequence in sequences]))

    def _call_model(self, command: CallModel, step: int) -> CallDone:
        call = self._context.compiled.graphs[command.graph].graph.call(command.call)
        assert isinstance(call, ModelFunctionCall), "the master calls models by their calls"
        failpoint(f"worker.{call.kind}", self._context.rank)
        shard, store = self._shards[call.model], self._context.store
        share = command.samples.cut(command.sizes)
        timeline = None
        if step in self._context.compiled.run.timeline_steps:
            timeline = measured.path_of(self._directory, step, self._context.rank)
        path = recording.path_of(self._directory, call.name, self._context.rank)
        record = None
        if self._is_recorded and call.kind is not CallKind.GENERATE and not path.exists():
            record = Record(command.graph, call.name, shard.place.dp)
        done = call_model(call, share, shard, store, lambda: self._tokenizer(call.model), timeline, record)
        if record is not None:
            record.write(path)
        return done
