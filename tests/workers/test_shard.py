"""Layouts against each other, stage by stage in real processes: the same draws, and the same losses on the same draws.

Generation and training are checked apart: a run trains each layout on its own draws, where one token that falls to the
other side of a rounded boundary changes all that follows; a replay trains all of them on the draws of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from shards import LAYOUTS, NUM_MINIBATCHES, Report, Rollout, TwoProcesses, replay, sample_and_train, two_processes

NUM_STEPS = 6
TOLERANCE = 1e-5
MIN_AGREEMENT = 0.99
OTHERS = [layout for layout in LAYOUTS if layout != "one"]


@pytest.fixture(scope="module")
def processes() -> Iterator[TwoProcesses]:
    with two_processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def runs(processes: TwoProcesses) -> Report:
    return processes.run(sample_and_train, NUM_STEPS)


@pytest.fixture(scope="module")
def replays(processes: TwoProcesses, runs: Report) -> Report:
    return processes.run(replay, runs["one"])


@dataclass
class Agreement:
    """Of tokens that two layouts drew after the same ones."""

    num_tokens: int = 0
    """That the first layout drew, those after a difference too."""
    num_agreeing: int = 0
    """The same, with log-probabilities within the tolerance."""
    largest_difference: float = 0.0
    """Between log-probabilities of the same token."""

    def add(self, one: Rollout, other: Rollout) -> None:
        assert (one.id, one.prompt) == (other.id, other.prompt)
        self.num_tokens += len(one.response)
        for at, (token, peer) in enumerate(zip(one.response, other.response, strict=False)):
            difference = abs(one.log_probabilities[at] - other.log_probabilities[at])
            if difference <= TOLERANCE:
                assert token == peer, f"token {at} of {one.id}: as likely in both layouts, and not the same"
                self.num_agreeing += 1
            if token != peer:
                return  # what follows has another history
            self.largest_difference = max(self.largest_difference, difference)


@pytest.mark.parametrize("layout", OTHERS)
def test_the_same_tokens_are_drawn_wherever_log_probabilities_agree(runs: Report, layout: str) -> None:
    agreement = Agreement()
    for one, other in zip(runs["one"], runs[layout], strict=True):
        for pair in zip(one.rollouts, other.rollouts, strict=True):
            agreement.add(*pair)
    share = agreement.num_agreeing / agreement.num_tokens
    print(
        f"{layout}: {agreement.num_agreeing} of {agreement.num_tokens} tokens ({share:.2%}) agree over {NUM_STEPS} "
        f"steps; log-probabilities differ by {agreement.largest_difference:.1e} at most"
    )
    assert agreement.num_tokens > 1000
    assert share >= MIN_AGREEMENT


@pytest.mark.parametrize("layout", OTHERS)
def test_a_replay_of_recorded_rollouts_gives_equal_losses_and_gradient_norms(replays: Report, layout: str) -> None:
    one, other = ([update for step in replays[name] for update in step.updates] for name in ("one", layout))
    assert len(one) == len(other) == NUM_STEPS * NUM_MINIBATCHES
    # a loss is a mean of terms of about 1 that may cancel to nearly 0: what is left has no 1e-5 of itself
    for field, floor in (("loss", 1e-6), ("gradient_norm", 0.0)):
        wanted = [getattr(update, field) for update in one]
        got = [getattr(update, field) for update in other]
        differences = [abs(a - b) for a, b in zip(wanted, got, strict=True)]
        parts = [difference / abs(a) for a, difference in zip(wanted, differences, strict=True)]
        print(
            f"{layout}: {field} differs by {max(differences):.1e}, or {max(parts):.1e} of itself, at most over "
            f"{len(wanted)} optimizer steps; its size is {min(map(abs, wanted)):.1e} to {max(map(abs, wanted)):.1e}"
        )
        assert got == pytest.approx(wanted, rel=TOLERANCE, abs=floor), field


def test_a_replay_repeats_the_run_that_was_recorded(runs: Report, replays: Report) -> None:
    assert replays["one"] == runs["one"], "to the bit: tokens and log-probabilities lose nothing on the way"


def test_what_is_compared_says_something(runs: Report) -> None:
    updates = [update for step in runs["one"] for update in step.updates]
    assert all(math.isfinite(update.loss) and update.gradient_norm > 0.1 for update in updates)
    assert max(abs(update.drift) for update in updates) > 1e-3, "second minibatches are off the sampling policy"
    assert all(abs(update.drift) < TOLERANCE for update in updates[::NUM_MINIBATCHES]), "and first ones are on it"
    lengths = {len(rollout.response) for step in runs["one"] for rollout in step.rollouts}
    assert len(lengths) > 5
    assert len({rollout.response for rollout in runs["one"][0].rollouts}) > 20, "draws vary"
