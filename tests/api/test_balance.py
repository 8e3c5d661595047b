import math
import random
from itertools import product, zip_longest

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from trainmaster.api import balance as module
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


def test_balance_is_even_where_a_few_are_long():
    draw = random.Random(0)
    lengths = [math.ceil(draw.lognormvariate(6, 1)) for _ in range(8192)]
    heaviest = max(sum(lengths[at] for at in group) for group in balance(lengths, 128))
    assert heaviest <= 1.001 * max(sum(lengths) / 128, *lengths)


@given(LENGTHS, st.randoms(use_true_random=False), st.data())
def test_balance_gives_each_length_the_same_companions_in_any_order(
    lengths: list[int], draw: random.Random, data: st.DataObject
):
    num_groups = data.draw(st.integers(1, len(lengths)))
    shuffled = draw.sample(lengths, len(lengths))

    def companions(lengths: list[int]) -> list[list[int]]:
        return sorted(sorted(lengths[at] for at in group) for group in balance(lengths, num_groups))

    assert companions(shuffled) == companions(lengths)


def test_equal_lengths_are_told_apart_by_position():
    assert balance([5, 5, 5, 1, 1, 1], 3) == [[0, 3], [1, 4], [2, 5]]


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


def fewest_groups(longest_first: list[int], max_tokens: int) -> int:
    """Within the cap, by trying everything."""
    best = len(longest_first)

    def place(at: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if at == len(longest_first):
            best = len(rooms)
            return
        length = longest_first[at]
        for group in range(len(rooms)):
            if rooms[group] >= length:
                place(at + 1, [*rooms[:group], rooms[group] - length, *rooms[group + 1 :]])
        place(at + 1, [*rooms, max_tokens - length])

    place(0, [])
    return best


@st.composite
def tight_plans(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Few and long: often it takes a search to pack them."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    num_ranks = draw(st.integers(1, len(lengths)))
    return lengths, num_ranks, max(lengths) + draw(st.integers(0, 3)), 1


@given(tight_plans())
def test_ranks_have_equally_many_microbatches_wherever_that_is_possible(drawn: tuple[list[int], int, int, int]):
    lengths, num_ranks, max_tokens, _ = drawn
    counts = {len(rank) for rank in planned(drawn)}
    most = len(lengths) // num_ranks
    assert (len(counts) == 1) == (fewest_groups(sorted(lengths, reverse=True), max_tokens) <= num_ranks * most)


@given(tight_plans())
def test_microbatches_are_few(drawn: tuple[list[int], int, int, int]):
    lengths, num_ranks, max_tokens, _ = drawn
    per_rank = max(len(rank) for rank in planned(drawn))
    fewest = fewest_groups(sorted(lengths, reverse=True), max_tokens)
    assert per_rank <= -(-(fewest + 1) // num_ranks)


@given(plans())
def test_ranks_differ_in_tokens_by_no_more_than_two_microbatches_of_one_round(drawn: tuple[list[int], int, int, int]):
    lengths = drawn[0]
    loads = [[sum(lengths[at] for at in microbatch) for microbatch in rank] for rank in planned(drawn)]
    totals = [sum(rank) for rank in loads]
    rounds = zip_longest(*loads, fillvalue=0)  # a rank that has none in the last round has 0 there
    assert max(totals) - min(totals) <= max(max(each) - min(each) for each in rounds)


@given(plans(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_arrival(drawn: tuple[list[int], int, int, int], draw: random.Random):
    lengths, *limits = drawn
    names = [f"s{at}" for at in range(len(lengths))]

    def named(order: list[int]) -> list[list[list[str]]]:
        arrived = [names[at] for at in order]
        plan = plan_microbatches([lengths[at] for at in order], *limits, arrived)
        return [[[arrived[at] for at in microbatch] for microbatch in rank] for rank in plan]

    in_order = list(range(len(lengths)))
    assert named(draw.sample(in_order, len(in_order))) == named(in_order)


def test_equal_lengths_are_told_apart_by_name():
    assert plan_microbatches([2, 2, 3], 3, 4, 1, ["b", "a", "c"]) == [[[2]], [[1]], [[0]]]


def test_the_longest_comes_first_and_the_heaviest_microbatch():
    assert plan_microbatches([1, 2, 4, 6], 1, 7, 2, "abcd") == [[[3, 0], [2, 1]]]


def test_ranks_have_equally_many_microbatches_where_the_cap_allows_it():
    plan = plan_microbatches([5] * 7, num_ranks=2, max_tokens=10, min_count=1, names="abcdefg")
    assert [len(rank) for rank in plan] == [2, 2]


def test_ranks_have_equally_many_microbatches_where_longest_first_does_not_fit():
    """To the lightest group, the last would make 3 + 2 + 2; 3 + 3 and 2 + 2 + 2 are within the cap."""
    plan = plan_microbatches([6, 6, 3, 3, 2, 2, 2], num_ranks=4, max_tokens=6, min_count=1, names="abcdefg")
    assert plan == [[[0]], [[1]], [[2, 3]], [[4, 5, 6]]]


def test_microbatches_are_as_few_as_longest_first_makes_them():
    """Best fit needs three: 3 + 3, 2 + 2 + 2, 2."""
    assert plan_microbatches([3, 3, 2, 2, 2, 2], 1, 7, 1, "abcdef") == [[[0, 2, 4], [1, 3, 5]]]


def test_a_tight_packing_is_cut_further_until_ranks_have_equally_many():
    """Longest first needs more than 9 microbatches, best fit 8: one of them is cut in two."""
    lengths = [3] * 8 + [2] * 12
    plan = plan_microbatches(lengths, num_ranks=9, max_tokens=6, min_count=1, names=[f"s{at:02}" for at in range(20)])
    assert [sum(lengths[at] for at in microbatch) for (microbatch,) in plan] == [6, 6, 6, 6, 6, 6, 6, 3, 3]
    assert sorted(at for (microbatch,) in plan for at in microbatch) == list(range(20))


def test_ranks_differ_where_the_cap_forbids_equal_numbers():
    plan = plan_microbatches([10] * 5, num_ranks=2, max_tokens=10, min_count=1, names="abcde")
    assert sorted(len(rank) for rank in plan) == [2, 3]


def test_the_number_of_microbatches_is_not_searched_for_step_by_step(monkeypatch: pytest.MonkeyPatch):
    cuts = []

    original = module._balance

    def counted(lengths: list[int], num_groups: int) -> tuple[list[list[int]], list[int]]:
        cuts.append(num_groups)
        return original(lengths, num_groups)

    monkeypatch.setattr(module, "_balance", counted)
    (rank,) = plan_microbatches([51] * 1000, 1, 100, 1, [f"s{at}" for at in range(1000)])
    assert len(rank) == 1000
    assert cuts == [510, 1000]


def test_a_sequence_over_the_cap_is_named():
    with pytest.raises(
        DataError, match=r"microbatch_tokens = 6: sequence b has 7 tokens, .* Set microbatch_tokens to 7 or more"
    ):
        plan_microbatches([6, 7], 1, 6, 1, ["a", "b"])


def test_fewer_sequences_than_ranks_is_our_own_mistake():
    with pytest.raises(AssertionError, match="1 sequences for 2 data-parallel ranks"):
        plan_microbatches([1], 2, 6, 1, ["a"])
