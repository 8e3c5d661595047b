"""What each stage does when, as responses are generated: a ring of turns that every stage walks by itself. Pure.

In a *trip* a microbatch goes round the ring once, and each of its live sequences gains a token:

    stage 0            stage 1            stage 2 (last)
    FORWARD  --hidden--> FORWARD --hidden--> FORWARD, SAMPLE
       ^ -----tokens----->                      |
       └────────────────── tokens ──────────────┘

    what a stage does in a trip                                 first trip   on stages
      RECEIVE tokens, a mark for each row of the last trip      -            all but the last, which made them
      SEND    them on                                           -            all but the last two
      CLOSE   if no row goes on and none joins                  -            all
      RECEIVE hidden states                                     yes          all but the first
      FORWARD rows that go on, and those that join              yes          all
      SEND    hidden states                                     yes          all but the last
      SAMPLE, SEND tokens home                                  yes          the last

Tokens are header and input in one: they say who goes on, and so, by `slots`, who joins, how long every message is, and
when a microbatch is closed: then the header passes down the ring by itself, and nothing is computed for it any more.

Open microbatches take turns, the same on every stage, since all learn of a close in the same turn. A trip needs only
what the ring made in earlier turns, and sends never wait, so there is no deadlock for any number of stages and
microbatches; at most as many are open as there are stages.

A RECEIVE begins one, as early as the order of messages allows: what comes next from the stage before. Invariant: each
stage begins its receives from another in the order of the other's sends, tags apart (which NCCL does not know).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .instructions import Edge, EdgeKind, Instruction, Op, Stage, Topology
from .slots import Pool, Slots


@dataclass(frozen=True, slots=True)
class Turn:
    """One instruction, and the pool that it is for."""

    instruction: Instruction
    pool: Pool
    is_answered: bool = False
    """Whether the marks of this trip are wanted: those that SAMPLE made, or that the last RECEIVE of tokens brings."""


Turns: TypeAlias = Generator[Turn, Sequence[int] | None, None]
"""Instructions of one stage. Whoever runs them sends back what is wanted, and otherwise None."""


def ring(num_stages: int) -> Topology:
    """One stage a rank. Tokens go from the last to the first, and on to the last but one."""
    last = num_stages - 1
    joints = [(at, at + 1, EdgeKind.ACTIVATION) for at in range(last)]
    joints += [((at - 1) % num_stages, at, EdgeKind.TOKEN) for at in range(max(last, 1))]
    stages = tuple(Stage(at, at, at) for at in range(num_stages))
    return Topology(stages, tuple(Edge(at, *joint) for at, joint in enumerate(joints)))


def turns(topology: Topology, stage: int, slots: Slots) -> Turns:
    """What a stage of a `ring` does, from the first trip to the last close."""
    return _Seat(topology, stage, slots).turns()


class _Seat:
    """One stage's place in the ring."""

    def __init__(self, topology: Topology, stage: int, slots: Slots) -> None:
        self._stage, self._slots = stage, slots
        self._is_first, self._is_last = stage == 0, stage == len(topology.stages) - 1
        self._is_alone = self._is_first and self._is_last
        self._into = {kind: next(iter(topology.into(stage, kind)), None) for kind in EdgeKind}
        self._out_of = {kind: next(iter(topology.out_of(stage, kind)), None) for kind in EdgeKind}

    def turns(self) -> Turns:
        places = deque(self._slots.opened)
        if self._is_last and not self._is_alone:
            for pool in places:
                yield self._receive(pool, EdgeKind.ACTIVATION)
        while places:
            turn = self._turn_of_last(places.popleft()) if self._is_last else self._turn(places.popleft())
            successor = yield from turn
            if successor is not None:
                places.append(successor)

    def _turn(self, pool: Pool) -> Generator[Turn, Sequence[int] | None, Pool | None]:
        """Of any stage but the last. Returns the pool that has the place now, if any."""
        if pool.trip > 0:
            marks = yield from self._tokens(pool)
            successor = self._slots.settle(pool, marks)
            if successor is not pool:
                yield self._compute(Op.CLOSE, pool)
            if successor is None:
                return None
            pool = successor
        if not self._is_first:
            yield self._receive(pool, EdgeKind.ACTIVATION)
        yield self._compute(Op.FORWARD, pool)
        yield self._send(pool, EdgeKind.ACTIVATION)
        if self._is_first:
            yield self._receive(pool, EdgeKind.TOKEN)
        pool.trip += 1
        return pool

    def _tokens(self, pool: Pool) -> Generator[Turn, Sequence[int] | None, Sequence[int]]:
        """Of the last trip."""
        if not self._is_first:
            yield self._receive(pool, EdgeKind.TOKEN, trip=pool.trip - 1)
        wait = self._receive(pool, EdgeKind.TOKEN, trip=pool.trip - 1)
        marks = yield Turn(wait.instruction, pool, is_answered=True)
        assert marks is not None, "whoever runs this answers"
        if self._out_of[EdgeKind.TOKEN] is not None:
            yield self._send(pool, EdgeKind.TOKEN, trip=pool.trip - 1)
        return marks

    def _turn_of_last(self, pool: Pool) -> Generator[Turn, Sequence[int] | None, Pool | None]:
        """It learns nothing from tokens that it made itself, and so knows one turn before the others who goes on."""
        yield self._compute(Op.FORWARD, pool)
        marks = yield Turn(self._compute(Op.SAMPLE, pool).instruction, pool, is_answered=True)
        assert marks is not None, "whoever runs this answers"
        if not self._is_alone:
            yield self._send(pool, EdgeKind.TOKEN)
        pool.trip += 1
        successor = self._slots.settle(pool, marks)
        if successor is not pool:
            yield self._compute(Op.CLOSE, pool)
        if successor is not None and not self._is_alone:
            yield self._receive(successor, EdgeKind.ACTIVATION)
        return successor

    def _compute(self, op: Op, pool: Pool) -> Turn:
        return Turn(Instruction(op, self._stage, pool.microbatch, trip=pool.trip), pool)

    def _send(self, pool: Pool, kind: EdgeKind, trip: int | None = None) -> Turn:
        return self._message(Op.SEND, pool, self._out_of[kind], trip)

    def _receive(self, pool: Pool, kind: EdgeKind, trip: int | None = None) -> Turn:
        return self._message(Op.RECEIVE, pool, self._into[kind], trip)

    def _message(self, op: Op, pool: Pool, edge: Edge | None, trip: int | None) -> Turn:
        assert edge is not None, f"stage {self._stage} has no such edge"
        at = pool.trip if trip is None else trip
        return Turn(Instruction(op, None, pool.microbatch, edge, at), pool)
