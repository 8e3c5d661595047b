"""`trainmaster schedule`: a schedule's program, verified; its figures beside the formulas; its picture. And a line of
them for `trainmaster graph` and the master's log. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...api.config import Layout, Recompute
from ...api.errors import ConfigError
from .drawing import draw
from .formulas import Formulas, formulas
from .instructions import Program
from .lowering import lowered, training_program
from .measured import Planned, mean_times, read
from .schedules import Kind, schedule
from .simulate import Figures, Times, figures, peaks, simulate

_MOST = 100_000
"""Forwards of a program: more would take minutes to lay out."""
_MOST_IN_PASSING = 2_000
"""The same where nobody asked for it: about a second."""
_UNCUT = 10_000
"""Columns where no terminal has a say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for, as it was typed."""

    kind: str
    stages: str
    microbatches: str
    chunks: str | None
    times: str
    comm: str
    recompute: bool
    out: Path | None


@dataclass(frozen=True, slots=True)
class _Planned:
    kind: Kind
    num_ranks: int
    num_microbatches: int
    num_chunks: int
    times: Times
    program: Program
    figures: Figures


def show(request: Request) -> None:
    """Prints, and draws if asked. Raises ConfigError for a request that makes no sense."""
    planned = _plan(request)
    console = _console()
    console.print(Text(_title(planned, request.recompute), style="bold"))
    console.print(_table(planned, request.recompute))
    for note in _notes(planned, request.recompute):
        console.print(Text(note, style="dim"))
    if request.out is not None:
        request.out.write_text(picture(request), encoding="utf-8")
        console.print(Text(f"drew {request.out}"))


def show_measured(run: str, step: int, out: Path | None) -> None:
    """A step's timeline, and what its schedule predicts with the same mean times. Raises ConfigError without one."""
    directory = Path(run) if Path(run).is_dir() else Path("runs") / run
    measured = read(directory, step)
    planned, times = measured.planned, mean_times(measured)
    predicted = simulate(planned.program, times)
    got, wanted = figures(measured.timeline), figures(predicted)
    title = f"{directory.name}, step {step}: {planned.model}, {planned.kind}, {_size(planned)}"
    table = _columns(
        ("", "measured", "predicted"),
        [
            ("makespan, ms", f"{1e3 * got.makespan:.1f}", f"{1e3 * wanted.makespan:.1f}"),
            ("bubble, all ranks", f"{got.bubble:.2%}", f"{wanted.bubble:.2%}"),
            ("bubble, longest rank", f"{got.bubble_own:.2%}", f"{wanted.bubble_own:.2%}"),
        ],
    )
    mean = f"F {1e3 * times.forward:.2f}, I {1e3 * times.input_gradient:.2f}, W {1e3 * times.weight_gradient:.2f} ms"
    note = f"mean times of a microbatch on one rank: {mean}; the prediction is for equal microbatches and no messages"
    console = _console()
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print(Text(note, style="dim"))
    if out is not None:
        timelines = {_heading("measured", got): measured.timeline, _heading("predicted", wanted): predicted}
        out.write_text(draw(timelines, title, [note]), encoding="utf-8")
        console.print(Text(f"drew {out}"))


def _heading(name: str, found: Figures) -> str:
    return f"{name}: {1e3 * found.makespan:.1f} ms, a bubble of {found.bubble:.1%}"


def foretell(layout: Layout, num_microbatches: int) -> str:
    """A line on how well a training of so many microbatches fills the pipeline of a layout, and what it holds.

    Empty where there is no pipeline, or where finding out would take long.
    """
    if layout.pp == 1 or layout.num_stages * num_microbatches > _MOST_IN_PASSING:
        return ""
    is_again = layout.recompute is Recompute.STAGE
    program = training_program(layout.pp, num_microbatches, Kind(layout.schedule), layout.chunks, is_again)
    bubble, held = figures(simulate(program, Times())).bubble, peaks(program)
    what = "chunks" if layout.chunks > 1 else "microbatches"
    told = f"a bubble of {bubble:.1%}, at most {_listed(each.activations for each in held)} {what} live, by rank"
    return told + (f", and inputs of {_listed(each.inputs for each in held)}" if is_again else "")


def _size(planned: Planned) -> str:
    chunks = f" with {planned.num_chunks} chunks each" if planned.num_chunks > 1 else ""
    again = ", activations recomputed" if planned.recompute else ""
    return f"{planned.num_ranks} ranks{chunks}, {planned.num_microbatches} microbatches{again}"


def _console() -> Console:
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = _UNCUT
    return console


def _columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(Text(name, style="bold"), overflow="fold", justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def picture(request: Request) -> str:
    """The predicted timeline as SVG."""
    planned = _plan(request)
    found = planned.figures
    told = f"makespan {found.makespan:g}, idle {found.idle:g}: a bubble of {found.bubble:.1%}"
    held = f"peak of live activations by rank: {_listed(each.activations for each in peaks(planned.program))}"
    unit = " (in chunks)" if planned.num_chunks > 1 else ""
    return draw({"": simulate(planned.program, planned.times)}, _title(planned, request.recompute), [told, held + unit])


def _plan(request: Request) -> _Planned:
    if request.kind not in list(Kind):
        raise ConfigError("--kind", request.kind, f"must be one of {', '.join(Kind)}", "choose one of these")
    kind = Kind(request.kind)
    num_ranks = _whole("--stages", request.stages)
    num_microbatches = _whole("--microbatches", request.microbatches)
    num_chunks = 1
    if kind is Kind.INTERLEAVED:
        num_chunks = _whole("--chunks", request.chunks or "2")
        if num_chunks < 2:
            raise ConfigError("--chunks", num_chunks, "interleaved takes 2 or more", "raise it, or take --kind 1f1b")
    elif request.chunks is not None:
        raise ConfigError(
            "--chunks", request.chunks, f"{kind} has one a rank", "leave it out, or take --kind interleaved"
        )
    if (size := num_ranks * num_microbatches * num_chunks) > _MOST:
        rule = f"stages times microbatches times chunks must be at most {_MOST}, not {size}"
        raise ConfigError("--microbatches", num_microbatches, rule, "lower it")
    if kind is Kind.FORWARD and request.recompute:
        raise ConfigError("--recompute", True, "forward has no backward to recompute for", "leave it out")
    times = _times(request.times, request.comm)
    program = lowered(schedule(kind, num_ranks, num_microbatches, num_chunks), request.recompute)
    timeline = simulate(program, times)
    return _Planned(kind, num_ranks, num_microbatches, num_chunks, times, program, figures(timeline))


def _whole(field: str, text: str) -> int:
    if not text.isdecimal() or not text.isascii() or int(text[:9]) < 1 or len(text) > 9:
        raise ConfigError(field, text, "must be a whole number from 1", "give one, such as 4")
    return int(text)


def _times(text: str, communication: str) -> Times:
    parts = [_duration("--times", part, text) for part in text.split(",")]
    if len(parts) != 3 or min(parts) == 0:
        rule = "must be three durations above 0: forward, gradient of inputs, gradient of weights"
        raise ConfigError("--times", text, rule, "write them as 5,6,4")
    forward, by_input, by_weight = parts
    return Times(
        forward=forward,
        input_gradient=by_input,
        weight_gradient=by_weight,
        communication=_duration("--comm", communication, communication),
    )


def _duration(field: str, part: str, value: str) -> float:
    try:
        duration = float(part)
    except ValueError:
        duration = math.nan
    if not math.isfinite(duration) or duration < 0:
        cure = "write them as 5,6,4" if field == "--times" else "write a number such as 0.5"
        raise ConfigError(field, value, f"{part!r} is no duration of 0 or more", cure)
    return duration


def _title(planned: _Planned, recompute: bool) -> str:
    chunks = f" with {planned.num_chunks} chunks each" if planned.num_chunks > 1 else ""
    microbatches = f"{planned.num_microbatches} microbatch{'es' if planned.num_microbatches > 1 else ''}"
    again = ", activations recomputed" if recompute else ""
    ranks = f"{planned.num_ranks} rank{'s' if planned.num_ranks > 1 else ''}"
    return f"{planned.kind}: {ranks}{chunks}, {microbatches}{again}"


def _table(planned: _Planned, recompute: bool) -> Table:
    found, said = planned.figures, _formulas(planned)
    held = peaks(planned.program)
    rows = [
        ("makespan", f"{found.makespan:g}", f"{said.makespan:g}"),
        ("idle, all ranks from first to last", f"{found.idle:g}", f"{said.idle:g}"),
        ("idle, longest rank by itself", f"{found.idle_own:g}", f"{said.idle_own:g}"),
        ("bubble, all ranks", f"{found.bubble:.2%}", f"{said.bubble:.2%}"),
        ("bubble, longest rank", f"{found.bubble_own:.2%}", f"{said.bubble_own:.2%}"),
    ]
    unit = " in chunks" if planned.num_chunks > 1 else ""
    rows.append((f"live activations at most{unit}, by rank", _listed(h.activations for h in held), _listed(said.peak)))
    if recompute:
        rows = [(*row[:2], "") for row in rows]
        rows.append((f"inputs kept at most{unit}, by rank", _listed(h.inputs for h in held), ""))
    return _columns(("", "verified", "formula"), rows)


def _notes(planned: _Planned, recompute: bool) -> list[str]:
    num_instructions = sum(map(len, planned.program.ranks))
    notes = [f"{num_instructions} instructions, digest {planned.program.digest[:16]}; cannot hang, nothing left over"]
    said = _formulas(planned)
    if recompute:
        notes.append("the formulas are without recomputation")
    elif planned.times.communication:
        notes.append("the formulas of time are without communication")
    if said.unmet:
        notes.append(f"the formulas of time hold where {said.unmet}; those of memory are upper bounds here")
    return notes


def _formulas(planned: _Planned) -> Formulas:
    return formulas(planned.kind, planned.num_ranks, planned.num_microbatches, planned.num_chunks, planned.times)


def _listed(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
