"""Passes: what they add, where they add it, and that they keep what was there."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.errors import ProgramError
from trainmaster.workers.pipeline.dependencies import inputs
from trainmaster.workers.pipeline.instructions import (
    BACKWARDS,
    COMMUNICATION,
    Edge,
    EdgeKind,
    Instruction,
    Op,
    Program,
    Stage,
    Topology,
    chained,
)
from trainmaster.workers.pipeline.lowering import (
    add_communication,
    add_recompute,
    inference_program,
    lowered,
    training_program,
)
from trainmaster.workers.pipeline.schedules import Kind, forward_only, generation, gpipe, one_f_one_b, schedule, zb_h1
from trainmaster.workers.pipeline.verify import verify, verify_compute

SIZES = [(p, m) for p in range(1, 7) for m in range(1, 13)]


def compute_of(program: Program) -> Program:
    ranks = tuple(tuple(each for each in rank if each.op not in COMMUNICATION) for rank in program.ranks)
    return replace(program, ranks=ranks)


def farthest(program: Program) -> int:
    """Compute instructions between a RECEIVE and its use, at most."""
    most = 0
    for rank in program.ranks:
        received: dict[tuple[int, int | None, int], int] = {}
        at = 0
        for each in rank:
            if each.op is Op.RECEIVE:
                assert each.edge is not None
                received[each.edge.id, each.microbatch, each.trip] = at
            elif each.stage is not None and each.op is not Op.REDUCE:
                for edge, before in inputs(program.topology, each.op, each.stage):
                    if not program.topology.is_local(edge) and before <= each.trip:
                        most = max(most, at - received.pop((edge.id, each.microbatch, each.trip - before)))
                at += 1
        assert not received
    return most


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_programs_are_verified_and_keep_their_compute(p: int, m: int):
    for program, compute in (
        (training_program(p, m), one_f_one_b(p, m)),
        (inference_program(p, m), forward_only(p, m)),
    ):
        verify(program)
        assert compute_of(program) == compute


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_each_channel_receives_what_it_was_sent_in_order(p: int, m: int):
    program = training_program(p, m)
    for edge in program.topology.edges:
        source, target = program.topology.ends(edge)
        sent = [each.microbatch for each in program.ranks[source] if each.op is Op.SEND and each.edge == edge]
        received = [each.microbatch for each in program.ranks[target] if each.op is Op.RECEIVE and each.edge == edge]
        assert sent == received == list(range(m))


def test_communication_stands_next_to_its_compute():
    shown = [list(map(str, rank)) for rank in training_program(2, 1).ranks]
    assert shown == [
        [
            "forward(0, microbatch 0)",
            "send(activation 0->1, microbatch 0)",
            "receive(gradient 1->0, microbatch 0)",
            "backward(0, microbatch 0)",
            "reduce(0)",
            "step",
        ],
        [
            "receive(activation 0->1, microbatch 0)",
            "forward(1, microbatch 0)",
            "backward(1, microbatch 0)",
            "send(gradient 1->0, microbatch 0)",
            "reduce(1)",
            "step",
        ],
    ]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_inference_has_no_backward_no_gradients_and_no_step(p: int, m: int):
    ops = {each.op for rank in inference_program(p, m).ranks for each in rank}
    assert ops == ({Op.FORWARD} if p == 1 else {Op.FORWARD, Op.SEND, Op.RECEIVE})


def test_one_rank_alone_does_not_communicate():
    for kind in Kind:
        program = lowered(schedule(kind, 1, 3, 2))
        assert not [each for each in program.ranks[0] if each.op in COMMUNICATION]


def test_what_stays_within_a_rank_is_not_sent():
    """In a V, the two stages in its middle are on one rank."""
    compute = gpipe(2, 2)
    stages = [[0, 3], [1, 2]]
    ranks = []
    for mine in stages:
        forwards = [Instruction(Op.FORWARD, stage, at) for stage in mine for at in range(2)]
        backwards = [Instruction(Op.BACKWARD, stage, at) for stage in mine[::-1] for at in range(2)]
        ends = [*(Instruction(Op.REDUCE, stage) for stage in mine), Instruction(Op.STEP)]
        ranks.append((*forwards, *backwards, *ends))
    program = lowered(replace(compute, name="v", topology=chained([0, 1, 1, 0]), ranks=tuple(ranks)))
    sent = [(each.edge.source, each.edge.target) for rank in program.ranks for each in rank if each.op is Op.SEND]
    assert sorted(set(sent)) == [(0, 1), (1, 0), (2, 3), (3, 2)]


@pytest.mark.parametrize("kind", Kind)
def test_receives_stand_close_to_their_use(kind: Kind):
    for p in range(1, 7):
        for m in (1, 2, 3, 5, 8, 13):
            compute = schedule(kind, p, m, 3)
            assert farthest(lowered(compute)) <= 2
            assert farthest(add_communication(compute, lookahead=0)) <= 2
            if kind is not Kind.FORWARD:
                assert farthest(lowered(compute, recompute=True)) <= 2


def test_a_receive_is_begun_while_the_instruction_before_its_use_runs():
    shown = list(map(str, training_program(2, 2).ranks[1]))
    second = shown.index("receive(activation 0->1, microbatch 1)")
    assert second < shown.index("backward(1, microbatch 0)") < shown.index("forward(1, microbatch 1)")


@given(st.sampled_from([k for k in Kind if k is not Kind.FORWARD]), st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_recomputation_stands_right_before_backwards(kind: Kind, p: int, m: int):
    compute = schedule(kind, p, m, 2)
    again = add_recompute(compute)
    kept = tuple(tuple(each for each in rank if each.op is not Op.RECOMPUTE) for rank in again.ranks)
    assert kept == compute.ranks
    for rank in again.ranks:
        for at, each in enumerate(rank):
            before = rank[at - 1]
            if each.op in BACKWARDS:
                assert before.op in (Op.RECOMPUTE, Op.FORWARD)
                assert (before.stage, before.microbatch) == (each.stage, each.microbatch)
    verify(lowered(compute, recompute=True))


def test_nothing_is_recomputed_where_the_backward_follows_at_once():
    again = add_recompute(one_f_one_b(3, 4))
    assert [sum(each.op is Op.RECOMPUTE for each in rank) for rank in again.ranks] == [4, 4, 0]


@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_order_that_can_be_run_can_be_run_with_messages(
    data: st.DataObject, num_ranks: int, num_extra: int, m: int, is_split: bool
):
    """Stages anywhere, branches, any order: whatever can be run by itself is verified once it is lowered."""
    draws = data.draw(st.randoms(use_true_random=False))
    program = anything(draws, num_ranks, num_ranks - 1 + num_extra, m, is_split)
    verify_compute(program)
    for lookahead in (0, 1, 3):
        verify(add_communication(program, lookahead))
    verify(lowered(program, recompute=True))


def anything(draws: random.Random, num_ranks: int, num_stages: int, m: int, is_split: bool) -> Program:
    """A graph of stages in any order that respects it."""
    ranks = [*range(num_ranks), *(draws.randrange(num_ranks) for _ in range(num_stages - num_ranks))]
    draws.shuffle(ranks)
    joints = [(at, draws.randrange(at + 1, num_stages)) for at in range(num_stages - 1)]
    joints += [pair for pair in [(0, num_stages - 1)] if num_stages > 2 and draws.random() < 0.5]
    kinds = [(a, b, EdgeKind.ACTIVATION) for a, b in joints] + [(b, a, EdgeKind.GRADIENT) for a, b in joints]
    edges = tuple(Edge(at, *each) for at, each in enumerate(kinds))
    topology = Topology(tuple(Stage(at, rank, at) for at, rank in enumerate(ranks)), edges)
    forwards = [Instruction(Op.FORWARD, s, i) for i in range(m) for s in range(num_stages)]
    todo = set(forwards)
    order: list[list[Instruction]] = [[] for _ in range(num_ranks)]
    done: set[Instruction] = set()
    ops = (Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT) if is_split else (Op.BACKWARD,)
    todo |= {Instruction(op, each.stage, each.microbatch) for each in forwards for op in ops}
    while todo:

        def is_ready(each: Instruction) -> bool:
            assert each.stage is not None
            needed = [replace(each, stage=edge.source) for edge, _ in inputs(topology, each.op, each.stage)]
            if each.op is not Op.FORWARD:
                op = Op.INPUT_GRADIENT if each.op is Op.WEIGHT_GRADIENT else Op.FORWARD
                needed.append(replace(each, op=op))
            return all(need in done for need in needed)

        each = draws.choice(sorted(filter(is_ready, todo), key=str))
        todo.remove(each)
        done.add(each)
        order[ranks[each.stage or 0]].append(each)
    for rank, instructions in enumerate(order):
        reduces = [Instruction(Op.REDUCE, stage.id) for stage in topology.stages_of(rank)]
        instructions += [*reduces, Instruction(Op.STEP)]
    return Program("anything", m, topology, tuple(map(tuple, order)))


@given(st.integers(1, 5), st.integers(1, 3), st.lists(st.integers(1, 5), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_generation_is_verified_whatever_ends_when(p: int, v: int, trips: list[int]):
    program = lowered(generation(p, trips, v))
    closes = [each for rank in program.ranks for each in rank if each.op is Op.CLOSE]
    assert len(closes) == p * v * len(trips)


def test_a_schedule_that_cannot_run_is_refused_before_anything_is_added():
    good = zb_h1(2, 2)
    swapped = (good.ranks[0], (good.ranks[1][1], good.ranks[1][0], *good.ranks[1][2:]))
    with pytest.raises(ProgramError, match=r"input_gradient\(1, microbatch 0\) in rank 1 stands before forward\(1"):
        lowered(replace(good, ranks=swapped))
    with pytest.raises(ProgramError, match=r"send\(.*\) in rank 0 of a program that has compute only"):
        lowered(training_program(2, 2))
