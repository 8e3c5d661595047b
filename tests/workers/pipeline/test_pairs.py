"""Co-issued passes: a program in two directions, as DualPipe's, with `par`; what may be a pair, and what may not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import CPU, QWEN, microbatch
from torch import Tensor
from trainmaster.api.errors import ProgramError
from trainmaster.workers.models.loading import init_stage
from trainmaster.workers.models.stage import Stage
from trainmaster.workers.parallel.groups import form_group, host_store, join_store
from trainmaster.workers.pipeline.drawing import draw
from trainmaster.workers.pipeline.instructions import (
    COMMUNICATION,
    Edge,
    EdgeKind,
    Instruction,
    Op,
    Program,
    Topology,
    chained,
    par,
)
from trainmaster.workers.pipeline.instructions import Stage as Place
from trainmaster.workers.pipeline.lowering import add_communication, lowered
from trainmaster.workers.pipeline.runner import Runner, Training
from trainmaster.workers.pipeline.schedules import Kind, schedule
from trainmaster.workers.pipeline.simulate import Span, Timeline, Times, figures, peaks, simulate
from trainmaster.workers.pipeline.verify import verify, verify_compute

STEP = Instruction(Op.STEP)


def forward(stage: int, microbatch: int) -> Instruction:
    return Instruction(Op.FORWARD, stage, microbatch)


def backward(stage: int, microbatch: int) -> Instruction:
    return Instruction(Op.BACKWARD, stage, microbatch)


def two_directions() -> Program:
    """Two ranks, each with all weights. Microbatches 0 and 1 go down (stages 0, 1), 2 and 3 go up (stages 2, 3)."""
    stages = (Place(0, 0, 0), Place(1, 1, 1), Place(2, 1, 0), Place(3, 0, 1))
    joints = [(0, 1, EdgeKind.ACTIVATION), (2, 3, EdgeKind.ACTIVATION)]
    joints += [(1, 0, EdgeKind.GRADIENT), (3, 2, EdgeKind.GRADIENT)]
    topology = Topology(stages, tuple(Edge(at, *joint) for at, joint in enumerate(joints)))

    def rank(first: int, last: int, down: tuple[int, int], up: tuple[int, int]) -> tuple[Instruction, ...]:
        return (
            forward(first, down[0]),
            forward(last, up[0]),
            *par(forward(first, down[1]), backward(last, up[0])),
            *par(forward(last, up[1]), backward(first, down[0])),
            backward(last, up[1]),
            backward(first, down[1]),
            *(Instruction(Op.REDUCE, stage) for stage in ((0, 3) if first == 0 else (2, 1))),
            STEP,
        )

    return Program("two-directions", 4, topology, (rank(0, 3, (0, 1), (2, 3)), rank(2, 1, (2, 3), (0, 1))))


def swapped(program: Program) -> Program:
    """Each pair the other way round."""
    ranks = []
    for instructions in program.ranks:
        rank = list(instructions)
        for at, each in enumerate(instructions):
            if each.is_with_next:
                rank[at : at + 2] = par(instructions[at + 1], replace(each, is_with_next=False))
        ranks.append(tuple(rank))
    return replace(program, ranks=tuple(ranks))


# -- what it means ----------------------------------------------------------------------------------------------------


def test_a_pair_is_a_part_of_the_program():
    program = lowered(two_directions())
    assert Program.parse(program.serialise()) == program
    apart = replace(program, ranks=tuple(tuple(replace(e, is_with_next=False) for e in r) for r in program.ranks))
    assert apart.digest != program.digest


@pytest.mark.parametrize("is_lowered", [False, True])
def test_a_pair_takes_the_sum_or_what_one_says_and_begins_when_both_can(is_lowered: bool):
    program = lowered(two_directions()) if is_lowered else two_directions()
    found = figures(simulate(program, Times()))
    assert (found.makespan, found.idle) == (12, 0)
    found = figures(simulate(program, Times(pair=2)))
    assert (found.makespan, found.idle, found.idle_own) == (10, 0, 0)
    spans = [span for span in simulate(program, Times(pair=2)).ranks[0] if span.end > span.start]
    assert [(str(span.instruction), span.start, span.end) for span in spans[2:4]] == [
        ("forward(0, microbatch 1)", 2, 4),
        ("backward(3, microbatch 2)", 2, 4),
    ]
    late = simulate(program, Times(pair=2, communication=1)).ranks[0]
    assert [span.start for span in late if span.instruction.microbatch == 3][-1] > 6
    assert [each.activations for each in peaks(program)] == [3, 3], "of both at once"


def test_a_pair_that_waits_is_late_as_a_whole():
    """Rank 0 has time for its second forward, but not until the gradient of the first is there."""
    topology = chained([0, 1])
    ends = [(Instruction(Op.REDUCE, stage), STEP) for stage in (0, 1)]
    ranks = (
        (forward(0, 0), *par(forward(0, 1), backward(0, 0)), backward(0, 1), *ends[0]),
        (forward(1, 0), backward(1, 0), forward(1, 1), backward(1, 1), *ends[1]),
    )
    for program in (Program("made", 2, topology, ranks), lowered(Program("made", 2, topology, ranks))):
        spans = [span for span in simulate(program, Times(pair=2.5)).ranks[0] if span.end > span.start]
        assert [(span.start, span.end) for span in spans] == [(0, 1), (4, 6.5), (4, 6.5), (9.5, 11.5)]


def test_only_a_forward_with_a_backward_takes_the_time_of_a_pair():
    ranks = (
        (*par(forward(0, 0), forward(0, 1)), *par(backward(0, 0), backward(0, 1)), Instruction(Op.REDUCE, 0), STEP),
    )
    program = Program("made", 2, chained([0]), ranks)
    assert figures(simulate(program, Times(pair=0.5))).makespan == 6


def test_what_runs_at_once_is_drawn_one_above_the_other():
    picture = ElementTree.fromstring(draw({"": simulate(two_directions(), Times(pair=2))}, "two"))
    (row, _) = picture.iter("{http://www.w3.org/2000/svg}g")
    rects = [(float(r.get("x")), float(r.get("y")), float(r.get("height"))) for r in row if r.tag.endswith("rect")]
    assert [height for *_, height in rects] == [24, 24, 12, 12, 12, 12, 24, 24]
    for one, other in (rects[2:4], rects[4:6]):
        assert (one[0], one[1] + 12) == (other[0], other[1])
    measured = tuple(Span(each, at, at + 1) for at, each in enumerate(two_directions().ranks[0][:4]))
    picture = ElementTree.fromstring(draw({"": Timeline((measured,))}, "one after the other"))
    (row,) = picture.iter("{http://www.w3.org/2000/svg}g")
    assert [float(r.get("height")) for r in row if r.tag.endswith("rect")] == [24] * 4


# -- how it is lowered ------------------------------------------------------------------------------------------------


def test_messages_and_recomputations_stand_around_a_pair():
    for program in (lowered(two_directions()), lowered(two_directions(), recompute=True)):
        verify(swapped(program))
        for rank in program.ranks:
            pairs = [pair for pair in pairwise(rank) if pair[0].is_with_next]
            assert [{one.op, other.op} for one, other in pairs] == [{Op.FORWARD, Op.BACKWARD}] * 2
    counts = [sum(each.op is Op.RECOMPUTE for each in rank) for rank in program.ranks]
    assert counts == [3, 3], "but for the backward that follows its forward at once"


@given(st.sampled_from([k for k in Kind if k is not Kind.FORWARD]), st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_may_be_co_issued_may_be_lowered_and_run_in_either_order(
    kind: Kind, p: int, m: int, data: st.DataObject
):
    compute = schedule(kind, p, m, 2)
    draws = data.draw(st.randoms(use_true_random=False))
    ranks = []
    for instructions in compute.ranks:
        rank = list(instructions)
        for at in range(len(rank) - 1):
            if draws.random() < 0.3 and not rank[at - 1].is_with_next:
                rank[at] = replace(rank[at], is_with_next=True)
        ranks.append(tuple(rank))
    paired = replace(compute, ranks=tuple(ranks))
    try:
        verify_compute(paired)
    except ProgramError:
        return
    for lookahead in (0, 1, 3):
        program = add_communication(paired, lookahead)
        verify(program)
        verify(swapped(program))
        kept = tuple(tuple(e for e in rank if e.op not in COMMUNICATION) for rank in program.ranks)
        assert kept == paired.ranks
    lowered(paired, recompute=True)
    assert simulate(lowered(paired), Times()).ranks


# -- what is refused --------------------------------------------------------------------------------------------------


def with_rank(instructions: list[Instruction]) -> Program:
    return Program("made", 2, chained([0]), ((*instructions, Instruction(Op.REDUCE, 0), STEP),))


ONE, TWO = forward(0, 0), forward(0, 1)
SPLIT = [Instruction(op, 0, at) for at in (0, 1) for op in (Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT)]


@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        (
            [TWO, *par(ONE, backward(0, 0)), backward(0, 1)],
            r"forward\(0, .* 0\) in rank 0 cannot be co-issued with backward\(0, microbatch 0\), which needs it",
        ),
        (
            [ONE, TWO, *par(*SPLIT[:2]), *SPLIT[2:]],
            r"cannot be co-issued with weight_gradient\(0, microbatch 0\), which needs it",
        ),
        (
            [ONE, replace(TWO, is_with_next=True), *par(backward(0, 0), backward(0, 1))],
            r"backward\(0, microbatch 0\), which is co-issued with the next already",
        ),
        (
            [ONE, TWO, backward(0, 0), replace(backward(0, 1), is_with_next=True)],
            r"with reduce\(0\): both must be of backward, forward, input_gradient, recompute, weight_gradient",
        ),
    ],
)
def test_a_wrong_pair_is_named(instructions: list[Instruction], match: str):
    with pytest.raises(ProgramError, match=rf"^made: .*{match}"):
        verify(with_rank(instructions))


def test_the_last_instruction_is_alone():
    program = with_rank([ONE, TWO, backward(0, 0), backward(0, 1)])
    last = replace(program, ranks=((*program.ranks[0][:-1], replace(STEP, is_with_next=True)),))
    with pytest.raises(ProgramError, match=r"step in rank 0 cannot be co-issued: nothing follows it"):
        verify(last)


def test_a_message_between_two_that_are_co_issued_is_refused():
    program = lowered(two_directions())
    rank = list(program.ranks[0])
    at = next(at for at, each in enumerate(rank) if each.is_with_next)
    sent = next(each for each in rank[at:] if each.op is Op.SEND and each.microbatch == rank[at].microbatch)
    rank.remove(sent)
    rank.insert(at + 1, sent)
    with pytest.raises(
        ProgramError, match=r"cannot be co-issued with send\(activation 0->1, microbatch 1\): both must"
    ):
        verify(replace(program, ranks=(tuple(rank), program.ranks[1])))


@pytest.mark.parametrize("is_silent", [False, True])
def test_two_that_need_each_other_by_way_of_another_rank_are_refused(is_silent: bool):
    """In a V, the last stage of a microbatch needs the first, which is on the same rank."""
    stages = [[0, 3], [1, 2]]
    ranks = []
    for rank, mine in enumerate(stages):
        forwards = [forward(stage, 0) for stage in mine]
        backwards = [backward(stage, 0) for stage in mine[::-1]]
        ends = [*(Instruction(Op.REDUCE, stage) for stage in mine), STEP]
        ranks.append((*(par(*forwards) if rank == 0 else forwards), *backwards, *ends))
    paired = Program("v", 1, chained([0, 1, 1, 0]), tuple(ranks))
    where = r"v: with buffered channels it cannot get past forward\(0, microbatch 0\) in rank 0 \(after forward\(2"
    if is_silent:
        with pytest.raises(ProgramError, match=where):
            verify_compute(paired)
        return
    good = lowered(replace(paired, ranks=(tuple(replace(e, is_with_next=False) for e in ranks[0]), ranks[1])))
    first = list(good.ranks[0])
    first.remove(forward(0, 0))
    first.insert(first.index(forward(3, 0)), replace(forward(0, 0), is_with_next=True))
    sent = next(each for each in first if each.op is Op.SEND and each.edge.kind is EdgeKind.ACTIVATION)
    first.remove(sent)
    first.insert(first.index(forward(3, 0)) + 1, sent)
    with pytest.raises(ProgramError, match="with buffered channels it cannot get past"):
        verify(replace(good, ranks=(tuple(first), good.ranks[1])))


# -- what it computes -------------------------------------------------------------------------------------------------


def held(ids: tuple[int, int]) -> list[Stage]:
    """A rank's stages by their ids in the program; even and odd ones are copies of the first and the second piece."""
    stages = []
    for at in ids:
        stage = init_stage(QWEN | {"tie_word_embeddings": False}, 3, {0: 0, 1: 1, 2: 0, 3: 1}[at], 2, CPU)
        stage.index = at
        stages.append(stage)
    return stages


def loss(stage: Stage, hidden: Tensor, _: object) -> Tensor:
    return stage.logits(hidden).square().mean()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_program_in_two_directions_has_the_gradients_of_one_process(is_swapped: bool, recompute: bool):
    torch.set_num_threads(1)
    program = lowered(two_directions(), recompute)
    program = swapped(program) if is_swapped else program
    verify(program)
    microbatches = [microbatch(at) for at in range(4)]
    store, port = host_store("127.0.0.1")
    deadline = timedelta(seconds=20)

    stages = [held((0, 3)), held((1, 2))]  # not in threads: initial weights are drawn from one generator

    def run(rank: int) -> list[int]:
        own, reduced = join_store("127.0.0.1", port, deadline), []
        groups = [
            form_group(own, name, range(2), rank, CPU, "127.0.0.1", deadline) for name in ("activations", "gradients")
        ]
        training = Training(seed="0", reduce=reduced.append, step=lambda: None)
        Runner(stages[rank], *groups, CPU, torch.float32).run(program, microbatches, loss, training)
        return reduced

    with ThreadPoolExecutor(2) as threads:
        reduced = list(threads.map(run, range(2)))
    del store
    assert reduced == [[0, 3], [2, 1]]
    whole = init_stage(QWEN | {"tie_word_embeddings": False}, 3, 0, 1, CPU)
    for each in microbatches:
        loss(whole, whole(each.tokens, each.packed), each).backward()
    wanted, names = dict(whole.named_parameters()), set()
    by_id = {stage.index: dict(stage.named_parameters()) for stage in (*stages[0], *stages[1])}
    for down, up in ((0, 2), (1, 3)):
        for name, each in by_id[down].items():
            both = each.grad + by_id[up][name].grad
            torch.testing.assert_close(both, wanted[name].grad, rtol=1e-4, atol=1e-5, msg=name)
            assert each.grad.abs().sum() > 0
            assert by_id[up][name].grad.abs().sum() > 0
            names.add(name)
    assert names == set(wanted)
