"""Schedules, before communication: their orders, for any number of ranks, microbatches and chunks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.config import Schedule
from trainmaster.workers.pipeline.formulas import formulas
from trainmaster.workers.pipeline.instructions import Instruction, Op, Program
from trainmaster.workers.pipeline.schedules import (
    Kind,
    forward_only,
    generation,
    gpipe,
    interleaved,
    one_f_one_b,
    schedule,
    zb_h1,
)
from trainmaster.workers.pipeline.simulate import Times, figures, peaks, simulate
from trainmaster.workers.pipeline.verify import verify_compute

SIZES = [(p, m) for p in range(1, 7) for m in range(1, 13)]
F, B, I, W = Op.FORWARD, Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT  # noqa: E741 as the papers call it


def order_of(program: Program, rank: int, *ops: Op) -> list[int | None]:
    return [each.microbatch for each in program.ranks[rank] if each.op in ops]


def written(program: Program, rank: int) -> str:
    """As the papers write it: F0 B0, with a stage's letter where a rank has several."""
    stages = [stage.id for stage in program.topology.stages_of(rank)]
    letters = {F: "F", B: "B", I: "I", W: "W"}
    return " ".join(
        f"{letters[each.op]}{each.microbatch}{'abcd'[stages.index(each.stage)] if len(stages) > 1 else ''}"
        for each in program.ranks[rank]
        if each.op in letters and each.stage is not None
    )


def test_orders_as_the_papers_draw_them():
    assert written(gpipe(2, 3), 0) == "F0 F1 F2 B0 B1 B2"
    assert written(one_f_one_b(3, 4), 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert written(one_f_one_b(3, 4), 2) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert written(interleaved(2, 4, 2), 1) == "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a"
    assert written(zb_h1(3, 4), 0) == "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3"
    assert written(zb_h1(3, 4), 2) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"
    assert written(forward_only(2, 3), 1) == "F0 F1 F2"


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("kind", Kind)
def test_every_schedule_takes_any_number_of_microbatches(kind: Kind, p: int, m: int):
    for v in (2, 3, 4) if kind is Kind.INTERLEAVED else (1,):
        program = schedule(kind, p, m, v)
        verify_compute(program)
        assert (program.name, program.num_microbatches, len(program.ranks)) == (kind.value, m, p)
        for rank, instructions in enumerate(program.ranks):
            stages = range(rank, p * v, p)
            if kind is not Kind.FORWARD:
                assert instructions[-v - 1 :] == (*(Instruction(Op.REDUCE, s) for s in stages), Instruction(Op.STEP))
            for stage in stages:
                forwards = [e.microbatch for e in instructions if (e.op, e.stage) == (F, stage)]
                assert forwards == list(range(m))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_no_schedule_holds_more_activations_than_its_formula_says(p: int, m: int):
    for kind in Kind:
        for v in (2, 3, 4) if kind is Kind.INTERLEAVED else (1,):
            found = tuple(each.activations for each in peaks(schedule(kind, p, m, v)))
            said = formulas(kind, p, m, v, Times()).peak
            if kind is Kind.INTERLEAVED and m % p:
                assert all(one <= other for one, other in zip(found, said, strict=True))
            else:
                assert found == said


def test_there_is_a_kind_for_each_schedule_of_a_layout():
    assert set(map(str, Kind)) == {*map(str, Schedule), "forward"}


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m % p and m > p])
def test_a_last_group_that_is_not_full_costs_interleaving_no_more_than_a_full_one(p: int, m: int):
    for v in (2, 3):
        ragged, full = (figures(simulate(interleaved(p, size, v), Times())) for size in (m, m + p - m % p))
        assert ragged.makespan <= full.makespan
        assert ragged.makespan < figures(simulate(one_f_one_b(p, m), Times())).makespan


@given(st.integers(1, 6), st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_generation_computes_nothing_for_what_has_ended(p: int, v: int, trips: list[int]):
    program = generation(p, trips, v)
    verify_compute(program)
    for stage in range(p * v):
        own = [each for each in program.ranks[stage % p] if each.stage == stage]
        forwards = [(each.microbatch, each.trip) for each in own if each.op is F]
        assert sorted(forwards) == [(i, trip) for i, num_trips in enumerate(trips) for trip in range(num_trips)]
        assert sorted(each.microbatch for each in own if each.op is Op.CLOSE) == list(range(len(trips)))
        num_open, most = 0, 0
        for each in own:
            num_open += (each.op is F and each.trip == 0) - (each.op is Op.CLOSE)
            most = max(most, num_open)
        assert most <= min(p, len(trips))


@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize(("p", "m"), [(4, 1), (4, 2), (4, 4), (3, 9)])
def test_a_ring_of_generation_is_as_full_as_microbatches_allow(p: int, m: int, v: int):
    """Decode utilisation is m / max(m, p), and at most p are open."""
    num_trips = 200
    found = figures(simulate(generation(p, [num_trips] * m, v), Times()))
    assert 1 - found.bubble == pytest.approx(min(m, p) / p, rel=0.03)
