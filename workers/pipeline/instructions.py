"""The instruction set of pipeline programs, and the topology they run on, as data. Pure, torch-free.

    compute        FORWARD     hidden states of a stage, from those of the stages before it
                   RECOMPUTE   the activations of a forward once more, from its input, with its random numbers
                   BACKWARD    the gradients of a stage's input and weights; or, apart from each other,
                   INPUT_GRADIENT, and later WEIGHT_GRADIENT
                   SAMPLE      in generation: from hidden states to tokens, on the stage that has the head
                   CLOSE       in generation: no token goes on; what is left of the microbatch is dropped
    communication  SEND, RECEIVE   of an edge between two ranks
    the step       REDUCE, STEP

A topology says which stage is on which rank, and which edges join stages. A chain, chunks (several stages a rank, in a
loop or a V), two directions at once (Chimera, DualPipe) and graphs with branches differ in nothing else:

    chained([0, 1, 2])          0 -> 1 -> 2               one stage a rank
    chained([0, 1, 0, 1])       0 -> 1 -> 0 -> 1          two chunks a rank: interleaved
    chained([0, 1, 1, 0])       0 -> 1 -> 1 -> 0          a V; the edge in its middle stays within rank 1
    two chains, one of them on reversed ranks, whose stages share replica groups: two directions

What flows is decided by the kinds of edges, and by nothing else:

    ACTIVATION   made by FORWARD (CLOSE)               needed by FORWARD (CLOSE)
    GRADIENT     made by BACKWARD or INPUT_GRADIENT    needed by BACKWARD or INPUT_GRADIENT
    TOKEN        made by SAMPLE                        needed by FORWARD (CLOSE) of the next trip

A program is one list of instructions a rank. Straight from a schedule it has compute only; `lowering` adds the rest.
Instructions are executed one after the other; an edge within a rank is a hand-off without instructions. Two neighbours
may be co-issued (`par`): neither needs the other, both have what they need before the first begins, and what they make
is there once both are done. So a rank that cannot run them at once runs them one after the other, in either order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import TypeAlias

import msgpack  # type: ignore[import-untyped]

from ...api.errors import ProgramError

FORMAT = 2
"""Of a serialised program."""


class Op(StrEnum):
    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"
    """INPUT_GRADIENT and WEIGHT_GRADIENT in one."""
    INPUT_GRADIENT = "input_gradient"
    WEIGHT_GRADIENT = "weight_gradient"
    SAMPLE = "sample"
    CLOSE = "close"
    SEND = "send"
    RECEIVE = "receive"
    REDUCE = "reduce"
    """Sum a stage's gradients over data-parallel ranks, its replica group, and copies of shared parameters."""
    STEP = "step"
    """The optimizer's step, of all stages of the rank."""


COMPUTE = frozenset({Op.FORWARD, Op.RECOMPUTE, Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT})
"""What takes a stage's time."""
COMMUNICATION = frozenset({Op.SEND, Op.RECEIVE})
BACKWARDS = frozenset({Op.BACKWARD, Op.INPUT_GRADIENT})
"""What makes the gradient of a stage's input."""


class EdgeKind(StrEnum):
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    TOKEN = "token"


@dataclass(frozen=True, slots=True)
class Stage:
    id: int
    """Its index in the topology."""
    rank: int
    replica_group: int
    """Stages of one group hold the same weights. Each microbatch goes through exactly one of them."""


@dataclass(frozen=True, slots=True)
class Edge:
    """What flows from stage `source` to stage `target`, once a microbatch (and trip)."""

    id: int
    """Its index in the topology."""
    source: int
    target: int
    kind: EdgeKind


@dataclass(frozen=True)
class Topology:
    """Stages by id and edges by id."""

    stages: tuple[Stage, ...]
    edges: tuple[Edge, ...]

    @cached_property
    def num_ranks(self) -> int:
        return 1 + max(stage.rank for stage in self.stages)

    @cached_property
    def num_replica_groups(self) -> int:
        """Pieces that the model is cut into."""
        return len({stage.replica_group for stage in self.stages})

    @cached_property
    def _into(self) -> dict[tuple[int, EdgeKind], tuple[Edge, ...]]:
        return {
            (stage.id, kind): tuple(each for each in self.edges if (each.target, each.kind) == (stage.id, kind))
            for stage in self.stages
            for kind in EdgeKind
        }

    @cached_property
    def _out_of(self) -> dict[tuple[int, EdgeKind], tuple[Edge, ...]]:
        return {
            (stage.id, kind): tuple(each for each in self.edges if (each.source, each.kind) == (stage.id, kind))
            for stage in self.stages
            for kind in EdgeKind
        }

    def into(self, stage: int, kind: EdgeKind) -> tuple[Edge, ...]:
        """Edges of a kind that end at a stage."""
        return self._into[stage, kind]

    def out_of(self, stage: int, kind: EdgeKind) -> tuple[Edge, ...]:
        """Edges of a kind that start at a stage."""
        return self._out_of[stage, kind]

    @cached_property
    def is_generating(self) -> bool:
        """Whether tokens come home, and so trips are taken."""
        return any(edge.kind is EdgeKind.TOKEN for edge in self.edges)

    def ends(self, edge: Edge) -> tuple[int, int]:
        """The ranks that an edge starts and ends on."""
        return self.stages[edge.source].rank, self.stages[edge.target].rank

    def is_local(self, edge: Edge) -> bool:
        source, target = self.ends(edge)
        return source == target

    def stages_of(self, rank: int) -> tuple[Stage, ...]:
        """In the order of ids."""
        return tuple(stage for stage in self.stages if stage.rank == rank)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing for a rank to do. What it names depends on `op`:

    FORWARD to CLOSE: stage and microbatch; SEND, RECEIVE: edge and microbatch; REDUCE: stage; STEP: nothing.
    """

    op: Op
    stage: int | None = None
    microbatch: int | None = None
    edge: Edge | None = None
    trip: int = 0
    """In generation: how many tokens a sequence of the microbatch has got before. A message has its maker's."""
    is_with_next: bool = False
    """Co-issued with the next instruction of the rank: see `par`."""

    def __str__(self) -> str:
        told = [] if self.stage is None else [str(self.stage)]
        if self.edge is not None:
            told.append(f"{self.edge.kind} {self.edge.source}->{self.edge.target}")
        if self.microbatch is not None:
            told.append(f"microbatch {self.microbatch}")
        if self.trip:
            told.append(f"trip {self.trip}")
        return f"{self.op}({', '.join(told)})" if told else self.op


@dataclass(frozen=True)
class Program:
    """Instructions by rank, on a topology. Every rank holds the whole, and compares its digest before it runs its own.

    `Program.parse(program.serialise()) == program`.
    """

    name: str
    num_microbatches: int
    topology: Topology
    ranks: tuple[tuple[Instruction, ...], ...]

    def serialise(self) -> bytes:
        """The same bytes for equal programs, on every machine."""
        plain = (
            FORMAT,
            self.name,
            self.num_microbatches,
            [(stage.rank, stage.replica_group) for stage in self.topology.stages],
            [(edge.source, edge.target, edge.kind.value) for edge in self.topology.edges],
            [[_plain(each) for each in rank] for rank in self.ranks],
        )
        packed: bytes = msgpack.packb(plain)
        return packed

    @classmethod
    def parse(cls, data: bytes) -> Program:
        """Raises ProgramError for bytes that `serialise` did not write. Does not verify the program."""
        try:
            form, name, num_microbatches, stages, edges, ranks = msgpack.unpackb(data, strict_map_key=True)
            if form != FORMAT or not isinstance(name, str):
                raise ValueError(f"format {form!r}, where {FORMAT} is known")
            topology = Topology(
                tuple(Stage(at, rank, group) for at, (rank, group) in enumerate(stages)),
                tuple(Edge(at, source, target, EdgeKind(kind)) for at, (source, target, kind) in enumerate(edges)),
            )
            programs = tuple(tuple(_instruction(each, topology) for each in rank) for rank in ranks)
            program = cls(name, num_microbatches, topology, programs)
            # also whatever msgpack would let pass: numbers of other types, values left over
            if program.serialise() != data or not _has_whole_numbers(program):
                raise ValueError("not as a program is written")
        except (ValueError, TypeError, IndexError, OverflowError, msgpack.UnpackException) as error:
            raise ProgramError(f"these {len(data)} bytes are no pipeline program: {error}") from error
        return program

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the serialised program, in hexadecimal digits."""
        return hashlib.sha256(self.serialise()).hexdigest()


def chained(ranks: Sequence[int], is_generating: bool = False) -> Topology:
    """Stage i, on `ranks[i]`, feeds stage i + 1, and gets its gradient. Generating: tokens come home in their place."""
    stages = tuple(Stage(at, rank, at) for at, rank in enumerate(ranks))
    last = len(stages) - 1
    joints = [(at, at + 1, EdgeKind.ACTIVATION) for at in range(last)]
    joints += [(last, 0, EdgeKind.TOKEN)] if is_generating else [(at + 1, at, EdgeKind.GRADIENT) for at in range(last)]
    return Topology(stages, tuple(Edge(at, *joint) for at, joint in enumerate(joints)))


def par(one: Instruction, other: Instruction) -> tuple[Instruction, Instruction]:
    """The two co-issued, as neighbours in a rank's list. Both are of `COMPUTE`, and neither needs the other."""
    return replace(one, is_with_next=True), other


_Plain: TypeAlias = tuple[str, int | None, int | None, int | None, int, bool]


def _plain(each: Instruction) -> _Plain:
    edge = None if each.edge is None else each.edge.id
    return each.op.value, each.stage, each.microbatch, edge, each.trip, each.is_with_next


def _instruction(plain: Sequence[object], topology: Topology) -> Instruction:
    op, stage, microbatch, edge, trip, is_with_next = plain
    at = None if edge is None else topology.edges[_whole(edge)]
    where, which = (None if each is None else _whole(each) for each in (stage, microbatch))
    if not isinstance(is_with_next, bool):
        raise ValueError(f"{is_with_next!r} is neither true nor false")
    return Instruction(Op(str(op)), where, which, at, _whole(trip), is_with_next)


def _whole(number: object) -> int:
    """bool is no number, though Python counts it as one."""
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no whole number")
    return number


def _has_whole_numbers(program: Program) -> bool:
    numbers = [program.num_microbatches]
    for stage in program.topology.stages:
        numbers += stage.rank, stage.replica_group
    for edge in program.topology.edges:
        numbers += edge.source, edge.target
    return all(_whole(number) >= 0 for number in numbers)
