"""Proves a program before it runs: it ends, in order, and does everything once. Pure.

Sends are buffered, as the runner's are (it never waits for a send before the end of the program). Channels are first
in, first out, so a receive must find its own message at the head.
"""

from __future__ import annotations

from collections import Counter, deque

from ...api.errors import ProgramError
from .instructions import Edge, EdgeKind, Instruction, Op, Program


def verify(program: Program) -> None:
    """Raises `ProgramError` naming the first instruction that cannot run, or that is missing or doubled."""
    _check_counts(program)
    done: set[Instruction] = set()
    channels: dict[Edge, deque[int | None]] = {}
    at = [0] * len(program.ranks)
    progress = True
    while progress:
        progress = False
        for rank, instructions in enumerate(program.ranks):
            while at[rank] < len(instructions) and _can_run(
                instructions[at[rank]], len(program.ranks) - 1, done, channels
            ):
                _run(instructions[at[rank]], done, channels)
                at[rank] += 1
                progress = True
    stuck = [instructions[at[rank]] for rank, instructions in enumerate(program.ranks) if at[rank] < len(instructions)]
    if stuck:
        raise ProgramError(f"{program.name}: the program cannot get past {', '.join(map(str, stuck))}")
    left = [edge for edge, queue in channels.items() if queue]
    if left:
        raise ProgramError(f"{program.name}: messages on {left} are sent but never received")


def _check_counts(program: Program) -> None:
    training = any(instruction.op is Op.BACKWARD for rank in program.ranks for instruction in rank)
    for stage, instructions in enumerate(program.ranks):
        for instruction in instructions:
            _check_place(program, instruction, stage)
        for instruction, times in Counter(instructions).items():
            if times > 1:
                raise ProgramError(f"{program.name}: {instruction} stands {times} times in rank {stage}")
        counts: Counter[tuple[Op, int | None]] = Counter(
            (each.op, each.microbatch) for each in instructions if each.op in (Op.FORWARD, Op.BACKWARD)
        )
        ops = (Op.FORWARD, Op.BACKWARD) if training else (Op.FORWARD,)
        wanted: Counter[tuple[Op, int | None]] = Counter(
            (op, microbatch) for op in ops for microbatch in range(program.num_microbatches)
        )
        for op, microbatch in (counts - wanted) + (wanted - counts):
            times = counts[op, microbatch]
            raise ProgramError(
                f"{program.name}: {Instruction(op, stage, microbatch)} stands {times} times in rank {stage}"
            )
        ends = [(at, each.op) for at, each in enumerate(instructions) if each.op in (Op.REDUCE, Op.STEP)]
        last = len(instructions) - 1
        if ends != ([(last - 1, Op.REDUCE), (last, Op.STEP)] if training else []):
            raise ProgramError(f"{program.name}: rank {stage} must end in one REDUCE and one STEP, not {ends}")


def _check_place(program: Program, instruction: Instruction, stage: int) -> None:
    """Every instruction is of its rank's stage, and its edge starts or ends there."""
    edge = instruction.edge
    if edge is None:
        fits = instruction.op not in (Op.SEND, Op.RECEIVE)
    else:
        own, other = (edge.source, edge.target) if instruction.op is Op.SEND else (edge.target, edge.source)
        fits = own == stage and abs(own - other) == 1 and 0 <= other < len(program.ranks)
    if instruction.stage != stage or not fits:
        raise ProgramError(f"{program.name}: {instruction} cannot stand in rank {stage} of {len(program.ranks)}")


def _can_run(
    instruction: Instruction, last_stage: int, done: set[Instruction], channels: dict[Edge, deque[int | None]]
) -> bool:
    stage, microbatch, edge = instruction.stage, instruction.microbatch, instruction.edge
    match instruction.op:
        case Op.FORWARD:
            arrives = Instruction(Op.RECEIVE, stage, microbatch, Edge(EdgeKind.ACTIVATION, stage - 1, stage))
            return stage == 0 or arrives in done
        case Op.BACKWARD:
            # the last stage starts a backward from its own loss, the others from a received gradient
            arrives = Instruction(Op.RECEIVE, stage, microbatch, Edge(EdgeKind.GRADIENT, stage + 1, stage))
            return Instruction(Op.FORWARD, stage, microbatch) in done and (stage == last_stage or arrives in done)
        case Op.SEND:
            assert edge is not None, "a SEND has an edge"
            op = Op.FORWARD if edge.kind is EdgeKind.ACTIVATION else Op.BACKWARD
            return Instruction(op, stage, microbatch) in done
        case Op.RECEIVE:
            assert edge is not None, "a RECEIVE has an edge"
            return edge in channels and bool(channels[edge]) and channels[edge][0] == microbatch
        case Op.REDUCE | Op.STEP:
            return True


def _run(instruction: Instruction, done: set[Instruction], channels: dict[Edge, deque[int | None]]) -> None:
    done.add(instruction)
    if instruction.op is Op.SEND:
        assert instruction.edge is not None, "a SEND has an edge"
        channels.setdefault(instruction.edge, deque()).append(instruction.microbatch)
    elif instruction.op is Op.RECEIVE:
        assert instruction.edge is not None, "a RECEIVE has an edge"
        channels[instruction.edge].popleft()
