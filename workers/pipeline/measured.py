"""Measured timelines: how workers write them, and `trainmaster schedule --run`, which reads them. Torch-free.

    RUN/timelines/step-N-worker-R.jsonl     a line for each training program that worker R ran in step N

A line says which program it was, so that the reader makes it again, and start and end of each instruction, in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from ...api.errors import ConfigError
from .instructions import Op, Program
from .lowering import training_program
from .schedules import Kind
from .simulate import Span, Timeline, Times

DIRECTORY = "timelines"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Which training program ran."""

    model: str
    """The experiment's field."""
    replica: int
    kind: str
    num_ranks: int
    num_microbatches: int
    num_chunks: int
    recompute: bool

    @property
    def program(self) -> Program:
        return training_program(self.num_ranks, self.num_microbatches, Kind(self.kind), self.num_chunks, self.recompute)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A program and when it ran, on all ranks of one replica."""

    planned: Planned
    timeline: Timeline


def path_of(run_directory: Path, step: int, worker: int) -> Path:
    return run_directory / DIRECTORY / f"step-{step}-worker-{worker}.jsonl"


def write(path: Path, planned: Planned, rank: int, times: Sequence[tuple[float, float]]) -> None:
    """Adds a line: pipeline rank `rank` ran its instructions then."""
    path.parent.mkdir(exist_ok=True)
    rounded = [[round(start_s, 7), round(end_s, 7)] for start_s, end_s in times]
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(planned), "rank": rank, "times": rounded}) + "\n")


def read(run_directory: Path, step: int) -> Measurement:
    """The step's first training program, of the first model's first replica. Raises ConfigError if there is none."""
    found: dict[Planned, dict[int, list[list[float]]]] = {}
    for path in sorted((run_directory / DIRECTORY).glob(f"step-{step}-worker-*.jsonl")):
        seen: set[Planned] = set()
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            rank, times = fields.pop("rank"), fields.pop("times")
            planned = Planned(**fields)
            if planned not in seen:  # of several alike, the first
                found.setdefault(planned, {})[rank] = times
            seen.add(planned)
    whole = [planned for planned, ranks in found.items() if len(ranks) == planned.num_ranks]
    if not whole:
        rule = f"{run_directory / DIRECTORY} has no timeline of this step, from all workers"
        raise ConfigError("--step", step, rule, "name one of the run's run.timeline_steps")
    planned = min(whole, key=lambda each: (each.replica, list(found).index(each)))
    spans = [
        tuple(Span(each, *at) for each, at in zip(instructions, found[planned][rank], strict=True))
        for rank, instructions in enumerate(planned.program.ranks)
    ]
    return Measurement(planned, Timeline(tuple(spans)))


def mean_times(measured: Measurement) -> Times:
    """What a prediction wants: mean times of a microbatch on one rank. An undivided backward counts half and half."""
    chunks = measured.planned.num_chunks

    def mean(*ops: Op) -> float:
        spans = [span for rank in measured.timeline.ranks for span in rank if span.instruction.op in ops]
        return chunks * fmean(span.end - span.start for span in spans) if spans else 0.0

    whole = mean(Op.BACKWARD)
    by_input, by_weight = mean(Op.INPUT_GRADIENT) or whole / 2, mean(Op.WEIGHT_GRADIENT) or whole / 2
    return Times(forward=mean(Op.FORWARD), input_gradient=by_input, weight_gradient=by_weight)
