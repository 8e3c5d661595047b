"""What each rank does when, as responses are generated: a ring of turns that every rank walks by itself. Pure.

In a *trip* a microbatch goes round the ring once, and each of its live sequences gains a token:

    stage 0            stage 1            stage 2 (last)
    FORWARD  --hidden--> FORWARD --hidden--> FORWARD, SAMPLE
       ^ -----tokens----->                      |
       └────────────────── tokens ──────────────┘

Where ranks hold several stages (chunks), stage s is on rank s mod p, and a trip passes each rank several times:

    rank 0   stage 0   .   stage 2   .         then tokens come home
    rank 1     .  stage 1    .  stage 3 (last)

    what a rank does in a trip                              first chunk, from   on ranks
                                                            the second trip on
      RECEIVE tokens, a mark for each row of the last trip  yes                 all but the last, which made them
      SEND    them on                                       yes                 all but the last two
      CLOSE   if no row goes on and none joins              yes                 all, for each stage

                                                            in each chunk
      RECEIVE hidden states                                 yes                 all, but for stage 0
      FORWARD rows that go on, and those that join          yes                 all
      SEND    hidden states                                 yes                 all, but for the last stage
      SAMPLE, SEND tokens home                              the last            the last

Tokens are header and input in one: they say who goes on, and so, by `slots`, who joins, how long every message is, and
when a microbatch is closed: then the header passes down the ring by itself, and nothing is computed for it any more.

Open microbatches take turns, the same on every rank, since all learn of a close in the same turn: all of them in the
first chunk, then all in the second, and so on; so ranks are as busy as can be if as many are open as there are ranks,
and no more are. A turn needs only what the ring made in earlier turns, and sends never wait, so there is no deadlock
for any number of ranks, chunks and microbatches.

A RECEIVE begins one, as early as the order of messages allows: what comes next from the rank before. Invariant: each
rank begins its receives from another in the order of the other's sends, tags apart (which NCCL does not know).
"""

from __future__ import annotations

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
"""Instructions of one rank. Whoever runs them sends back what is wanted, and otherwise None."""


def ring(num_ranks: int, num_chunks: int = 1) -> Topology:
    """Stage s is on rank s mod `num_ranks`. Tokens go from the last stage to the first, and on to all other ranks."""
    num_stages = num_ranks * num_chunks
    joints = [(at, at + 1, EdgeKind.ACTIVATION) for at in range(num_stages - 1)]
    joints += [((at - 1) % num_stages, at, EdgeKind.TOKEN) for at in range(max(num_ranks - 1, 1))]
    stages = tuple(Stage(at, at % num_ranks, at) for at in range(num_stages))
    return Topology(stages, tuple(Edge(at, *joint) for at, joint in enumerate(joints)))


def turns(topology: Topology, rank: int, slots: Slots) -> Turns:
    """What a rank of a `ring` does, from the first trip to the last close."""
    return _Walk(topology, rank, slots).turns()


class _Walk:
    """One rank's way round the ring."""

    def __init__(self, topology: Topology, rank: int, slots: Slots) -> None:
        self._topology, self._slots = topology, slots
        self._stages = [stage.id for stage in topology.stages_of(rank)]
        self._first, self._last = self._stages[0], self._stages[-1]
        self._is_last = self._last == len(topology.stages) - 1
        self._hurries = rank == 0 or self._is_last
        """Whether it begins to receive what comes back as soon as it has sent; others get tokens in between."""

    def turns(self) -> Turns:
        pools: list[Pool] = list(self._slots.opened)
        if self._is_last:
            for pool in pools:
                yield from self._receive(pool, self._first)
        while pools:
            if not self._is_last:
                pools = yield from self._settled(pools)
                continue
            for stage in self._stages[:-1]:
                for pool in pools:
                    yield from self._pass(pool, stage)
            pools = yield from self._sampled(pools)

    def _settled(self, pools: Sequence[Pool]) -> Generator[Turn, Sequence[int] | None, list[Pool]]:
        """A round of any rank but the last. Returns the pools that are open now."""
        opened = []
        for pool in pools:
            successor: Pool | None = pool
            if pool.trip > 0:
                marks = yield from self._tokens(pool)
                successor = self._slots.settle(pool, marks)
                if successor is not pool:
                    yield from self._close(pool)
            if successor is not None:
                yield from self._pass(successor, self._first)
                opened.append(successor)
        for stage in self._stages[1:]:
            for pool in opened:
                yield from self._pass(pool, stage)
        for pool in opened:
            pool.trip += 1
        return opened

    def _sampled(self, pools: Sequence[Pool]) -> Generator[Turn, Sequence[int] | None, list[Pool]]:
        """The last stage's turns. It learns nothing from tokens that it made itself, and so knows one trip before the
        others who goes on. Returns the pools that are open now."""
        opened = []
        for pool in pools:
            yield self._compute(Op.FORWARD, pool, self._last)
            marks = yield Turn(self._compute(Op.SAMPLE, pool, self._last).instruction, pool, is_answered=True)
            assert marks is not None, "whoever runs this answers"
            yield from self._send(pool, self._last, EdgeKind.TOKEN)
            pool.trip += 1
            successor = self._slots.settle(pool, marks)
            if successor is not pool:
                yield from self._close(pool)
            if successor is not None:
                yield from self._receive(successor, self._first)
                opened.append(successor)
        return opened

    def _tokens(self, pool: Pool) -> Generator[Turn, Sequence[int] | None, Sequence[int]]:
        """Of the last trip."""
        (edge,) = self._topology.into(self._first, EdgeKind.TOKEN)
        receive = Instruction(Op.RECEIVE, None, pool.microbatch, edge, pool.trip - 1)
        if not self._hurries:
            yield Turn(receive, pool)
        marks = yield Turn(receive, pool, is_answered=True)
        assert marks is not None, "whoever runs this answers"
        yield from self._send(pool, self._first, EdgeKind.TOKEN, trip=pool.trip - 1)
        return marks

    def _pass(self, pool: Pool, stage: int) -> Turns:
        """Of any stage but the last."""
        if not self._hurries:
            yield from self._receive(pool, stage)
        yield self._compute(Op.FORWARD, pool, stage)
        yield from self._send(pool, stage, EdgeKind.ACTIVATION)
        if self._hurries:
            yield from self._receive(pool, self._next(stage))

    def _next(self, stage: int) -> int:
        """Where the microbatch comes back to this rank."""
        return self._first if stage == self._last else self._stages[self._stages.index(stage) + 1]

    def _close(self, pool: Pool) -> Turns:
        for stage in self._stages:
            yield self._compute(Op.CLOSE, pool, stage)

    def _compute(self, op: Op, pool: Pool, stage: int) -> Turn:
        return Turn(Instruction(op, stage, pool.microbatch, trip=pool.trip), pool)

    def _receive(self, pool: Pool, stage: int) -> Turns:
        """What a stage needs next: hidden states, or, on the first, the tokens of this trip."""
        kind = EdgeKind.TOKEN if stage == 0 else EdgeKind.ACTIVATION
        yield from self._messages(Op.RECEIVE, pool, self._topology.into(stage, kind), pool.trip)

    def _send(self, pool: Pool, stage: int, kind: EdgeKind, trip: int | None = None) -> Turns:
        at = pool.trip if trip is None else trip
        yield from self._messages(Op.SEND, pool, self._topology.out_of(stage, kind), at)

    def _messages(self, op: Op, pool: Pool, edges: Sequence[Edge], trip: int) -> Turns:
        """None within a rank."""
        for edge in edges:
            if not self._topology.is_local(edge):
                yield Turn(Instruction(op, None, pool.microbatch, edge, trip), pool)
