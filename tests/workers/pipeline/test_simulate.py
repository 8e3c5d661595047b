"""Times: the literature's formulas, bounds that hold for any program, and both definitions of idle."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.workers.pipeline.formulas import formulas
from trainmaster.workers.pipeline.instructions import Instruction, Op, Program
from trainmaster.workers.pipeline.lowering import lowered
from trainmaster.workers.pipeline.schedules import Kind, gpipe, one_f_one_b, schedule, zb_h1
from trainmaster.workers.pipeline.simulate import Peaks, Span, Timeline, Times, figures, peaks, simulate

TRAINING = [(Kind.GPIPE, 1), (Kind.ONE_F_ONE_B, 1), (Kind.INTERLEAVED, 2), (Kind.INTERLEAVED, 4), (Kind.ZB_H1, 1)]
ALL = [*TRAINING, (Kind.FORWARD, 1)]
UNEQUAL = Times(forward=5, input_gradient=6, weight_gradient=4)
durations = st.integers(1, 20).map(float)


@pytest.mark.parametrize("times", [Times(), UNEQUAL], ids=["equal", "5,6,4"])
@pytest.mark.parametrize(("p", "m"), [(4, 16), (8, 32)])
@pytest.mark.parametrize(("kind", "v"), ALL)
def test_the_verified_program_is_as_its_formula_says(kind: Kind, v: int, p: int, m: int, times: Times):
    program = lowered(schedule(kind, p, m, v))
    found, said = figures(simulate(program, times)), formulas(kind, p, m, v, times)
    assert said.unmet == ""
    assert found.makespan == pytest.approx(said.makespan)
    assert found.idle == pytest.approx(said.idle)
    assert found.idle_own == pytest.approx(said.idle_own)
    assert found.bubble == pytest.approx(said.bubble)
    assert found.bubble_own == pytest.approx(said.bubble_own)
    assert tuple(each.activations for each in peaks(program)) == said.peak


@pytest.mark.parametrize(("p", "m"), [(4, 16), (8, 32)])
def test_the_bubble_fractions_of_the_papers(p: int, m: int):
    def bubble(kind: Kind, v: int = 1) -> float:
        return figures(simulate(lowered(schedule(kind, p, m, v)), Times())).bubble

    assert bubble(Kind.GPIPE) == pytest.approx((p - 1) / (m + p - 1))
    assert bubble(Kind.ONE_F_ONE_B) == pytest.approx((p - 1) / (m + p - 1))
    assert bubble(Kind.INTERLEAVED, 2) == pytest.approx((p - 1) / (2 * m + p - 1))
    assert bubble(Kind.ZB_H1) == pytest.approx((p - 1) / (3 * m + p - 1))


@given(st.sampled_from(ALL), st.integers(1, 6), st.integers(1, 14), durations, durations, durations)
@settings(max_examples=150, deadline=None)
def test_formulas_hold_wherever_they_say_so(kind_v, p: int, m: int, forward: float, by_input: float, by_weight: float):
    kind, v = kind_v
    times = Times(forward=forward, input_gradient=by_input, weight_gradient=by_weight)
    said = formulas(kind, p, m, v, times)
    found = figures(simulate(schedule(kind, p, m, v), times))
    if not said.unmet:
        assert found.idle == pytest.approx(said.idle, abs=1e-9)
        assert found.idle_own == pytest.approx(said.idle_own, abs=1e-9)
    elif kind is Kind.INTERLEAVED:
        assert found.idle >= said.idle - 1e-9


def critical_path(program: Program, times: Times) -> float:
    """Of one microbatch through all stages and back: no order of instructions can be faster."""
    share = program.topology.num_ranks / program.topology.num_replica_groups
    num_stages = len(program.topology.stages)
    messages = sum(not program.topology.is_local(edge) for edge in program.topology.edges)
    forward, by_input, by_weight = (
        each * share for each in (times.forward, times.input_gradient, times.weight_gradient)
    )
    match program.name:
        case Kind.FORWARD:
            return num_stages * forward + messages / 2 * times.communication
        case Kind.ZB_H1:
            return num_stages * (forward + by_input) + by_weight + messages * times.communication
    return num_stages * (forward + by_input + by_weight) + messages * times.communication


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Of all schedules."""
    kind, num_chunks = draw(st.sampled_from(ALL))
    compute = schedule(kind, draw(st.integers(1, 5)), draw(st.integers(1, 9)), num_chunks)
    return lowered(compute, recompute=draw(st.booleans()) and kind is not Kind.FORWARD)


all_times = st.builds(
    Times, forward=durations, input_gradient=durations, weight_gradient=durations, communication=durations
)


@given(programs(), all_times)
@settings(max_examples=100, deadline=None)
def test_no_program_is_faster_than_its_busiest_rank_or_its_longest_path(program: Program, times: Times):
    timeline = simulate(program, times)
    found = figures(timeline)
    busiest = max(sum(span.end - span.start for span in rank) for rank in timeline.ranks)
    assert found.makespan >= busiest - 1e-9
    assert found.makespan >= critical_path(program, times) - 1e-9
    assert found.idle >= -1e-9
    assert found.idle_own >= -1e-9
    for instructions, spans in zip(program.ranks, timeline.ranks, strict=True):
        assert [span.instruction for span in spans] == list(instructions)
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(spans))


@given(programs(), all_times)
@settings(max_examples=100, deadline=None)
def test_adding_communication_costs_the_messages_and_nothing_else(program: Program, times: Times):
    compute = Program(
        program.name,
        program.num_microbatches,
        program.topology,
        tuple(tuple(e for e in rank if e.op not in (Op.SEND, Op.RECEIVE)) for rank in program.ranks),
    )
    assert figures(simulate(program, times)) == figures(simulate(compute, times))


def test_a_timeline_by_hand():
    """Two ranks, two microbatches, messages of 1: rank 1 waits for the first; then it is behind by it."""
    timeline = simulate(lowered(gpipe(2, 2)), Times(forward=2, input_gradient=1, weight_gradient=2, communication=1))
    shown = [[(str(s.instruction), s.start, s.end) for s in rank if s.end > s.start] for rank in timeline.ranks]
    assert shown[0] == [
        ("forward(0, microbatch 0)", 0, 2),
        ("forward(0, microbatch 1)", 2, 4),
        ("backward(0, microbatch 0)", 11, 14),
        ("backward(0, microbatch 1)", 14, 17),
    ]
    assert shown[1] == [
        ("forward(1, microbatch 0)", 3, 5),
        ("forward(1, microbatch 1)", 5, 7),
        ("backward(1, microbatch 0)", 7, 10),
        ("backward(1, microbatch 1)", 10, 13),
    ]
    found = figures(timeline)
    assert (found.makespan, found.idle, found.idle_own) == (17, 7, 7)


def test_the_two_definitions_of_idle_differ_where_ranks_are_shifted():
    """Each rank works without a pause, the second later: a barrier at the end counts that."""

    def busy(start: float) -> tuple[Span, ...]:
        return tuple(Span(Instruction(Op.FORWARD, 0, i), start + i, start + i + 1) for i in range(4))

    found = figures(Timeline((busy(0), busy(4))))
    assert (found.makespan, found.idle, found.idle_own) == (8, 4, 0)
    assert (found.bubble, found.bubble_own) == (0.5, 0)


def test_a_recomputed_program_holds_inputs_in_place_of_activations():
    assert peaks(lowered(gpipe(2, 6), recompute=True)) == (Peaks(1, 6), Peaks(1, 6))
    assert peaks(lowered(one_f_one_b(3, 6), recompute=True)) == (Peaks(1, 3), Peaks(1, 2), Peaks(1, 0))
    # rank s of ZB-H1 keeps s activations for the gradients of weights that it is behind
    assert [each.activations for each in peaks(lowered(zb_h1(3, 6), recompute=True))] == [1, 2, 3]
