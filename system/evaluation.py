"""Evaluation: a graph of its own, run over the whole of its own dataset between two steps."""

from __future__ import annotations

from collections.abc import Container, Mapping

from ..api.errors import ConfigError
from ..api.experiments.base import CompiledExperiment, FedGraph
from .executor import Executor
from .rpc.commands import DatasetOpened, Example, Mean
from .rpc.server import Server
from .storage import Storage
from .stream import SampleStream
from .traversal import merge


class Evaluator:
    """Runs one evaluation as often as it is asked to."""

    def __init__(
        self,
        fed: FedGraph,
        opened: DatasetOpened,
        compiled: CompiledExperiment,
        server: Server,
        storage: Storage,
        token_readers: Mapping[str, Container[int]],
    ) -> None:
        """`token_readers`: see `Executor`."""
        self.examples: tuple[Example, ...] = ()
        """Of the last batch."""
        run = compiled.run.name
        self._executor = Executor(
            fed.graph,
            compiled,
            server,
            storage,
            where=lambda step: f"evaluation after step {step} of run {run}",
            token_readers=token_readers,
        )
        self._stream = SampleStream(server, storage, fed.graph.name, compiled.run.deadlines.call_s)
        replicas = max(compiled.models[call.model].model.layout.dp for call in fed.graph.model_calls)
        if opened.num_sequences < replicas:
            raise ConfigError(
                f"{fed.dataset_field}.path",
                str(fed.dataset.path),
                f"it has {opened.num_sequences} sequences, fewer than the layout's dp ({replicas})",
                "add rows, or lower dp",
            )
        self._counts = even_batches(opened.num_sequences, fed.graph.batch_size, replicas)

    async def run(self, step: int) -> dict[str, float]:
        """One pass, after this step. Returns `evaluation/NAME` of every statistic, weighted over all sequences."""
        totals: dict[str, Mean] = {}
        async with self._executor:
            for at, count in enumerate(self._counts):
                samples = await self._stream.take(step, count)
                if at + 1 < len(self._counts):
                    self._stream.prefetch(step, self._counts[at + 1])
                traversal = await self._executor.admit(step, samples)
                for statistics in traversal.statistics.values():
                    merge(totals, statistics)
                self.examples = traversal.examples
        return {f"evaluation/{name}": mean.total / mean.weight for name, mean in totals.items() if mean.weight}


def even_batches(num_sequences: int, batch_size: int, replicas: int) -> list[int]:
    """Sizes of batches that cover all sequences: about `batch_size` each, differing by one, none below `replicas`."""
    num_batches = min(-(-num_sequences // batch_size), num_sequences // replicas)
    size, larger = divmod(num_sequences, num_batches)
    return [size + (at < larger) for at in range(num_batches)]
