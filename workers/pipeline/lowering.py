"""From a schedule to a program that can run: passes, each a pure function from program to program.

schedule           compute only
add_recompute      (if asked) activations are made again before the backward
verify_compute     everything is there once, and in an order that can be run
add_communication  SEND and RECEIVE where an edge joins two ranks
verify             the proof that it runs
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from .dependencies import inputs, outputs
from .instructions import BACKWARDS, Instruction, Op, Program
from .schedules import Kind, schedule
from .simulate import Times, simulate
from .verify import verify, verify_compute


@lru_cache(maxsize=256)
def training_program(
    num_ranks: int,
    num_microbatches: int,
    kind: Kind = Kind.ONE_F_ONE_B,
    num_chunks: int = 1,
    recompute: bool = False,
) -> Program:
    """With communication, verified."""
    return lowered(schedule(kind, num_ranks, num_microbatches, num_chunks), recompute)


@lru_cache(maxsize=256)
def inference_program(num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> Program:
    """Forward only with communication, verified."""
    return lowered(schedule(Kind.FORWARD, num_ranks, num_microbatches, num_chunks))


def lowered(compute: Program, recompute: bool = False) -> Program:
    """All passes. Raises ProgramError if the schedule cannot be run."""
    if recompute:
        compute = add_recompute(compute)
    verify_compute(compute)
    program = add_communication(compute)
    verify(program)
    return program


def add_recompute(program: Program) -> Program:
    """A RECOMPUTE right before each backward: its forward keeps nothing but its input until then.

    None where the backward follows its forward at once, for there it would free nothing.
    """
    ranks = []
    for instructions in program.ranks:
        changed: list[Instruction] = []
        for each in instructions:
            is_second = changed[-1:] != [] and changed[-1].is_with_next
            at = len(changed) - is_second  # before both that are co-issued
            forward = Instruction(Op.FORWARD, each.stage, each.microbatch)
            if each.op in BACKWARDS and changed[at - 1 : at] != [forward]:
                changed.insert(at, Instruction(Op.RECOMPUTE, each.stage, each.microbatch))
            changed.append(each)
        ranks.append(tuple(changed))
    return replace(program, ranks=tuple(ranks))


def add_communication(program: Program, lookahead: int = 1) -> Program:
    """A SEND right after each instruction whose result another rank needs, and its RECEIVE on that rank.

    A RECEIVE stands `lookahead` compute instructions ahead of its use, so that the message travels while the rank
    computes; less where it would stand before its SEND could, and more only where otherwise ranks that send to each
    other would wait for each other forever (if a send waits for its receive). Then the one is brought forward that has
    the shortest way to its use. Receives farther ahead only hold buffers, and the fabric (pytorch#172668, #188833).
    What stays within a rank costs nothing.
    """
    return replace(program, ranks=_Meetings(program, lookahead).ranks())


class _Meetings:
    """Walks all ranks at once, and has two of them meet for each message: no rank passes its SEND before they do.

    So there is one order of all instructions and messages that every rank follows, and in which it cannot hang.
    """

    def __init__(self, program: Program, lookahead: int) -> None:
        self._program, self._lookahead = program, lookahead
        self._topology = program.topology
        self._done: list[list[Instruction]] = [[] for _ in program.ranks]
        self._at = [0] * len(program.ranks)
        self._outbox: list[deque[Instruction]] = [deque() for _ in program.ranks]
        """Sends that a rank has come to."""
        self._received: set[Instruction] = set()
        self._ends: dict[Instruction, float] = {}
        """When compute ends, if all of it takes as long."""
        self._ready: dict[Instruction, float] = {}
        """When what is sent has been made."""
        self._use: dict[Instruction, int] = {}
        """Where a message is used, by its receive."""
        for instructions, spans in zip(program.ranks, simulate(program, Times()).ranks, strict=True):
            for position, (each, span) in enumerate(zip(instructions, spans, strict=True)):
                self._ends[each] = span.end
                is_second = position > 0 and instructions[position - 1].is_with_next
                self._use.update(dict.fromkeys(self._receives(each), position - is_second))

    def ranks(self) -> tuple[tuple[Instruction, ...], ...]:
        while True:
            while sum(map(self._walk, range(len(self._done)))):
                pass
            if not any(self._outbox):
                break
            self._bring_forward()
        assert all(at == len(each) for at, each in zip(self._at, self._program.ranks, strict=True)), (
            "compute can be run"
        )
        return tuple(map(tuple, self._done))

    def _receives(self, each: Instruction) -> Iterator[Instruction]:
        """What an instruction must have received."""
        if each.stage is not None:
            for edge, trips_before in inputs(self._topology, each.op, each.stage):
                if trips_before <= each.trip and not self._topology.is_local(edge):
                    yield Instruction(Op.RECEIVE, None, each.microbatch, edge, each.trip - trips_before)

    def _walk(self, rank: int) -> bool:
        """As far as the rank gets without bringing anything forward. Whether that is any way."""
        instructions, has_moved = self._program.ranks[rank], False
        while True:
            if self._outbox[rank]:
                if self._ahead(rank) > self._lookahead:
                    return has_moved
                self._meet(rank)
            elif self._at[rank] == len(instructions) or any(map(self._lacks, together := self._next(rank))):
                return has_moved
            else:
                self._take(rank)
                self._compute(rank, together)
            has_moved = True

    def _next(self, rank: int) -> tuple[Instruction, ...]:
        """One, or two that are co-issued."""
        at, instructions = self._at[rank], self._program.ranks[rank]
        return instructions[at : at + 1 + instructions[at].is_with_next]

    def _take(self, rank: int) -> None:
        """What others are about to send to a rank that is about to compute, as far as it looks ahead."""
        for sender in range(len(self._outbox)):
            while self._outbox[sender] and self._receiver(sender) == rank and self._ahead(sender) <= self._lookahead:
                self._meet(sender)

    def _compute(self, rank: int, together: Sequence[Instruction]) -> None:
        self._done[rank] += together
        self._at[rank] += len(together)
        for each in together:
            for edge in outputs(self._topology, each):
                if not self._topology.is_local(edge):
                    send = Instruction(Op.SEND, None, each.microbatch, edge, each.trip)
                    self._outbox[rank].append(send)
                    self._ready[send] = self._ends[each]

    def _lacks(self, each: Instruction) -> bool:
        """Whether the instruction still needs a message."""
        return any(receive not in self._received for receive in self._receives(each))

    def _offer(self, sender: int) -> Instruction:
        """The receive of what a rank is about to send."""
        return replace(self._outbox[sender][0], op=Op.RECEIVE)

    def _receiver(self, sender: int) -> int:
        edge = self._outbox[sender][0].edge
        assert edge is not None, "a SEND has an edge"
        return self._topology.ends(edge)[1]

    def _meet(self, sender: int) -> None:
        receiver, receive = self._receiver(sender), self._offer(sender)
        self._done[sender].append(self._outbox[sender].popleft())
        self._done[receiver].append(receive)
        self._received.add(receive)

    def _ahead(self, sender: int) -> int:
        """Compute instructions between where the receiver is and where it uses what is about to be sent."""
        return self._use[self._offer(sender)] - self._at[self._receiver(sender)]

    def _bring_forward(self) -> None:
        """One receive, where every rank waits for another: the one that is used soonest, of these the oldest."""
        senders = [rank for rank, sends in enumerate(self._outbox) if sends]
        self._meet(min(senders, key=lambda rank: (self._ahead(rank), self._ready[self._outbox[rank][0]])))
