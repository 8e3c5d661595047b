"""When each instruction of a program runs, for given durations; and what the timeline says of it. Pure.

The model: a rank runs its instructions one after the other. SEND and RECEIVE begin a transfer and take no time; the
message is there `communication` after its SEND, and what uses it waits for it. REDUCE and STEP take no time. Two that
are co-issued begin and end together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .dependencies import Dependencies, Place, advance, find, joined, keys_of, places_of
from .instructions import BACKWARDS, COMMUNICATION, COMPUTE, Instruction, Op, Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of one microbatch on one rank of a plain chain with as many ranks, in any unit.

    Where the model is cut into more pieces than there are ranks (chunks), a piece takes its share of them.
    """

    forward: float = 1.0
    """Also of a recomputation."""
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    communication: float = 0.0
    """From the end of a send until the message is there."""
    pair: float | None = None
    """Of a forward and a backward that are co-issued. None: their sum, which is what any other two take."""

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient

    @property
    def microbatch(self) -> float:
        """A forward and a backward."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Span:
    """An instruction's time on its rank. What it waited for is not in it."""

    instruction: Instruction
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What ran when, by rank, in order: predicted by `simulate`, or measured."""

    ranks: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a timeline says. Idle is without compute; both of its definitions are given.

    `makespan`: from the first start to the last end.
    `idle_own`: on the rank that is longest at work, between its first and last compute (as the zero-bubble papers
    count: an optimizer step that waits for no other rank lets steps overlap).
    `idle`: on an average rank, within the makespan (all ranks begin and end together).
    """

    makespan: float
    idle: float
    idle_own: float
    bubble: float
    """`idle` as a part of the makespan."""
    bubble_own: float
    """`idle_own` as a part of that rank's time from first to last compute."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of what one rank holds at once, counted in (microbatch, stage)."""

    activations: int
    """That a backward still needs: from FORWARD or RECOMPUTE to BACKWARD or WEIGHT_GRADIENT."""
    inputs: int
    """That a recomputation starts from: of forwards before their RECOMPUTE."""


def simulate(program: Program, times: Times) -> Timeline:
    """The timeline of a verified program. Without communication in it, results reach other ranks by themselves."""
    is_silent = not any(each.op in COMMUNICATION for rank in program.ranks for each in rank)
    keys = keys_of(program)
    dependencies = find(program, keys, places_of(program, keys), is_silent)
    costs = [_costs(instructions, times, _share(program)) for instructions in program.ranks]
    delays = dict.fromkeys(Op, times.communication) | {Op.REDUCE: 0.0}
    ends = advance(program, _until_used(dependencies), costs, delays)
    return Timeline(tuple(map(_spans, program.ranks, costs, ends)))


def _share(program: Program) -> float:
    """Of a rank's time in a plain chain that one stage takes here."""
    return program.topology.num_ranks / program.topology.num_replica_groups


def _costs(instructions: Sequence[Instruction], times: Times, share: float) -> list[float]:
    """By position. Of two that are co-issued, the first has both."""
    by_op = dict.fromkeys(Op, 0.0) | {
        Op.FORWARD: times.forward * share,
        Op.RECOMPUTE: times.forward * share,
        Op.BACKWARD: times.backward * share,
        Op.INPUT_GRADIENT: times.input_gradient * share,
        Op.WEIGHT_GRADIENT: times.weight_gradient * share,
    }
    costs = [by_op[each.op] for each in instructions]
    for position, each in enumerate(instructions):
        if each.is_with_next:
            both = costs[position] + costs[position + 1]
            if times.pair is not None and {each.op, instructions[position + 1].op} == {Op.FORWARD, Op.BACKWARD}:
                both = times.pair * share
            costs[position : position + 2] = both, 0.0
    return costs


def _spans(instructions: Sequence[Instruction], costs: Sequence[float], ends: Sequence[float]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for each, cost, end in zip(instructions, costs, ends, strict=True):
        is_second = len(spans) > 0 and spans[-1].instruction.is_with_next
        spans.append(Span(each, spans[-1].start if is_second else end - cost, end))
    return tuple(spans)


def _until_used(dependencies: Dependencies) -> list[list[Sequence[Place]]]:
    """What instructions wait for, if a RECEIVE only begins to receive."""
    waits: list[list[Sequence[Place]]] = []
    for rank, instructions in enumerate(dependencies.program.ranks):
        own, foreign = dependencies.own[rank], dependencies.foreign[rank]
        waits.append([])
        for position, each in enumerate(instructions):
            places = [] if each.op is Op.RECEIVE else list(foreign[position])
            for at in own[position]:
                if instructions[at].op is Op.RECEIVE:
                    places += foreign[at]
            waits[-1].append(places)
    return joined(dependencies.program, waits)


def figures(timeline: Timeline) -> Figures:
    """Of any timeline with compute on each rank. Time that two instructions share is counted once."""
    firsts, lasts, busy = [], [], []
    for rank in timeline.ranks:
        compute = [span for span in rank if span.instruction.op in COMPUTE]
        firsts.append(min(span.start for span in compute))
        lasts.append(max(span.end for span in compute))
        ends = accumulate((span.end for span in compute), max, initial=firsts[-1])
        busy.append(sum(max(span.end - max(span.start, end), 0.0) for span, end in zip(compute, ends, strict=False)))
    makespan = max(lasts) - min(firsts)
    idle = makespan - sum(busy) / len(busy)
    own, rest = max((last - first, -work) for first, last, work in zip(firsts, lasts, busy, strict=True))
    idle_own = own + rest
    return Figures(makespan, idle, idle_own, idle / makespan, idle_own / own)


def peaks(program: Program) -> tuple[Peaks, ...]:
    """By rank. They follow from the order of instructions alone; two that are co-issued both hold what each holds."""
    found = []
    recomputed = {(each.stage, each.microbatch) for rank in program.ranks for each in rank if each.op is Op.RECOMPUTE}
    has_gradients = any(each.op in BACKWARDS for rank in program.ranks for each in rank)
    for instructions in program.ranks:
        live = most_live = inputs = most_inputs = freed = 0
        for each in instructions if has_gradients else ():
            match each.op:
                case Op.FORWARD:
                    is_kept = (each.stage, each.microbatch) not in recomputed
                    live, inputs = live + is_kept, inputs + (not is_kept)
                case Op.RECOMPUTE:
                    live, inputs = live + 1, inputs - 1
                case Op.BACKWARD | Op.WEIGHT_GRADIENT:
                    freed += 1
            most_live, most_inputs = max(most_live, live), max(most_inputs, inputs)
            if not each.is_with_next:
                live, freed = live - freed, 0
        found.append(Peaks(most_live, most_inputs))
    return tuple(found)
