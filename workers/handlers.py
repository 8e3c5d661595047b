"""What each command and hook does on this worker."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import assert_never

from ..api.config import Dataset
from ..api.experiment_file import LoadedExperiment
from ..api.graph import CallKind
from ..system.rpc.commands import (
    CallDone,
    CallModel,
    Command,
    DatasetOpened,
    Done,
    Fetch,
    Fetched,
    HostStore,
    JoinGroups,
    LoadModel,
    ModelLoaded,
    OpenDataset,
    Redistribute,
    Release,
    Result,
    Save,
    ShardFile,
    StoreAddress,
    Transfer,
)
from ..system.rpc.messages import Welcome
from ..system.service.failpoints import failpoint
from .algorithms import INFERENCE, TRAINING
from .context import ShardGroups, WorkerContext
from .data.microbatch import Microbatch
from .data.source import Limits, SequenceSource
from .data.store import describe
from .data.tokenization import check_reload, load_tokenizer
from .data.transfer import redistribute
from .device import pick_device, set_threads
from .models.checkpoint import write_config, write_stage
from .models.configs import config_of, model_limits
from .parallel.groups import TCPStore, host_store
from .shard import ModelShard

logger = logging.getLogger(__name__)


class Handlers:
    """Holds the worker's shards and data sources, and executes commands on them."""

    def __init__(self, welcome: Welcome, loaded: LoadedExperiment, address: str) -> None:
        compiled = loaded.compiled
        self._context = WorkerContext(
            rank=welcome.rank,
            num_workers=welcome.num_workers,
            device=pick_device(welcome.rank, welcome.num_local_workers),
            compiled=compiled,
            name=f"{welcome.run}/{welcome.epoch}",
            address=address,
        )
        set_threads(compiled.run.threads, welcome.num_local_workers)
        self._shards: dict[str, ModelShard] = {}
        self._sources: dict[str, SequenceSource] = {}
        self._hosted_store: TCPStore | None = None

    def execute(self, command: Command) -> Result:
        match command:
            case HostStore():
                self._hosted_store, port = host_store(self._context.address)
                return StoreAddress(host=self._context.address, port=port)
            case JoinGroups():
                self._context.join_groups(command.store_host, command.store_port)
                return Done()
            case LoadModel():
                return self._load_model(command.model)
            case OpenDataset():
                return self._open_dataset(command.dataset)
            case Fetch():
                return self._fetch(command)
            case CallModel():
                return self._call_model(command)
            case Transfer():
                self.redistribute(command.redistribute)
                return Done()
            case Release():
                self._context.store.release(command.ids)
                return Done()
            case _:
                assert_never(command)

    def redistribute(self, hook: Redistribute) -> None:
        assert self._context.transfer is not None, "one worker alone has everything"
        redistribute(hook, self._context.store, self._context.transfer)

    def save(self, hook: Save) -> ShardFile:
        """Only the first replica writes; its first stage adds config and tokenizer."""
        failpoint("worker.save", self._context.rank)
        shard = self._shards[hook.model]
        if shard.place.dp != 0:
            return ShardFile()
        directory = Path(hook.directory)
        written = write_stage(shard.stage, directory)
        if shard.stage.is_first:
            write_config(shard.stage, directory)
            model = shard.placed.model
            load_tokenizer(model.tokenizer_path, f"{shard.placed.field}.tokenizer").save_pretrained(str(directory))
        return ShardFile(file=written.name, tensors=tuple(written.weight_map), size_bytes=written.total_size_bytes)

    def _load_model(self, role: str) -> ModelLoaded:
        failpoint("worker.load_model", self._context.rank)
        placed = self._context.compiled.models[role]
        groups = self._context.groups[role] if role in self._context.groups else ShardGroups()
        shard = ModelShard(placed, self._context, groups)
        self._shards[role] = shard
        return ModelLoaded(num_parameters=sum(parameter.numel() for parameter in shard.own_parameters()))

    def _open_dataset(self, name: str) -> DatasetOpened:
        compiled = self._context.compiled
        graph, dataset = compiled.graph, compiled.dataset
        if compiled.evaluation is not None and name == compiled.evaluation.dataset_field:
            graph, dataset = compiled.evaluation.graph, compiled.evaluation.dataset
        source = self._source(name, dataset, max_tokens=min(call.microbatching.max_tokens for call in graph.calls))
        self._sources[name] = source
        return DatasetOpened(
            num_sequences=len(source),
            num_tokens=int(source.lengths.sum()),
            longest=int(source.lengths.max()),
            longest_id=source.longest_id,
        )

    def _source(self, name: str, dataset: Dataset, max_tokens: int) -> SequenceSource:
        compiled = self._context.compiled
        vocabulary = sys.maxsize
        for placed in compiled.models.values():
            context, words = model_limits(placed.model)
            max_tokens, vocabulary = min(max_tokens, context), min(vocabulary, words)
        placed = next(iter(compiled.models.values()))
        tokenizer = load_tokenizer(placed.model.tokenizer_path, f"{placed.field}.tokenizer")
        check_reload(tokenizer, config_of(placed.model), f"{placed.field}.tokenizer")
        return SequenceSource(name, dataset, tokenizer, Limits(max_tokens, vocabulary), compiled.run.seed)

    def _fetch(self, command: Fetch) -> Fetched:
        sequences = self._sources[command.dataset].read(command.start, command.count)
        values = {
            "tokens": [sequence.tokens for sequence in sequences],
            "loss_mask": [sequence.loss_mask for sequence in sequences],
        }
        samples = describe(values, [sequence.id for sequence in sequences])
        for key, tensors in values.items():
            for sequence, tensor in zip(samples.ids, tensors, strict=True):
                self._context.store.put(sequence, key, tensor)
        return Fetched(samples=samples)

    def _call_model(self, command: CallModel) -> CallDone:
        failpoint(f"worker.{command.kind}", self._context.rank)
        shard = self._shards[command.model]
        match command.kind:
            case CallKind.TRAIN_STEP:
                training = TRAINING[command.algorithm]
                statistics = shard.train(training, self._microbatches(command, shard, training.last_stage_keys))
            case CallKind.INFERENCE:
                inference = INFERENCE[command.algorithm]
                microbatches = self._microbatches(command, shard, inference.last_stage_keys)
                statistics, _ = shard.infer(inference, microbatches)
            case _:
                assert_never(command.kind)
        return CallDone(statistics=statistics if shard.owns_outputs else {}, version=shard.version)

    def _microbatches(
        self, command: CallModel, shard: ModelShard, last_stage_keys: tuple[str, ...]
    ) -> list[Microbatch]:
        keys = last_stage_keys if shard.stage.is_last else ()
        store, device = self._context.store, self._context.device
        return [store.microbatch(samples, keys, device) for samples in command.microbatches]
