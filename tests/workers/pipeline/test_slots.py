"""Who sits where, by itself."""

import random

import pytest
from trainmaster.api.errors import RunError
from trainmaster.workers.pipeline.slots import ENDED, PAUSED, Claim, Slots, compacted


def claims(*sizes, num_tokens=1):
    return [Claim(num_tokens, size) for size in sizes]


def test_compaction_fills_holes_from_the_end():
    assert compacted([True, False, True, False, True]) == [0, 4, 2]
    assert compacted([True, True]) == [0, 1]
    assert compacted([False, False, True]) == [2]
    assert compacted([False]) == []


def test_compaction_keeps_all_live_rows_and_moves_only_what_it_must():
    source = random.Random(0)
    for _ in range(200):
        is_live = [source.random() < 0.6 for _ in range(source.randrange(1, 12))]
        order = compacted(is_live)
        assert sorted(order) == [row for row, live in enumerate(is_live) if live]
        assert all(row == old for row, old in enumerate(order) if is_live[row])
        assert all(old >= len(order) for row, old in enumerate(order) if row != old)


def test_without_a_budget_a_whole_microbatch_takes_the_place_of_a_closed_one():
    slots = Slots(claims(5, 9, 3, 4, 6), [[0, 1], [2, 3, 4]], num_places=1, max_tokens=None)
    (pool,) = slots.opened
    assert (pool.rows, pool.joining, pool.num_slots, pool.slot_tokens) == ([0, 1], [0, 1], 2, 9)
    assert slots.settle(pool, [ENDED, 7]) is pool
    assert (pool.rows, pool.order, pool.joining) == ([1], [1], [])
    successor = slots.settle(pool, [ENDED])
    assert (successor.microbatch, successor.rows, successor.num_slots, successor.slot_tokens) == (1, [2, 3, 4], 3, 6)
    assert slots.settle(successor, [ENDED] * 3) is None


def test_a_free_slot_is_taken_by_whoever_waits_longest():
    slots = Slots(claims(5, 9, 3, 4, 6), [[0, 1], [2, 3, 4]], num_places=1, max_tokens=27)
    (pool,) = slots.opened
    assert (pool.num_slots, pool.slot_tokens, pool.rows) == (3, 9, [0, 1, 2])
    assert slots.settle(pool, [1, ENDED, 1]) is pool
    assert (pool.rows, pool.order, pool.joining) == ([0, 2, 3], [0, 2], [3])
    assert slots.settle(pool, [ENDED, ENDED, ENDED]) is pool
    assert (pool.rows, pool.order, pool.joining) == ([4], [], [4])
    assert slots.settle(pool, [ENDED]) is None


def test_what_has_no_room_in_its_microbatch_waits_before_all_others():
    slots = Slots(claims(4, 4, 4, 4, 4), [[0, 1, 2], [3], [4]], num_places=2, max_tokens=8)
    assert [pool.rows for pool in slots.opened] == [[0, 1], [3, 2]]
    slots.settle(slots.opened[0], [ENDED, 1])
    assert slots.opened[0].rows == [1, 4]


def test_waiting_sequences_are_dealt_evenly():
    slots = Slots(claims(*[1] * 12), [[0, 1], [2, 3], [*range(4, 12)]], num_places=2, max_tokens=5)
    assert [len(pool.rows) for pool in slots.opened] == [5, 5]
    slots = Slots(claims(*[1] * 8), [[0, 1], [2, 3], [*range(4, 8)]], num_places=2, max_tokens=5)
    assert [len(pool.rows) for pool in slots.opened] == [4, 4]


def test_who_joins_together_is_sorted_by_length():
    lengths = [Claim(length, 9) for length in (4, 2, 4, 1)]
    slots = Slots(lengths, [[0, 1, 2, 3]], num_places=1, max_tokens=36)
    assert slots.opened[0].joining == [3, 1, 0, 2]


@pytest.mark.parametrize("max_tokens", [None, 4])
def test_a_pause_ends_all_and_lets_nobody_in(max_tokens):
    slots = Slots(claims(2, 2, 2, 2), [[0, 1], [2], [3]], num_places=2, max_tokens=max_tokens)
    assert slots.settle(slots.opened[0], [PAUSED] * len(slots.opened[0].rows)) is None
    assert slots.settle(slots.opened[1], [ENDED] * len(slots.opened[1].rows)) is None


def test_a_sequence_that_outgrows_the_budget_is_refused():
    with pytest.raises(RunError, match="may grow to 9 tokens, and the KV slots of a microbatch have room for 8"):
        Slots(claims(3, 9), [[0, 1]], num_places=1, max_tokens=8)
