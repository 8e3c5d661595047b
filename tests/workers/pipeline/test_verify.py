"""Programs that are refused, and what is said of them; topologies other than chains.

Whether the verifier refuses exactly what is wrong is in test_symbolic.py.
"""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.workers.pipeline.instructions import Edge, EdgeKind, Instruction, Op, Program, Stage, Topology, chained
from trainmaster.workers.pipeline.lowering import lowered, training_program
from trainmaster.workers.pipeline.schedules import Kind, forward_only, generation, schedule, zb_h1
from trainmaster.workers.pipeline.simulate import Times, figures, peaks, simulate
from trainmaster.workers.pipeline.verify import ProgramError, verify, verify_compute

F, B, I, W = Op.FORWARD, Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT  # noqa: E741 as the papers call it


def with_rank(program: Program, rank: int, instructions: list[Instruction]) -> Program:
    ranks = list(program.ranks)
    ranks[rank] = tuple(instructions)
    return replace(program, ranks=tuple(ranks))


def without(program: Program, rank: int, *shown: str) -> Program:
    kept = [each for each in program.ranks[rank] if str(each) not in shown]
    assert len(kept) == len(program.ranks[rank]) - len(shown)
    return with_rank(program, rank, kept)


def at(program: Program, rank: int, shown: str) -> int:
    return list(map(str, program.ranks[rank])).index(shown)


def refused(program: Program, match: str) -> None:
    with pytest.raises(ProgramError, match=match):
        verify(program)


# -- what is said -----------------------------------------------------------------------------------------------------


def test_a_1f1b_whose_last_rank_is_shifted_by_one_is_refused():
    """`F1 B0 F2 B1 F3 B2 F4 B3`, where F0 is missing and F4 is out of range."""
    good = schedule(Kind.ONE_F_ONE_B, 2, 4)
    order = [(F, 1), (B, 0), (F, 2), (B, 1), (F, 3), (B, 2), (F, 4), (B, 3)]
    shifted = [Instruction(op, 1, microbatch) for op, microbatch in order]
    bad = with_rank(good, 1, [*shifted, *good.ranks[1][-2:]])
    with pytest.raises(ProgramError, match=r"forward\(1, microbatch 4\) cannot stand in rank 1 of 2, with 4 microb"):
        verify_compute(bad)
    fewer = with_rank(good, 1, [each for each in bad.ranks[1] if each.microbatch != 4])
    with pytest.raises(ProgramError, match=r"1f1b: forward\(1, microbatch 0\) stands nowhere in rank 1, where it must"):
        verify_compute(fewer)


def test_a_missing_instruction_is_named():
    good = training_program(2, 2)
    refused(
        without(good, 0, "backward(0, microbatch 1)"), r"^1f1b: backward\(0, microbatch 1\) stands nowhere in rank 0"
    )
    refused(without(good, 1, "step"), r"rank 1 must end in one step")
    refused(without(good, 1, "reduce(1)"), r"reduce\(1\) stands nowhere in rank 1")
    edge = "activation 0->1, microbatch 1"
    refused(
        without(good, 1, f"receive({edge})"), rf"forward\(1, microbatch 1\) in rank 1 needs receive\({edge}\), which"
    )
    refused(
        without(good, 0, f"send({edge})"), rf"receive\({edge}\) in rank 1 needs send\({edge}\), which stands nowhere"
    )


def test_a_program_without_messages_is_refused():
    refused(
        schedule(Kind.GPIPE, 2, 1), r"backward\(0, microbatch 0\) in rank 0 needs receive\(gradient 1->0, microbatch 0"
    )


def test_a_double_instruction_is_named():
    good = training_program(2, 2)
    refused(
        with_rank(good, 1, [good.ranks[1][0], *good.ranks[1]]), r"receive\(.* microbatch 0\) stands twice, in rank 1"
    )


def test_both_kinds_of_backward_for_one_microbatch_are_refused():
    good = schedule(Kind.ZB_H1, 1, 2)
    both = [Instruction(B, 0, 0) if each == Instruction(I, 0, 0) else each for each in good.ranks[0]]
    refused(with_rank(good, 0, both), r"backward\(0, microbatch 0\) stands in rank 0, where it must not")
    half = without(good, 0, "weight_gradient(0, microbatch 1)")
    refused(half, r"weight_gradient\(0, microbatch 1\) stands nowhere in rank 0, where it must")


def test_an_order_that_cannot_be_is_named():
    good = lowered(zb_h1(1, 2))
    order = list(good.ranks[0])
    order[0], order[1] = order[1], order[0]
    refused(
        with_rank(good, 0, order),
        r"input_gradient\(0, microbatch 0\) in rank 0 stands before forward\(0, microbatch 0\)",
    )
    early = [good.ranks[0][-2], *good.ranks[0][:-2], good.ranks[0][-1]]
    refused(with_rank(good, 0, early), r"reduce\(0\) in rank 0 stands before weight_gradient\(0, microbatch 1\)")
    late = [*good.ranks[0][:-2], good.ranks[0][-1], good.ranks[0][-2]]
    refused(with_rank(good, 0, late), r"rank 0 must end in one step, but has steps at \[6\] of 8")


def test_inference_must_not_step():
    good = lowered(forward_only(1, 1))
    refused(
        with_rank(good, 0, [*good.ranks[0], Instruction(Op.STEP)]),
        r"rank 0 has no gradients to step with, but has steps",
    )
    refused(with_rank(good, 0, [*good.ranks[0], Instruction(Op.REDUCE, 0)]), r"reduce\(0\) has no gradients in rank 0")
    refused(
        with_rank(good, 0, [*good.ranks[0], Instruction(Op.RECOMPUTE, 0, 0)]), r"recompute\(0, microbatch 0\) stands in"
    )


def test_messages_out_of_turn_are_named():
    good = training_program(2, 3)
    one, other = (at(good, 0, f"send(activation 0->1, microbatch {i})") for i in (0, 1))
    order = list(good.ranks[0])
    order.insert(other, order.pop(one))
    refused(
        with_rank(good, 0, order), r"receive\(.*0\) in rank 1 is out of turn: rank 0 comes to send\(.*microbatch 1\)"
    )


def test_a_message_that_nobody_takes_is_named():
    topology = chained([0, 1])
    ranks = (
        (Instruction(F, 0, 0), Instruction(Op.SEND, None, 0, topology.edges[0])),
        (Instruction(Op.RECEIVE, None, 0, topology.edges[0]), Instruction(F, 1, 0)),
    )
    verify(Program("made", 1, topology, ranks))
    extra = Topology(topology.stages, (*topology.edges, Edge(2, 0, 1, EdgeKind.GRADIENT)))
    refused(Program("made", 1, extra, (ranks[0], ranks[1][1:])), r"needs receive\(activation 0->1, microbatch 0\)")


def test_two_ranks_that_wait_for_each_other_are_refused():
    good = training_program(2, 2)
    first = [each for each in good.ranks[0] if str(each) != "send(activation 0->1, microbatch 1)"]
    send = good.ranks[0][at(good, 0, "send(activation 0->1, microbatch 1)")]
    late = [*first[:-2], send, *first[-2:]]  # the second activation goes up only after both gradients came down
    refused(
        with_rank(good, 0, late),
        r"with buffered channels it cannot get past receive\(gradient 1->0, .* in rank 0 \(after send\(gradient 1->0",
    )


def test_two_sends_that_meet_are_refused_though_buffers_would_save_them():
    """Each of two ranks sends before it receives."""
    good = lowered(schedule(Kind.ONE_F_ONE_B, 2, 2))
    receive, send = "receive(activation 0->1, microbatch 1)", "send(gradient 1->0, microbatch 0)"
    order = list(good.ranks[1])
    moved = order.pop(at(good, 1, receive))
    order.insert([str(each) for each in order].index(send) + 1, moved)
    refused(
        with_rank(good, 1, order), rf"with rendezvous channels it cannot get past {send[:4]}.* in rank 0 .*{send[:4]}"
    )


@pytest.mark.parametrize(
    ("topology", "match"),
    [
        (Topology((), ()), "must be numbered from 0, and one stage"),
        (Topology((Stage(1, 0, 0),), ()), "must be numbered from 0"),
        (Topology((Stage(0, 1, 0),), ()), "its 1 ranks must each have a stage, and no other rank"),
        (Topology((Stage(0, 0, 0),), (Edge(0, 0, 5, EdgeKind.ACTIVATION),)), "must join two of 1 stages"),
        (Topology((Stage(0, 0, 0),), (Edge(0, 0, 0, EdgeKind.ACTIVATION),)), "must join two of 1 stages"),
        (Topology((Stage(0, 0, 0),), (Edge(1, 0, 0, EdgeKind.TOKEN),)), "must be numbered from 0"),
    ],
)
def test_a_topology_that_makes_no_sense_is_refused(topology: Topology, match: str):
    refused(Program("made", 1, topology, ((Instruction(F, 0, 0),),)), match)


def test_no_microbatches_are_too_few():
    refused(schedule(Kind.FORWARD, 2, 0), "0 microbatches, where one is the least")
    with pytest.raises(ProgramError, match="0 microbatches, where one is the least"):
        training_program(2, 0)


def test_instructions_that_name_what_they_should_not_are_refused():
    good = training_program(2, 2)
    forwards = [at for at, each in enumerate(good.ranks[0]) if each.op is F]
    edge = good.topology.edges[0]
    for wrong in (
        Instruction(F, 0, 0, edge),
        Instruction(F, None, 0),
        Instruction(F, 0),
        Instruction(F, 0, 0, trip=-1),
        Instruction(Op.SEND, 0, 0, edge),
        Instruction(Op.SEND, None, 0),
        Instruction(Op.SEND, None, 0, replace(edge, source=1, target=0)),
        Instruction(Op.SEND, None, 0, replace(edge, id=7)),
        Instruction(Op.RECEIVE, None, 0, edge),
        Instruction(Op.REDUCE, 1),
        Instruction(Op.REDUCE, 0, 0),
        Instruction(Op.STEP, 0),
    ):
        for at in forwards:  # also where one like it was seen before
            instructions = [*good.ranks[0][:at], wrong, *good.ranks[0][at + 1 :]]
            refused(with_rank(good, 0, instructions), r"cannot stand in rank 0 of 2, with 2 microbatches")


# -- other topologies -------------------------------------------------------------------------------------------------


def chimera() -> Program:
    """Chimera (arXiv 2107.06925) on two ranks: microbatch 0 goes down, 1 goes up; each rank has all weights."""
    stages = (Stage(0, 0, 0), Stage(1, 1, 1), Stage(2, 1, 0), Stage(3, 0, 1))
    joints = [(0, 1), (2, 3)]
    kinds = [(a, b, EdgeKind.ACTIVATION) for a, b in joints] + [(b, a, EdgeKind.GRADIENT) for a, b in joints]
    topology = Topology(stages, tuple(Edge(number, *each) for number, each in enumerate(kinds)))
    ends = [
        [Instruction(Op.REDUCE, 0), Instruction(Op.REDUCE, 3)],
        [Instruction(Op.REDUCE, 2), Instruction(Op.REDUCE, 1)],
    ]
    ranks = [
        [Instruction(F, 0, 0), Instruction(F, 3, 1), Instruction(B, 3, 1), Instruction(B, 0, 0), *ends[0]],
        [Instruction(F, 2, 1), Instruction(F, 1, 0), Instruction(B, 1, 0), Instruction(B, 2, 1), *ends[1]],
    ]
    return Program("chimera", 2, topology, tuple((*rank, Instruction(Op.STEP)) for rank in ranks))


def test_two_directions_at_once():
    program = lowered(chimera())
    found = figures(simulate(program, Times(forward=2)))
    assert (found.idle, found.makespan) == (0, 8)  # (p - 2) F at F = B, for p = 2
    assert [each.activations for each in peaks(program)] == [2, 2]
    assert Program.parse(program.serialise()) == program


def test_a_microbatch_that_goes_both_ways_is_refused():
    good = chimera()
    extra = [Instruction(F, 3, 0), *good.ranks[0]]
    with pytest.raises(ProgramError, match=r"forward\(3, microbatch 0\) stands in rank 0, where it must not"):
        verify_compute(with_rank(good, 0, extra))


def test_reductions_in_another_order_on_each_rank_are_refused():
    """The two ranks would each wait in the other's reduction."""
    good = lowered(chimera())
    order = list(good.ranks[0])
    order[-3], order[-2] = order[-2], order[-3]
    refused(with_rank(good, 0, order), r"cannot get past reduce\(3\) in rank 0 \(after reduce\(2\) in rank 1\)")


def test_a_graph_with_branches():
    """Stage 0 feeds 1 and 2, which both feed 3; and 0 feeds 3 itself, over two edges."""
    joints = [(0, 1), (0, 2), (1, 3), (2, 3), (0, 3), (0, 3)]
    kinds = [(a, b, EdgeKind.ACTIVATION) for a, b in joints] + [(b, a, EdgeKind.GRADIENT) for a, b in joints[:-1]]
    edges = tuple(Edge(number, *each) for number, each in enumerate(kinds))
    topology = Topology(tuple(Stage(s, rank, s) for s, rank in enumerate([0, 1, 2, 0])), edges)
    here = [Instruction(op, s, i) for op, stages in ((F, (0, 3)), (B, (3, 0))) for s in stages for i in range(2)]
    ranks = [
        [*here, Instruction(Op.REDUCE, 0), Instruction(Op.REDUCE, 3), Instruction(Op.STEP)],
        *(
            [
                *(Instruction(op, s, i) for op in (F, B) for i in range(2)),
                Instruction(Op.REDUCE, s),
                Instruction(Op.STEP),
            ]
            for s in (1, 2)
        ),
    ]
    program = lowered(Program("branches", 2, topology, tuple(map(tuple, ranks))), recompute=True)
    assert sum(each.op is Op.SEND for rank in program.ranks for each in rank) == 2 * 8


@given(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_generation_with_anything_missing_or_twice_is_refused(p: int, trips: list[int], data: st.DataObject):
    good = lowered(generation(p, trips))
    rank = data.draw(st.integers(0, p - 1))
    place = data.draw(st.integers(0, len(good.ranks[rank]) - 1))
    instructions = list(good.ranks[rank])
    refused(with_rank(good, rank, instructions[:place] + instructions[place + 1 :]), "generation: ")
    refused(with_rank(good, rank, [*instructions, instructions[place]]), "stands twice")
    later = replace(instructions[place], trip=instructions[place].trip + 1)
    refused(with_rank(good, rank, [*instructions[:place], later, *instructions[place + 1 :]]), "generation: ")


# -- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "v"), [(Kind.GPIPE, 1), (Kind.ONE_F_ONE_B, 1), (Kind.ZB_H1, 1), (Kind.INTERLEAVED, 4), (Kind.FORWARD, 4)]
)
def test_a_large_program_is_verified_in_no_time(kind: Kind, v: int):
    """Under 50 ms on a machine that is free; here ten times that, as tests share theirs."""
    program = lowered(schedule(kind, 8, 64, v))
    took = []
    for _ in range(3):
        started = time.process_time()
        verify(program)
        took.append(time.process_time() - started)
    assert min(took) < 0.5
