"""From compute to a whole program: adds SEND and RECEIVE, and verifies the result. Pure."""

from __future__ import annotations

from functools import lru_cache

from .instructions import Edge, EdgeKind, Instruction, Op, Program
from .schedules import Compute, forward_only, one_f_one_b
from .verify import verify


@lru_cache(maxsize=256)
def training_program(num_stages: int, num_microbatches: int) -> Program:
    """1F1B with communication, verified."""
    return _lowered("1f1b", one_f_one_b(num_stages, num_microbatches), num_microbatches)


@lru_cache(maxsize=256)
def inference_program(num_stages: int, num_microbatches: int) -> Program:
    """Forward only with communication, verified."""
    return _lowered("forward", forward_only(num_stages, num_microbatches), num_microbatches)


def _lowered(name: str, compute: Compute, num_microbatches: int) -> Program:
    program = Program(name=name, num_microbatches=num_microbatches, ranks=add_communication(compute))
    verify(program)
    return program


def add_communication(compute: Compute) -> Compute:
    """A RECEIVE right before each instruction that needs a neighbour's result, a SEND right after each that has one."""
    last = len(compute) - 1
    ranks = []
    for instructions in compute:
        lowered: list[Instruction] = []
        for instruction in instructions:
            stage, microbatch = instruction.stage, instruction.microbatch
            match instruction.op:
                case Op.FORWARD:
                    source, target, kind = stage - 1, stage + 1, EdgeKind.ACTIVATION
                case Op.BACKWARD:
                    source, target, kind = stage + 1, stage - 1, EdgeKind.GRADIENT
                case _:
                    lowered.append(instruction)
                    continue
            if 0 <= source <= last:
                lowered.append(Instruction(Op.RECEIVE, stage, microbatch, Edge(kind, source, stage)))
            lowered.append(instruction)
            if 0 <= target <= last:
                lowered.append(Instruction(Op.SEND, stage, microbatch, Edge(kind, stage, target)))
        ranks.append(tuple(lowered))
    return tuple(ranks)
