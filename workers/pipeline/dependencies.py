"""What every instruction of a program waits for, and how far a program gets by it. Pure.

An instruction needs others of its own rank, which stand before it, and others of other ranks, which must be done:

    RECEIVE           waits for its SEND
    SEND              if channels are a rendezvous, for the rank of its RECEIVE to have come there
    REDUCE            for the ranks of its replica group to have come to theirs
    compute           in a program without communication, for what other ranks feed it
    co-issued         for what either of the two waits for

The verifier asks whether this ends, the simulator asks when: both walk it with `advance`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ...api.errors import ProgramError
from .instructions import BACKWARDS, COMMUNICATION, Edge, EdgeKind, Instruction, Op, Program, Topology

Key = tuple[Op, int, int, int]
"""Of an instruction: op, its stage or edge, microbatch, trip (-1 for what it does not name)."""
Place = tuple[int, int]
"""Rank and position."""

_MADE_BY: dict[EdgeKind, tuple[Op, ...]] = {
    EdgeKind.ACTIVATION: (Op.FORWARD, Op.CLOSE),
    EdgeKind.GRADIENT: (Op.BACKWARD, Op.INPUT_GRADIENT),
    EdgeKind.TOKEN: (Op.SAMPLE,),
}
"""Which compute makes what flows over an edge: one of them, at its source."""


class Channels(StrEnum):
    """How messages travel between two ranks."""

    BUFFERED = "buffered"
    """A send never waits."""
    RENDEZVOUS = "rendezvous"
    """A send waits until its receive has begun."""


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Of a program: where everything stands, and what it waits for."""

    program: Program
    places: Mapping[Key, Place]
    own: Sequence[Sequence[Sequence[int]]]
    """By rank and position: lower positions of the same rank."""
    foreign: Sequence[Sequence[Sequence[Place]]]
    """By rank and position: instructions of other ranks that must be done, if channels are buffered."""
    messages: Sequence[tuple[Place, Place]]
    """Where each message is sent, and where it is received; in the order of receives."""

    def waits(self, channels: Channels) -> list[list[Sequence[Place]]]:
        """`foreign`, and for a rendezvous what sends wait for; the first of two that are co-issued waits for both."""
        waits = [list(each) for each in self.foreign]
        if channels is Channels.RENDEZVOUS:
            for (source, sent), (target, received) in self.messages:
                waits[source][sent] = ((target, received - 1),) if received else ()
        return joined(self.program, waits)


def joined(program: Program, waits: list[list[Sequence[Place]]]) -> list[list[Sequence[Place]]]:
    """Has the first of two co-issued instructions wait for what the second waits for."""
    for instructions, waits_of_rank in zip(program.ranks, waits, strict=True):
        for position, each in enumerate(instructions):
            if each.is_with_next:
                waits_of_rank[position] = (*waits_of_rank[position], *waits_of_rank[position + 1])
    return waits


def inputs(topology: Topology, op: Op, stage: int) -> Iterator[tuple[Edge, int]]:
    """Edges that feed a compute instruction, and how many trips before its own that was made."""
    if op in (Op.FORWARD, Op.CLOSE):
        yield from ((edge, 0) for edge in topology.into(stage, EdgeKind.ACTIVATION))
        yield from ((edge, 1) for edge in topology.into(stage, EdgeKind.TOKEN))
    elif op in BACKWARDS:
        yield from ((edge, 0) for edge in topology.into(stage, EdgeKind.GRADIENT))


def outputs(topology: Topology, each: Instruction) -> Iterator[Edge]:
    """Edges that a compute instruction feeds."""
    for kind, ops in _MADE_BY.items():
        if each.op in ops and each.stage is not None:
            yield from topology.out_of(each.stage, kind)


def key_of(instruction: Instruction) -> Key:
    edge, stage, microbatch = instruction.edge, instruction.stage, instruction.microbatch
    where = edge.id if edge is not None else -1 if stage is None else stage
    return instruction.op, where, -1 if microbatch is None else microbatch, instruction.trip


def keys_of(program: Program) -> list[list[Key]]:
    """By rank and position."""
    return [[key_of(each) for each in instructions] for instructions in program.ranks]


def places_of(program: Program, keys: Sequence[Sequence[Key]]) -> dict[Key, Place]:
    """Of all that name something; each rank has a STEP. Raises ProgramError for an instruction that stands twice."""
    places: dict[Key, Place] = {}
    for rank, keys_of_rank in enumerate(keys):
        for position, key in enumerate(keys_of_rank):
            if key in places and key[0] is not Op.STEP:
                each, (first, _) = program.ranks[rank][position], places[key]
                raise ProgramError(f"{program.name}: {each} stands twice, in rank {first} and in rank {rank}")
            places[key] = rank, position
    return places


def find(
    program: Program, keys: Sequence[Sequence[Key]], places: Mapping[Key, Place], is_silent: bool = False
) -> Dependencies:
    """Raises ProgramError for an instruction that another one needs and that stands nowhere, or behind it.

    Silent is a program before communication is added: what one rank makes is there for the others.
    """
    needs: dict[Op, dict[int, tuple[Need, ...]]] = {op: {} for op in Op}
    own: list[list[tuple[int, ...]]] = []
    foreign: list[list[tuple[Place, ...]]] = []
    messages: list[tuple[Place, Place]] = []
    for rank, keys_of_rank in enumerate(keys):
        own_of_rank: list[tuple[int, ...]] = []
        foreign_of_rank: list[tuple[Place, ...]] = []
        for position, (op, where, microbatch, trip) in enumerate(keys_of_rank):
            wanted = needs[op].get(where)
            if wanted is None:
                wanted = needs[op][where] = tuple(_needs(program.topology, op, where, is_silent))
            here: tuple[int, ...] = ()
            there: tuple[Place, ...] = ()
            for ops, at, trips_before in wanted:
                if trips_before > trip:
                    continue
                for other in ops:
                    place = places.get((other, at, microbatch, trip - trips_before))
                    if place is not None:
                        break
                else:
                    raise _missing(program, rank, position, Need(ops, at, trips_before))
                if place[0] != rank:
                    there += (place,)
                elif place[1] < position:
                    here += (place[1],)
                else:
                    each, needed = (program.ranks[rank][number] for number in (position, place[1]))
                    raise ProgramError(f"{program.name}: {each} in rank {rank} stands before {needed}, which it needs")
            if op is Op.RECEIVE:
                messages.append((there[0], (rank, position)))
            elif op is Op.REDUCE:
                there += tuple(_meeting(program, places, where))
            own_of_rank.append(here)
            foreign_of_rank.append(there)
        own.append(own_of_rank)
        foreign.append(foreign_of_rank)
    return Dependencies(program, places, own, foreign, messages)


class Need(NamedTuple):
    """One of these ops must be done for the same microbatch: the first that stands anywhere."""

    ops: tuple[Op, ...]
    where: int
    """The stage or edge."""
    trips_before: int = 0


def _needs(topology: Topology, op: Op, where: int, is_silent: bool) -> Iterator[Need]:
    """Of an instruction, whichever microbatch it names."""
    for edge, trips_before in inputs(topology, op, where):
        if is_silent or topology.is_local(edge):
            yield Need(_MADE_BY[edge.kind], edge.source, trips_before)
        else:
            yield Need((Op.RECEIVE,), edge.id, trips_before)
    match op:
        case Op.FORWARD | Op.CLOSE:
            yield Need((Op.FORWARD,), where, 1)
        case Op.BACKWARD | Op.INPUT_GRADIENT:
            yield Need((Op.RECOMPUTE, Op.FORWARD), where)
        case Op.RECOMPUTE | Op.SAMPLE:
            yield Need((Op.FORWARD,), where)
        case Op.WEIGHT_GRADIENT:
            yield Need((Op.INPUT_GRADIENT,), where)
        case Op.SEND:
            yield Need(_MADE_BY[topology.edges[where].kind], topology.edges[where].source)
        case Op.RECEIVE:
            yield Need((Op.SEND,), where)


def _missing(program: Program, rank: int, position: int, need: Need) -> ProgramError:
    each = program.ranks[rank][position]
    op, trip = need.ops[-1], each.trip - need.trips_before
    if op in COMMUNICATION:
        what = Instruction(op, None, each.microbatch, program.topology.edges[need.where], trip)
    else:
        what = Instruction(op, need.where, each.microbatch, trip=trip)
    return ProgramError(f"{program.name}: {each} in rank {rank} needs {what}, which stands nowhere")


def _meeting(program: Program, places: Mapping[Key, Place], stage: int) -> Iterator[Place]:
    """What stands before each REDUCE of the same weights in other ranks."""
    stages = program.topology.stages
    for other in stages:
        if other.replica_group == stages[stage].replica_group and other.rank != stages[stage].rank:
            rank, position = places[Op.REDUCE, other.id, -1, 0]
            if position:
                yield rank, position - 1


def advance(
    program: Program,
    waits: Sequence[Sequence[Sequence[Place]]],
    costs: Sequence[Sequence[float]],
    delays: Mapping[Op, float],
) -> list[list[float]]:
    """When each instruction ends, by rank; a list that is shorter than the rank's: it gets no further.

    `costs`: how long an instruction takes, by rank and position; `delays`: how long what it waits for takes to reach
    it. Each rank starts an instruction once it is done with the one before and what this one waits for has come.
    """
    ends: list[list[float]] = [[] for _ in program.ranks]
    asleep: list[list[tuple[int, int]]] = [[] for _ in program.ranks]
    """By rank: positions that others wait for, and who."""
    awake = list(range(len(program.ranks)))
    while awake:
        rank = awake.pop()
        instructions, ends_of_rank = program.ranks[rank], ends[rank]
        waits_of_rank, costs_of_rank = waits[rank], costs[rank]
        clock = ends_of_rank[-1] if ends_of_rank else 0.0
        for position in range(len(ends_of_rank), len(costs_of_rank)):
            for other, at in waits_of_rank[position]:
                if at >= len(ends[other]):
                    asleep[other].append((at, rank))
                    break
                come = ends[other][at] + delays[instructions[position].op]
                if come > clock:
                    clock = come
            else:
                clock += costs_of_rank[position]
                ends_of_rank.append(clock)
                continue
            break
        if asleep[rank]:
            count = len(ends_of_rank)
            awake.extend([other for at, other in asleep[rank] if at < count])
            asleep[rank] = [each for each in asleep[rank] if each[0] >= count]
    return ends
