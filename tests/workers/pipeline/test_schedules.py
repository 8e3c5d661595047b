import pytest
from trainmaster.workers.pipeline.instructions import Instruction, Op
from trainmaster.workers.pipeline.schedules import Compute, forward_only, one_f_one_b

SIZES = [(p, m) for p in range(1, 7) for m in range(1, 13)]


def peak_live(instructions: tuple[Instruction, ...]) -> int:
    """The most microbatches between their forward and their backward."""
    live = peak = 0
    for each in instructions:
        live += (each.op is Op.FORWARD) - (each.op is Op.BACKWARD)
        peak = max(peak, live)
    assert live == 0
    return peak


def order_of(compute: Compute, rank: int, op: Op) -> list[int | None]:
    return [each.microbatch for each in compute[rank] if each.op is op]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_1f1b_holds_no_more_activations_than_its_table_says(p: int, m: int):
    assert [peak_live(rank) for rank in one_f_one_b(p, m)] == [min(p - s, m) for s in range(p)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_1f1b_runs_every_microbatch_once_each_way_in_order(p: int, m: int):
    compute = one_f_one_b(p, m)
    assert len(compute) == p
    for stage, instructions in enumerate(compute):
        assert all(each.stage == stage and each.edge is None for each in instructions)
        assert order_of(compute, stage, Op.FORWARD) == list(range(m))
        assert order_of(compute, stage, Op.BACKWARD) == list(range(m))
        assert [each.op for each in instructions[2 * m :]] == [Op.REDUCE, Op.STEP]


def makespan(compute: Compute, forward_s: int, backward_s: int) -> int:
    """When the last rank is done, if a stage starts as soon as its input is there."""
    p, done_s, at, clock_s = len(compute), {}, [0] * len(compute), [0] * len(compute)
    while any(at[rank] < len(compute[rank]) for rank in range(p)):
        progress = False
        for rank in range(p):
            if at[rank] == len(compute[rank]):
                continue
            each = compute[rank][at[rank]]
            before = rank - 1 if each.op is Op.FORWARD else rank + 1
            needs = [(each.op, before, each.microbatch)] if 0 <= before < p and each.microbatch is not None else []
            if all(need in done_s for need in needs):
                cost_s = {Op.FORWARD: forward_s, Op.BACKWARD: backward_s}.get(each.op, 0)
                clock_s[rank] = max([clock_s[rank], *(done_s[need] for need in needs)]) + cost_s
                done_s[each.op, rank, each.microbatch] = clock_s[rank]
                at[rank] += 1
                progress = True
        assert progress, "deadlock"
    return max(clock_s)


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (4, 16), (6, 6), (4, 2), (3, 1)])
def test_1f1b_idles_as_long_as_fill_and_drain(p: int, m: int):
    assert makespan(one_f_one_b(p, m), forward_s=5, backward_s=10) == (m + p - 1) * 15


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_forward_only_is_forwards_in_order(p: int, m: int):
    compute = forward_only(p, m)
    for stage in range(p):
        assert compute[stage] == tuple(Instruction(Op.FORWARD, stage, microbatch) for microbatch in range(m))
