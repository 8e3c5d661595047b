"""The dataflow graph: model function calls joined by the keys that they read and write.

Edges are never written down: a call depends on whoever produces a key it reads, and a key that no call produces must
come from the dataset. A `Graph` is valid once it is constructed.

    dataset --tokens, loss_mask--> train(model)

A traversal takes `batch_size` rows of the dataset through all calls. A call that has a smaller `batch_size` of its own
fires several times in it, on the oldest sequences first. A call that changes a model, by training or by a hook, waits
in each traversal for the other calls of that model, unless they depend on it: all of a traversal is read by the same
weights.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from .algorithms import AlgorithmSettings
from .errors import ConfigError
from .functions import RewardFunction
from .hooks import ModelHook, Reshard
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
    """The most tokens in one microbatch.

    Of a generation: the KV cache of one open microbatch, in tokens, and thus how many sequences are in it at once, each
    with room for the longest prompt and response of the request. As many microbatches are open as there are pipeline
    ranks, so a worker never holds more keys and values than those of this many tokens in all layers of the model.
    Whoever has no room waits, and takes the place of the next that ends.
    """
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
    input_remap: dict[str, str] = field(default_factory=dict)
    """The algorithm's names of inputs that it knows under another than the graph's, by the graph's."""
    output_remap: dict[str, str] = field(default_factory=dict)
    """The graph's names of outputs that the algorithm knows under another, by the algorithm's."""
    pre_hooks: tuple[ModelHook, ...] = ()
    """What is done to models before each firing."""
    post_hooks: tuple[ModelHook, ...] = ()
    """And after it."""
    batch_size: PositiveInt
    """Sequences a firing; a traversal has as many as it takes to read all of its sequences."""
    minibatch_size: PositiveInt
    """Sequences a request; of a `train_step`: sequences an optimizer step."""
    passes: PositiveInt = 1
    """How often it goes over its batch; more than once only for a `train_step`."""
    microbatching: Microbatching

    def __post_init__(self) -> None:
        _check_remaps(self)


@record
class FunctionCall:
    """One node: a user's function on samples, in killable processes beside a worker."""

    name: str
    """Unique in its graph."""
    function: RewardFunction
    """What is called, and what becomes of its results."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_remap: dict[str, str] = field(default_factory=dict)
    """As of a model function call."""
    output_remap: dict[str, str] = field(default_factory=dict)
    """As of a model function call."""
    batch_size: PositiveInt
    """Sequences a firing; whole groups."""

    def __post_init__(self) -> None:
        _check_remaps(self)


Call = ModelFunctionCall | FunctionCall


def _check_remaps(call: Call) -> None:
    for what, remap, named, keys in (
        ("input_remap", call.input_remap, list(call.input_remap), call.inputs),
        ("output_remap", call.output_remap, list(call.output_remap.values()), call.outputs),
    ):
        unknown = [key for key in named if key not in keys]
        if unknown:
            raise ConfigError(
                f"call {call.name}, {what}",
                unknown[0],
                f"renames a key that is not among the call's keys ({', '.join(keys)})",
                "correct the name, or take it out",
            )
        others = [key for key in keys if key not in named]
        names = [*remap.values(), *others] if what == "input_remap" else [*remap, *others]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(
                f"call {call.name}, {what}", twice, "two keys would have this name for the algorithm", "rename one"
            )


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

        self._check_acyclic(self.edges, "calls must not form a cycle", "break it at one key")
        waits = self.edges.copy()
        waits.add_edges_from((other, name) for name in self._call for other in self.waits_for(name))
        rule = "a call that changes a model waits for the other calls of that model"
        self._check_acyclic(waits, rule, "give one of them a model of its own")
        order = networkx.lexicographical_topological_sort(waits)
        return tuple(self._call[name] for name in order if name != DATASET)

    def _check_acyclic(self, edges: networkx.DiGraph[str], rule: str, cure: str) -> None:
        import networkx

        if not networkx.is_directed_acyclic_graph(edges):
            cycle = " -> ".join(edge[0] for edge in networkx.find_cycle(edges))
            raise ConfigError(f"graph {self.name}", cycle, rule, cure)

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
    def num_sequences(self) -> int:
        """Of one traversal."""
        return self.batch_size * self.sequences_per_row

    @property
    def batch_size(self) -> int:
        """Rows that one traversal takes from the dataset."""
        return max(call.batch_size for call in self._call.values()) // self.sequences_per_row

    @property
    def model_calls(self) -> tuple[ModelFunctionCall, ...]:
        return tuple(call for call in self.calls if isinstance(call, ModelFunctionCall))

    @property
    def function_calls(self) -> tuple[FunctionCall, ...]:
        return tuple(call for call in self.calls if isinstance(call, FunctionCall))

    def call(self, name: str) -> Call:
        """The call of this name."""
        return self._call[name]

    @property
    def sources(self) -> tuple[Call, ...]:
        """Calls that read keys of the dataset only."""
        return tuple(call for call in self.calls if not self.parents(call.name))

    @property
    def sinks(self) -> tuple[Call, ...]:
        """Calls whose outputs no other reads."""
        return tuple(call for call in self.calls if not self.children(call.name))

    def parents(self, name: str) -> tuple[Call, ...]:
        """Calls that produce what this one reads."""
        producers = set(self.edges.predecessors(name))
        return tuple(call for call in self.calls if call.name in producers)

    def children(self, name: str) -> tuple[Call, ...]:
        """Calls that read what this one produces."""
        readers = set(self.edges.successors(name))
        return tuple(call for call in self.calls if call.name in readers)

    def descendants(self, name: str) -> frozenset[str]:
        """Names of all calls that depend on this one, however far down."""
        import networkx

        return frozenset(networkx.descendants(self.edges, name))

    def waits_for(self, name: str) -> frozenset[str]:
        """Names of calls that must be done with a traversal before this one may begin with it.

        Before a model changes, be it by training or by a hook: the others that call it, unless they depend on that.
        """
        changed, depending = _changes(self._call[name]), self.descendants(name)
        declared = list(self._call)
        waited = set()
        for other in self._call.values():
            is_later = bool(_changes(other)) and declared.index(other.name) > declared.index(name)
            if (
                isinstance(other, ModelFunctionCall)
                and other.model in changed
                and other.name not in {name, *depending}
                and (not is_later or name in self.descendants(other.name))
            ):
                waited.add(other.name)
        return frozenset(waited)


def _changes(call: Call) -> frozenset[str]:
    """Models whose weights are others afterwards."""
    if not isinstance(call, ModelFunctionCall):
        return frozenset()
    moved = {hook.target for hook in (*call.pre_hooks, *call.post_hooks) if isinstance(hook, Reshard)}
    return frozenset(moved | ({call.model} if call.kind is CallKind.TRAIN_STEP else set()))
