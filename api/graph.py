"""The dataflow graph: model function calls joined by the keys that they read and write.

Edges are never written down: a call depends on whoever produces a key it reads, and a key that no call produces must
come from the dataset. A `Graph` is valid once it is constructed.

    dataset --tokens, loss_mask--> train(model)
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from .algorithms import AlgorithmSettings
from .errors import ConfigError
from .functions import RewardFunction
from .record import record

if TYPE_CHECKING:
    import networkx

DATASET = "dataset"
"""The name of the graph's source: the node that produces the dataset's keys."""


class CallKind(StrEnum):
    """What a call does with its model."""

    GENERATE = "generate"
    INFERENCE = "inference"
    TRAIN_STEP = "train_step"


@record
class Microbatching:
    """How the sequences of one request are cut into pipeline slots."""

    max_tokens: PositiveInt
    """The most tokens in one microbatch (of a generation: the most that its responses may grow to)."""
    min_count: PositiveInt = 1
    """At least this many microbatches on each data-parallel rank, if there are enough sequences."""


@record
class ModelFunctionCall:
    """One node: a call of one model on a batch of sequences."""

    name: str
    """Unique in its graph."""
    model: str
    """The role of the model that is called."""
    kind: CallKind
    settings: AlgorithmSettings
    """The algorithm that the workers run, with its hyper-parameters."""
    inputs: tuple[str, ...]
    """Keys it reads; the first tells how long a sequence is."""
    outputs: tuple[str, ...] = ()
    """Keys it adds to each sequence."""
    batch_size: PositiveInt
    """Sequences a traversal."""
    minibatch_size: PositiveInt
    """Sequences a request; of a `train_step`: sequences an optimizer step."""
    passes: PositiveInt = 1
    """How often it goes over its batch; more than once only for a `train_step`."""
    microbatching: Microbatching


@record
class FunctionCall:
    """One node: a user's function on samples, in killable processes beside a worker."""

    name: str
    """Unique in its graph."""
    function: RewardFunction
    """What is called, and what becomes of its results."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch_size: PositiveInt
    """Sequences a traversal."""


Call = ModelFunctionCall | FunctionCall


class Graph:
    """Calls in dependency order.

    Raises `ConfigError` for a name or key with two producers, an input that nobody produces, or a cycle.
    """

    def __init__(
        self, name: str, calls: tuple[Call, ...], dataset_keys: tuple[str, ...], sequences_per_row: int = 1
    ) -> None:
        self.name, self.dataset_keys, self.sequences_per_row = name, dataset_keys, sequences_per_row
        self._producer: dict[str, str] = dict.fromkeys(dataset_keys, DATASET)
        self._call = {call.name: call for call in calls}
        if len(self._call) < len(calls):
            raise ConfigError(f"graph {name}", [call.name for call in calls], "call names must be unique", "rename one")
        if DATASET in self._call:
            raise ConfigError(
                f"graph {name}", DATASET, "a call cannot have the name of the graph's source", "rename it"
            )
        for call in calls:
            for key in call.outputs:
                if key in self._producer:
                    raise ConfigError(
                        f"graph {name}, call {call.name}, outputs",
                        key,
                        f"{self._producer[key]} produces this key already",
                        "rename one of the two keys",
                    )
                self._producer[key] = call.name
        for call in calls:
            for key in call.inputs:
                if key not in self._producer:
                    raise ConfigError(
                        f"graph {name}, call {call.name}, inputs",
                        key,
                        f"no call produces this key, and the dataset has only {', '.join(dataset_keys)}",
                        "add a call that produces it, or correct the name",
                    )
        self.calls = self._in_order()

    def _in_order(self) -> tuple[Call, ...]:
        import networkx

        try:
            order = list(networkx.lexicographical_topological_sort(self.edges))
        except networkx.NetworkXUnfeasible:
            cycle = " -> ".join(edge[0] for edge in networkx.find_cycle(self.edges))
            raise ConfigError(
                f"graph {self.name}", cycle, "calls must not form a cycle", "break it at one key"
            ) from None
        return tuple(self._call[name] for name in order if name != DATASET)

    @cached_property
    def edges(self) -> networkx.DiGraph[str]:
        """Producer to consumer, with the keys that pass along each edge as its attribute `keys`."""
        import networkx

        graph: networkx.DiGraph[str] = networkx.DiGraph()
        graph.add_node(DATASET)
        graph.add_nodes_from(self._call)
        for call in self._call.values():
            for key in call.inputs:
                producer = self._producer[key]
                if not graph.has_edge(producer, call.name):
                    graph.add_edge(producer, call.name, keys=())
                graph.edges[producer, call.name]["keys"] += (key,)
        return graph

    @property
    def batch_size(self) -> int:
        """Rows that one traversal takes from the dataset."""
        return max(call.batch_size for call in self.calls) // self.sequences_per_row

    @property
    def model_calls(self) -> tuple[ModelFunctionCall, ...]:
        return tuple(call for call in self.calls if isinstance(call, ModelFunctionCall))

    @property
    def function_calls(self) -> tuple[FunctionCall, ...]:
        return tuple(call for call in self.calls if isinstance(call, FunctionCall))

    def call(self, name: str) -> Call:
        """The call of this name."""
        return self._call[name]
