"""Schedules: pure functions from (stages, microbatches) to the compute instructions of each rank, in order.

Communication is not their business: `lowering` adds it.
"""

from __future__ import annotations

from .instructions import Instruction, Op

Compute = tuple[tuple[Instruction, ...], ...]


def forward_only(num_stages: int, num_microbatches: int) -> Compute:
    """Every microbatch forward through every stage: inference."""
    return tuple(
        tuple(Instruction(Op.FORWARD, stage, microbatch) for microbatch in range(num_microbatches))
        for stage in range(num_stages)
    )


def one_f_one_b(num_stages: int, num_microbatches: int) -> Compute:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): rank s runs up to `num_stages - s` microbatches ahead of its backwards.

    At most `min(num_stages - s, num_microbatches)` microbatches are live on rank s; its bubble is that of fill-drain.
    Ends with REDUCE and STEP.
    """
    ranks = []
    for stage in range(num_stages):
        warmup = min(num_stages - stage - 1, num_microbatches)
        ops = [Instruction(Op.FORWARD, stage, microbatch) for microbatch in range(warmup)]
        for microbatch in range(num_microbatches - warmup):
            ops.append(Instruction(Op.FORWARD, stage, warmup + microbatch))
            ops.append(Instruction(Op.BACKWARD, stage, microbatch))
        for microbatch in range(num_microbatches - warmup, num_microbatches):
            ops.append(Instruction(Op.BACKWARD, stage, microbatch))
        ranks.append((*ops, Instruction(Op.REDUCE, stage), Instruction(Op.STEP, stage)))
    return tuple(ranks)
