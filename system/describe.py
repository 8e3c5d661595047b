"""An experiment's graph as text."""

from __future__ import annotations

from collections.abc import Iterator

from ..api.experiments.base import CompiledExperiment
from ..api.graph import FunctionCall, Graph


def describe(compiled: CompiledExperiment) -> str:
    """Models with their workers, then each graph's calls in the order in which they can run."""
    lines = ["models"]
    for role, placed in compiled.models.items():
        layout = placed.model.layout
        source = placed.model.path or f"random {placed.model.config['model_type']}"
        trained = "trained" if placed.optimizer is not None else "frozen"
        lines.append(
            f"  {role}: {source}, {trained}, dp={layout.dp} pp={layout.pp} tp={layout.tp} sp={layout.sp}, "
            f"workers {placed.ranks.start}-{placed.ranks.stop - 1}"
        )
    for fed in compiled.graphs.values():
        lines += _graph_lines(fed.graph, str(fed.dataset.path))
    return "\n".join(lines)


def _graph_lines(graph: Graph, dataset: str) -> Iterator[str]:
    yield f"graph {graph.name}"
    yield f"  dataset {dataset} -> {', '.join(graph.dataset_keys)}"
    for call in graph.calls:
        inputs = [
            f"{', '.join(graph.edges.edges[producer, call.name]['keys'])} from {producer}"
            for producer in graph.edges.predecessors(call.name)
        ]
        outputs = f" -> {', '.join(call.outputs)}" if call.outputs else ""
        if isinstance(call, FunctionCall):
            what = f"function {call.function.reward.function}, batch {call.batch_size}"
        else:
            what = f"{call.kind} on {call.model}, batch {call.batch_size}, minibatch {call.minibatch_size}"
        yield f"  {call.name}: {what}, reads {'; '.join(inputs)}{outputs}"
