from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from trainmaster.api.balance import balance, plan_microbatches
from trainmaster.api.errors import DataError

LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=40)


@given(LENGTHS, st.data())
def test_balance_covers_every_position_once_and_leaves_no_group_empty(lengths: list[int], data: st.DataObject):
    num_groups = data.draw(st.integers(1, len(lengths)))
    groups = balance(lengths, num_groups)
    assert len(groups) == num_groups
    assert all(groups)
    assert sorted(at for group in groups for at in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)


def best_maximum(lengths: list[int], num_groups: int) -> int:
    """By trying everything."""
    best = sum(lengths)
    for places in product(range(num_groups), repeat=len(lengths)):
        loads = [0] * num_groups
        for length, place in zip(lengths, places, strict=True):
            loads[place] += length
        best = min(best, max(loads))
    return best


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_balance_is_within_four_thirds_of_the_best(lengths: list[int], num_groups: int):
    assume(num_groups <= len(lengths))
    heaviest = max(sum(lengths[at] for at in group) for group in balance(lengths, num_groups))
    assert 3 * heaviest <= 4 * best_maximum(lengths, num_groups)


def test_balance_spreads_sequences_of_no_length():
    assert sorted(map(len, balance([0, 0, 0, 0], 2))) == [2, 2]


def test_balance_refuses_more_groups_than_sequences():
    with pytest.raises(AssertionError, match="1 sequences cannot fill 2 groups"):
        balance([5], 2)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    lengths = draw(LENGTHS)
    num_ranks = draw(st.integers(1, min(6, len(lengths))))
    max_tokens = draw(st.integers(max(1, *lengths) if len(lengths) > 1 else max(1, lengths[0]), 120))
    return lengths, num_ranks, max_tokens, draw(st.integers(1, 8))


def planned(drawn: tuple[list[int], int, int, int]) -> list[list[list[int]]]:
    lengths, num_ranks, max_tokens, min_count = drawn
    return plan_microbatches(lengths, num_ranks, max_tokens, min_count, [f"s{at}" for at in range(len(lengths))])


@given(plans())
def test_microbatches_hold_every_sequence_once_within_the_cap(drawn: tuple[list[int], int, int, int]):
    lengths, num_ranks, max_tokens, _ = drawn
    plan = planned(drawn)
    microbatches = [microbatch for rank in plan for microbatch in rank]
    assert len(plan) == num_ranks
    assert sorted(at for microbatch in microbatches for at in microbatch) == list(range(len(lengths)))
    assert all(microbatches)
    assert max(sum(lengths[at] for at in microbatch) for microbatch in microbatches) <= max_tokens


@given(plans())
def test_ranks_have_equally_many_microbatches_or_one_more(drawn: tuple[list[int], int, int, int]):
    lengths, num_ranks, _, min_count = drawn
    counts = [len(rank) for rank in planned(drawn)]
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= min(min_count, len(lengths) // num_ranks)


@given(plans())
def test_ranks_differ_in_tokens_by_at_most_one_microbatch(drawn: tuple[list[int], int, int, int]):
    lengths = drawn[0]
    plan = planned(drawn)
    loads = [[sum(lengths[at] for at in microbatch) for microbatch in rank] for rank in plan]
    heaviest = max(load for rank in loads for load in rank)
    totals = [sum(rank) for rank in loads]
    assert max(totals) - min(totals) <= heaviest


@given(plans())
def test_the_plan_is_a_function_of_its_arguments(drawn: tuple[list[int], int, int, int]):
    assert planned(drawn) == planned(drawn)


def test_names_do_not_change_the_plan():
    assert plan_microbatches([3, 1, 2], 1, 4, 2, "abc") == plan_microbatches([3, 1, 2], 1, 4, 2, "cab")


def test_ranks_have_equally_many_microbatches_where_the_cap_allows_it():
    plan = plan_microbatches([5] * 7, num_ranks=2, max_tokens=10, min_count=1, names="abcdefg")
    assert [len(rank) for rank in plan] == [2, 2]


def test_ranks_differ_where_the_cap_forbids_equal_numbers():
    plan = plan_microbatches([10] * 5, num_ranks=2, max_tokens=10, min_count=1, names="abcde")
    assert sorted(len(rank) for rank in plan) == [2, 3]


def test_a_sequence_over_the_cap_is_named():
    with pytest.raises(
        DataError, match=r"microbatch_tokens = 6: sequence b has 7 tokens, .* Set microbatch_tokens to 7 or more"
    ):
        plan_microbatches([6, 7], 1, 6, 1, ["a", "b"])


def test_fewer_sequences_than_ranks_is_our_own_mistake():
    with pytest.raises(AssertionError, match="1 sequences for 2 data-parallel ranks"):
        plan_microbatches([1], 2, 6, 1, ["a"])
