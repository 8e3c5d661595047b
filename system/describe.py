"""An experiment's models and graphs as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..api.config import Layout, Model, Recompute
from ..api.experiments.base import CompiledExperiment
from ..api.graph import CallKind, FunctionCall, Graph

Foretell = Callable[[Layout, int], str]
"""What the verifier says of training this many microbatches in a layout; empty where there is nothing to say. Whoever
composes a service gives it: pipelines belong to the workers."""


def schedule_of(layout: Layout) -> str:
    """How a model is trained in its layout."""
    chunks = f", {layout.chunks} chunks" if layout.chunks > 1 else ""
    again = "" if layout.recompute is Recompute.NONE else f", recompute {layout.recompute}"
    return f"schedule {layout.schedule}{chunks}{again}"


def _trained(model: Model) -> str:
    """What of a model is trained."""
    if model.lora is not None:
        return f"trained by LoRA (r={model.lora.r})"
    return "trained in part" if model.trainable else "trained"


def describe(compiled: CompiledExperiment, foretell: Foretell | None = None) -> str:
    """Models with their workers, then each graph's calls in the order in which they can run. With `foretell`, what is
    known of a training's pipeline with as few microbatches as its call allows."""
    lines = ["models"]
    for role, placed in compiled.models.items():
        layout = placed.model.layout
        source = placed.model.path or f"random {placed.model.config['model_type']}"
        trained = f"{_trained(placed.model)}, {schedule_of(layout)}"
        if placed.optimizer is None:
            owner = compiled.owner_of(role)
            trained = "frozen" if owner is None else f"frozen, in the memory of {owner}"
            if owner is not None and compiled.models[owner].model.trainable:
                trained += " but for what that trains"
        lines.append(
            f"  {role}: {source}, {trained}, dp={layout.dp} pp={layout.pp} tp={layout.tp} sp={layout.sp}, "
            f"workers {placed.ranks.start}-{placed.ranks.stop - 1}"
        )
    for fed in compiled.graphs.values():
        lines += _graph_lines(fed.graph, str(fed.dataset.path))
    for call in compiled.training.graph.model_calls:
        layout, count = compiled.models[call.model].model.layout, call.microbatching.min_count
        if foretell is not None and call.kind is CallKind.TRAIN_STEP and (told := foretell(layout, count)):
            lines.append(f"{call.name} on {call.model} in {count} microbatches, the fewest: {told}")
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
