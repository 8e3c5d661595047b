import random
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.workers.functions.advantages import group_advantages

REWARDS = {"d/0/0/0": 1.0, "d/0/0/1": 0.0, "d/0/0/2": 0.5, "d/0/1/0": -3.0, "d/0/1/1": 5.0}
quarters = st.integers(-40, 40).map(lambda number: number / 4)
groups = st.lists(st.lists(quarters, min_size=1, max_size=6), min_size=1, max_size=4)


def by_sequence(values: list[list[float]]) -> dict[str, float]:
    return {f"d/0/{at}/{copy}": value for at, group in enumerate(values) for copy, value in enumerate(group)}


def test_a_reward_is_compared_with_its_groups_mean_in_sample_standard_deviations():
    advantages, alike = group_advantages(REWARDS, normalise_by_std=True)
    root = 32**0.5  # the sample variance of -3 and 5 is 2 * 4^2 / (2 - 1)
    assert advantages == pytest.approx(
        {"d/0/0/0": 1.0, "d/0/0/1": -1.0, "d/0/0/2": 0.0, "d/0/1/0": -4 / root, "d/0/1/1": 4 / root}
    )
    assert alike == set()


def test_without_normalisation_it_is_the_plain_difference():
    advantages, _ = group_advantages(REWARDS, normalise_by_std=False)
    assert advantages == {"d/0/0/0": 0.5, "d/0/0/1": -0.5, "d/0/0/2": 0.0, "d/0/1/0": -4.0, "d/0/1/1": 4.0}


@pytest.mark.parametrize("normalise_by_std", [True, False])
def test_groups_that_are_all_alike_have_no_advantages_and_are_named(normalise_by_std):
    rewards = by_sequence([[0.1, 0.1, 0.1], [1.0, 0.0], [7.0], [0.0, 0.0]])
    advantages, alike = group_advantages(rewards, normalise_by_std)
    assert alike == {"d/0/0", "d/0/2", "d/0/3"}
    assert {sequence for sequence, value in advantages.items() if value == 0.0} == {
        sequence for sequence in rewards if not sequence.startswith("d/0/1/")
    }


def test_the_group_is_the_id_less_its_attempt():
    rewards = {"d/0/1/0": 0.0, "d/1/1/0": 1.0, "d/0/11/0": 2.0, "d/0/1/1": 4.0}
    advantages, alike = group_advantages(rewards, normalise_by_std=False)
    assert advantages == {"d/0/1/0": -2.0, "d/0/1/1": 2.0, "d/1/1/0": 0.0, "d/0/11/0": 0.0}
    assert alike == {"d/1/1", "d/0/11"}


def test_nothing_gives_nothing():
    assert group_advantages({}, normalise_by_std=True) == ({}, set())


@given(groups, st.booleans())
def test_every_sequence_gets_the_closed_form(values, normalise_by_std):
    rewards = by_sequence(values)
    advantages, alike = group_advantages(rewards, normalise_by_std)
    assert set(advantages) == set(rewards)
    for at, group in enumerate(values):
        is_alike = len(set(group)) == 1
        assert (f"d/0/{at}" in alike) == is_alike
        scale = stdev(group) if normalise_by_std and not is_alike else 1.0
        for copy, value in enumerate(group):
            assert advantages[f"d/0/{at}/{copy}"] == pytest.approx((value - mean(group)) / scale, abs=1e-9)


@given(groups, st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_sequences_does_not_matter(values, normalise_by_std, order: random.Random):
    rewards = by_sequence(values)
    names = list(rewards)
    order.shuffle(names)
    shuffled, alike = group_advantages({name: rewards[name] for name in names}, normalise_by_std)
    wanted, alike_before = group_advantages(rewards, normalise_by_std)
    assert shuffled == pytest.approx(wanted, abs=1e-9)
    assert alike == alike_before


def test_rewards_that_differ_by_rounding_are_alike():
    advantages, alike = group_advantages({"g/0": 0.3, "g/1": 0.1 + 0.2}, normalise_by_std=True)
    assert advantages == {"g/0": 0.0, "g/1": 0.0}
    assert alike == {"g"}
