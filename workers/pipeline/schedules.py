"""Schedules: pure functions from (stages, microbatches, ...) to programs that have compute only.

Each says in what order a rank works; communication is not their business: `lowering` adds it. All take any number of
microbatches, also fewer than there are ranks. Their figures are in `formulas`, their pictures in docs/pipelines.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import assert_never

from .instructions import Instruction, Op, Program, chained


class Kind(StrEnum):
    """What `schedule` makes: each `api.config.Schedule`, by its value, and FORWARD, which is no choice of a layout, for
    inference has it with every schedule."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb-h1"
    FORWARD = "forward"


def schedule(kind: Kind, num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> Program:
    """By name. `num_chunks` is of interleaved and forward alone."""
    match kind:
        case Kind.GPIPE:
            return gpipe(num_ranks, num_microbatches)
        case Kind.ONE_F_ONE_B:
            return one_f_one_b(num_ranks, num_microbatches)
        case Kind.INTERLEAVED:
            return interleaved(num_ranks, num_microbatches, num_chunks)
        case Kind.ZB_H1:
            return zb_h1(num_ranks, num_microbatches)
        case Kind.FORWARD:
            return forward_only(num_ranks, num_microbatches, num_chunks)
        case _:
            assert_never(kind)


def forward_only(num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> Program:
    """Every microbatch forward through every stage: inference. Stages and groups are those of `interleaved`."""
    groups = _groups(num_ranks, num_microbatches)
    ranks = [
        [
            Instruction(Op.FORWARD, stage, at)
            for group in groups
            for stage in range(rank, num_ranks * num_chunks, num_ranks)
            for at in group
            if at < num_microbatches
        ]
        for rank in range(num_ranks)
    ]
    return _program(Kind.FORWARD, num_microbatches, list(range(num_ranks)) * num_chunks, ranks)


def gpipe(num_stages: int, num_microbatches: int) -> Program:
    """Fill and drain: all forwards, then all backwards (GPipe, arXiv 1811.06965). Holds all microbatches at once."""
    ranks = [
        [*_all(Op.FORWARD, stage, num_microbatches), *_all(Op.BACKWARD, stage, num_microbatches)]
        for stage in range(num_stages)
    ]
    return _program(Kind.GPIPE, num_microbatches, range(num_stages), ranks)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Program:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): rank s runs up to `num_stages - s` microbatches ahead of its backwards.

    At most `min(num_stages - s, num_microbatches)` microbatches are live on rank s; its bubble is that of fill-drain.
    """
    ranks = []
    for stage in range(num_stages):
        forwards = _all(Op.FORWARD, stage, num_microbatches)
        backwards = _all(Op.BACKWARD, stage, num_microbatches)
        ranks.append(_alternating(forwards, backwards, ahead=num_stages - stage - 1))
    return _program(Kind.ONE_F_ONE_B, num_microbatches, range(num_stages), ranks)


def interleaved(num_ranks: int, num_microbatches: int, num_chunks: int) -> Program:
    """Interleaved 1F1B (Megatron-LM, arXiv 2104.04473, section 2.2): stage c * num_ranks + r is chunk c of rank r.

    Microbatches go in groups of `num_ranks`, a group through all chunks before the next begins. Rank s runs
    2 * (num_ranks - s - 1) + (num_chunks - 1) * num_ranks chunks ahead of its backwards. Where the last group is not
    full, the order is that of full groups less the microbatches that are not there: a shorter last group would have
    ranks wait for each other (4 ranks, 3 chunks, 5 microbatches), and leaving out what nothing depends on cannot.
    """
    groups = _groups(num_ranks, num_microbatches)
    ranks = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * num_chunks, num_ranks)
        forwards = [Instruction(Op.FORWARD, stage, at) for group in groups for stage in stages for at in group]
        backwards = [Instruction(Op.BACKWARD, stage, at) for group in groups for stage in stages[::-1] for at in group]
        ahead = 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks
        order = _alternating(forwards, backwards, ahead)
        ranks.append([each for each in order if each.microbatch in range(num_microbatches)])
    return _program(Kind.INTERLEAVED, num_microbatches, list(range(num_ranks)) * num_chunks, ranks)


def zb_h1(num_stages: int, num_microbatches: int) -> Program:
    """ZB-H1 (zero bubble, arXiv 2401.10241, section 2.1): 1F1B whose rank s is s gradients of weights behind.

    They fill the time in which it would wait at the end. Every rank then holds as much as the first one of 1F1B.
    """
    ranks = []
    for stage in range(num_stages):
        forwards = _all(Op.FORWARD, stage, num_microbatches)
        by_input = _all(Op.INPUT_GRADIENT, stage, num_microbatches)
        by_weight = _all(Op.WEIGHT_GRADIENT, stage, num_microbatches)
        order: list[Instruction] = []
        for each in _alternating(forwards, by_input, ahead=num_stages - stage - 1):
            order.append(each)
            if each.op is Op.INPUT_GRADIENT and each.microbatch is not None and each.microbatch >= stage:
                order.append(by_weight[each.microbatch - stage])
        ranks.append([*order, *by_weight[max(num_microbatches - stage, 0) :]])
    return _program(Kind.ZB_H1, num_microbatches, range(num_stages), ranks)


def generation(num_ranks: int, trips: Sequence[int], num_chunks: int = 1) -> Program:
    """A ring in which microbatch i takes `trips[i]` trips, one token each, and is closed by the stages in turn.

    Stage c * num_ranks + r is chunk c of rank r. At most `num_ranks` microbatches are open. Open ones take turns, all
    of them in one chunk after the other; a closed one gives its place to the next. Turns are the same on every rank,
    and nothing is computed for a closed one. Which trip is a microbatch's last shows only as it runs: a generation
    program is made with hindsight, or to prove what any outcome would do.
    """
    unopened = deque((microbatch, 0) for microbatch in range(len(trips)))
    places = [unopened.popleft() for _ in range(min(num_ranks, len(trips)))]
    num_stages = num_ranks * num_chunks
    ranks: list[list[Instruction]] = [[] for _ in range(num_ranks)]
    while places:
        turns, places = places, []
        for microbatch, trip in list(turns):
            if trip < trips[microbatch]:
                places.append((microbatch, trip + 1))
            elif unopened:
                opened = unopened.popleft()
                turns.insert(turns.index((microbatch, trip)) + 1, opened)
                places.append((opened[0], 1))
        for stage in range(num_stages):
            order = ranks[stage % num_ranks]
            for microbatch, trip in turns:
                is_live = trip < trips[microbatch]
                order.append(Instruction(Op.FORWARD if is_live else Op.CLOSE, stage, microbatch, trip=trip))
                if is_live and stage == num_stages - 1:
                    order.append(Instruction(Op.SAMPLE, stage, microbatch, trip=trip))
    topology = chained(list(range(num_ranks)) * num_chunks, is_generating=True)
    return Program("generation", len(trips), topology, tuple(map(tuple, ranks)))


def _groups(num_ranks: int, num_microbatches: int) -> list[range]:
    """Of `num_ranks` microbatches each; the last may have some that are not there."""
    return [range(first, first + num_ranks) for first in range(0, num_microbatches, num_ranks)]


def _all(op: Op, stage: int, num_microbatches: int) -> list[Instruction]:
    return [Instruction(op, stage, microbatch) for microbatch in range(num_microbatches)]


def _alternating(forwards: Sequence[Instruction], backwards: Sequence[Instruction], ahead: int) -> list[Instruction]:
    """`ahead` forwards, then one forward and one backward by turns, then the backwards that are left."""
    order = list(forwards[:ahead])
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += forward, backward
    return [*order, *backwards[max(len(forwards) - ahead, 0) :]]


def _program(
    kind: Kind, num_microbatches: int, places: Sequence[int], ranks: Iterable[Sequence[Instruction]]
) -> Program:
    """With the end of a step where there are gradients. `places`: the rank of each stage of a chain."""
    topology = chained(places)
    ended = []
    for rank, instructions in enumerate(ranks):
        reduces = [Instruction(Op.REDUCE, stage.id) for stage in topology.stages_of(rank)]
        end = [] if kind is Kind.FORWARD else [*reduces, Instruction(Op.STEP)]
        ended.append((*instructions, *end))
    return Program(kind.value, num_microbatches, topology, tuple(ended))
