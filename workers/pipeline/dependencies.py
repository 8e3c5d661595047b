"""What every instruction of a program waits for, and how far a program gets by it. Pure.

An instruction needs others of its own rank to stand before it, and others of other ranks to be done:

    RECEIVE           waits for its SEND
    SEND              if channels are a rendezvous, for the rank of its RECEIVE to have come there
    REDUCE            for the ranks of its replica group to have come to theirs
    compute           in a program without communication, for what other ranks feed it

The verifier asks whether this ends, the simulator asks when: both walk it with `advance`.
"""

from __future__ import annotations

from collections import deque
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
    """Of a program whose instructions stand where `places` says."""

    program: Program
    places: Mapping[Key, Place]
    own: tuple[tuple[tuple[int, ...], ...], ...]
    """By rank and position: positions of the same rank that must be lower."""
    foreign: tuple[tuple[tuple[Place, ...], ...], ...]
    """By rank and position: instructions of other ranks that must be done, if channels are buffered."""

    def waits(self, channels: Channels) -> tuple[tuple[tuple[Place, ...], ...], ...]:
        """`foreign`, and for a rendezvous what sends wait for."""
        if channels is Channels.BUFFERED:
            return self.foreign
        return tuple(
            tuple(
                self._until_received(each) if each.op is Op.SEND else needed
                for each, needed in zip(instructions, self.foreign[rank], strict=True)
            )
            for rank, instructions in enumerate(self.program.ranks)
        )

    def _until_received(self, send: Instruction) -> tuple[Place, ...]:
        rank, position = self.places[Op.RECEIVE, *key_of(send)[1:]]
        return ((rank, position - 1),) if position else ()


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


def places_of(program: Program) -> dict[Key, Place]:
    """Of all that name something; each rank has a STEP. Raises ProgramError for an instruction that stands twice."""
    places: dict[Key, Place] = {}
    for rank, instructions in enumerate(program.ranks):
        for position, each in enumerate(instructions):
            if each.op is Op.STEP:
                continue
            place = places.setdefault(key_of(each), (rank, position))
            if place != (rank, position):
                raise ProgramError(f"{program.name}: {each} stands twice, in rank {place[0]} and in rank {rank}")
    return places


def find(program: Program, places: Mapping[Key, Place], is_silent: bool = False) -> Dependencies:
    """Raises ProgramError for an instruction that another one needs and that stands nowhere.

    Silent is a program before communication is added: what one rank makes is there for the others.
    """
    needs: dict[tuple[Op, int], tuple[Need, ...]] = {}
    own, foreign = [], []
    for rank, instructions in enumerate(program.ranks):
        own_of_rank: list[tuple[int, ...]] = []
        foreign_of_rank: list[tuple[Place, ...]] = []
        for each in instructions:
            op, where, microbatch, trip = key_of(each)
            if (op, where) not in needs:
                needs[op, where] = tuple(_needs(program.topology, op, where, is_silent))
            here, there = [], list(_meeting(program, places, where)) if op is Op.REDUCE else []
            for need in needs[op, where]:
                if need.trips_before > trip:
                    continue
                place = None
                for other in need.ops:
                    place = places.get((other, need.where, microbatch, trip - need.trips_before))
                    if place is not None:
                        break
                if place is None:
                    raise _missing(program, rank, each, need)
                if place[0] == rank:
                    here.append(place[1])
                else:
                    there.append(place)
            own_of_rank.append(tuple(here))
            foreign_of_rank.append(tuple(there))
        own.append(tuple(own_of_rank))
        foreign.append(tuple(foreign_of_rank))
    return Dependencies(program, places, tuple(own), tuple(foreign))


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


def _missing(program: Program, rank: int, each: Instruction, need: Need) -> ProgramError:
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
    program: Program, waits: Sequence[Sequence[Sequence[Place]]], costs: Mapping[Op, float], delays: Mapping[Op, float]
) -> list[list[float]]:
    """When each instruction ends, by rank; a list that is shorter than the rank's: it gets no further.

    `costs`: how long an instruction takes; `delays`: how long what it waits for takes to reach it. Each rank starts an
    instruction once it is done with the one before and what this one waits for has come.
    """
    ends: list[list[float]] = [[] for _ in program.ranks]
    sleepers: dict[Place, list[int]] = {}
    awake = deque(range(len(program.ranks)))
    while awake:
        rank = awake.popleft()
        instructions, waits_of_rank, ends_of_rank = program.ranks[rank], waits[rank], ends[rank]
        clock = ends_of_rank[-1] if ends_of_rank else 0.0
        for position in range(len(ends_of_rank), len(instructions)):
            op = instructions[position].op
            for place in waits_of_rank[position]:
                ends_there = ends[place[0]]
                if place[1] >= len(ends_there):
                    sleepers.setdefault(place, []).append(rank)
                    break
                clock = max(clock, ends_there[place[1]] + delays[op])
            else:
                clock += costs[op]
                ends_of_rank.append(clock)
                if sleepers:
                    awake.extend(sleepers.pop((rank, position), ()))
                continue
            break
    return ends
