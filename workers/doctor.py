"""`trainmaster doctor`: does a model compute in its layout what it computes in one process?

    a run of one step, in the experiment's layout, whose workers record each model's first call
    that trains or scores, with made-up advantages                                               (`recording`)
    the same microbatches, of all replicas, through the whole model in this process              |
    the same tokens, sequence by sequence, through transformers' own model                       v  compared

The run is by the same master, wire and workers as any; this process shares with it the code of a stage and the
algorithm, and with transformers' own model nothing but the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..api.config import Layout, Precision
from ..api.errors import ModelError, RunError
from ..api.experiments.base import CompiledExperiment
from ..api.graph import CallKind, ModelFunctionCall
from . import recording
from .algorithms import inference_algorithm, training_algorithm
from .context import ShardGroups, WorkerContext
from .memory import Need, Room
from .models import hf_compat
from .recording import Record
from .shard import ModelShard

TOLERANCES = {Precision.FLOAT32: 1e-4, Precision.BFLOAT16: 5e-2}
"""Relative differences that sums in another order explain."""
_SMALL = 1e-3
"""Of all gradients' norm: one that is smaller is compared on this scale, for nothing but noise may be left of it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How far one quantity is from the reference's."""

    what: str
    difference: float
    """The largest, absolute; of gradients the L2 norm of the difference."""
    size: float
    """The reference's: its largest absolute value; of gradients the L2 norm."""
    relative: float
    """To `size`, or to a scale below which only noise is."""


@dataclass(frozen=True, slots=True)
class Examination:
    """Of one model, by its first call of a step."""

    model: str
    call: str
    layout: Layout
    tolerance: float
    findings: tuple[Finding, ...]
    """Logits, log-probabilities, losses."""
    gradients: tuple[Finding, ...]
    """Of each parameter, the worst first."""

    @property
    def agrees(self) -> bool:
        return all(each.relative <= self.tolerance for each in (*self.findings, *self.gradients))


def examine(compiled: CompiledExperiment, run_directory: Path) -> Iterator[Examination]:
    """Of every model that a run with records called for training or inference. Raises RunError if nothing was."""
    graph, seen = compiled.training.graph, set[str]()
    for call in graph.model_calls:
        if call.kind is CallKind.GENERATE or call.model in seen:
            continue
        seen.add(call.model)
        records = recording.read_all(run_directory, call.name)
        if not any(record.microbatches for record in records):
            raise RunError(
                f"call {call.name} was not made in the step: it had nothing to work on; if a reward dropped all "
                "sequences, set on_failure or drop_zero_variance so that it drops none"
            )
        yield compare(compiled, call, records)
    if not seen:
        raise RunError(f"graph {graph.name} neither trains a model nor asks one for scores: nothing can be compared")


def compare(compiled: CompiledExperiment, call: ModelFunctionCall, records: Sequence[Record]) -> Examination:
    """One call's records, of all workers, with the same in this process.

    Raises RunError for a training whose gradients are all zero, which no layout could get wrong, and for replicas that
    differ; ModelError if the whole model does not fit on this machine.
    """
    placed = compiled.models[call.model]
    found = _joined(records)
    shard = _whole_model(compiled, call)
    theirs = list(_transformers_logits(shard, found))  # before a step changes the weights
    alone = Record(found.graph, call.name, 0)
    if call.kind is CallKind.TRAIN_STEP:
        shard.train(training_algorithm(call.settings), found.microbatches, record=alone)
        if not any(gradient.any() for gradient in alone.gradients.values()):
            raise RunError(
                f"call {call.name}: all gradients are zero in one process, so nothing would be compared with them; "
                "take data from which something is to be learnt"
            )
    else:
        shard.infer(inference_algorithm(call.settings), found.microbatches, alone)
    findings = []
    for name, ours in (("logits", "logits"), ("log-probabilities", "log_probabilities")):
        pairs = [(getattr(a, ours), getattr(b, ours)) for a, b in zip(found.outputs, alone.outputs, strict=True)]
        findings.append(_finding(name, pairs))
    findings.append(
        _finding("logits, transformers' own", [(a.logits, b) for a, b in zip(found.outputs, theirs, strict=True)])
    )
    for name, figure in found.figures.items():
        difference, size = abs(figure - alone.figures[name]), abs(alone.figures[name])
        findings.append(Finding(name.replace("_", " "), difference, size, difference / max(1.0, size)))
    return Examination(
        model=placed.field,
        call=call.name,
        layout=placed.model.layout,
        tolerance=TOLERANCES[placed.model.dtype],
        findings=tuple(findings),
        gradients=tuple(_of_gradients(found.gradients, alone.gradients)),
    )


def _joined(records: Sequence[Record]) -> Record:
    """Replica by replica, as one."""
    first = records[0]
    joined = Record(first.graph, first.call, 0)
    for record in sorted(records, key=lambda record: record.replica):
        joined.microbatches += record.microbatches
        joined.outputs += record.outputs
        joined.figures |= record.figures
        for name, gradient in record.gradients.items():
            known = joined.gradients.setdefault(name, gradient)
            if not torch.allclose(known, gradient, rtol=0.0, atol=0.0, equal_nan=True):
                raise RunError(f"replicas have different gradients of {name}: they were not summed")
    return joined


def _whole_model(compiled: CompiledExperiment, call: ModelFunctionCall) -> ModelShard:
    """In this process, with room for transformers' copy beside it. Raises ModelError if there is none."""
    placed, cpu = compiled.models[call.model], torch.device("cpu")
    whole = replace(placed, model=replace(placed.model, layout=Layout()), first_rank=0)
    room = Room.on(cpu, 1)
    context = WorkerContext(
        rank=0, num_workers=1, device=cpu, compiled=compiled, name="doctor", address="127.0.0.1", room=room
    )
    try:
        shard = ModelShard(whole, context, ShardGroups())
        num_parameters = sum(parameter.numel() for parameter in shard.stage.parameters())
        room.take(placed.field, Need.of(torch.float32, num_parameters, 0))
    except ModelError as error:
        raise ModelError(
            "the doctor computes twice with the whole model on this machine's CPU, whatever the layout: run it where "
            f"there is more memory, or examine a smaller model of the same type. It was refused here: {error}"
        ) from error
    return shard


@torch.no_grad()
def _transformers_logits(shard: ModelShard, found: Record) -> Iterator[Tensor]:
    """[k, V] of each microbatch: every sequence by itself, without packing, cache or cut, in their own attention."""
    model = shard.stage.model
    weights = model.state_dict() if shard.adapters is None else shard.adapters.merged(model)
    model = hf_compat.own_model(copy.deepcopy(shard.stage.config), weights)
    for microbatch, output in zip(found.microbatches, found.outputs, strict=True):
        count, rows = len(output.logits), torch.empty(0, output.logits.shape[1])
        for tokens in microbatch.tokens[0].split(microbatch.packed.seqlens):
            if len(rows) < count:
                rows = torch.cat([rows, model(input_ids=tokens[None], use_cache=False).logits[0].float()])
        yield rows[:count]


def _finding(what: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Finding:
    """Largest difference, and relative to the largest value; a NaN is no agreement."""
    difference = max((_largest(a.double() - b.double()) for a, b in pairs), default=0.0)
    size = max((_largest(b.double()) for _, b in pairs), default=0.0)
    return Finding(what, difference, size, difference / size if size else difference)


def _largest(values: Tensor) -> float:
    if values.numel() == 0:
        return 0.0
    largest = values.abs().max()
    return float(largest) if largest.isfinite() else float("inf")


def _of_gradients(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[Finding]:
    """One that only one side has is compared with zeros."""
    whole = sum(float(gradient.double().square().sum()) for gradient in wanted.values()) ** 0.5
    findings = []
    for name in sorted(found.keys() | wanted.keys()):
        nothing = torch.zeros((), dtype=torch.float64)
        one, other = (side.get(name, nothing).double() for side in (found, wanted))
        distance, size = float((one - other).norm()), float(other.norm())
        scale = max(size, _SMALL * whole)
        relative = distance / scale if scale else distance
        findings.append(Finding(name, distance, size, relative if relative == relative else float("inf")))
    return sorted(findings, key=lambda finding: -finding.relative)


# -- the table --------------------------------------------------------------------------------------------------------

_SHOWN = 8
"""Gradients, unless all are asked for."""


def table(examination: Examination, with_all: bool) -> str:
    layout, gradients = examination.layout, examination.gradients
    axes = [f"{axis}={getattr(layout, axis)}" for axis in ("dp", "pp", "tp", "sp")] + [f"schedule={layout.schedule}"]
    shown = gradients if with_all else gradients[:_SHOWN]
    names = [(each.what, each) for each in examination.findings]
    names += [(f"gradient of {each.what}", each) for each in shown]
    width = max(len(name) for name, _ in names)
    lines = [f"{examination.model}: call {examination.call}, {' '.join(axes)}, beside one process", ""]
    lines.append(f"  {'':{width}}  {'size':>8}  difference  relative")
    lines += [
        f"  {name:{width}}  {found.size:8.2e}  {found.difference:10.2e}  {found.relative:8.1e}"
        + ("" if found.relative <= examination.tolerance else "  <-- over the tolerance")
        for name, found in names
    ]
    if len(shown) < len(gradients):
        lines.append(f"  and {len(gradients) - len(shown)} gradients that are closer (--all shows them)")
    verdict = "agree" if examination.agrees else "DO NOT agree"
    lines += ["", f"  layout and one process {verdict} (tolerance {examination.tolerance:g}, relative)", ""]
    return "\n".join(lines)
