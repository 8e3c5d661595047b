from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.api.config import Dataset, Model, RunOptions
from trainmaster.api.errors import ConfigError
from trainmaster.api.experiments.grpo import GRPO
from trainmaster.api.experiments.sft import SFT
from trainmaster.api.graph import Graph
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling
from trainmaster.system.cadence import Cadence, optimizer_steps, plan_cadence


def steps(cadence: Cadence, when: str) -> list[int]:
    first = 1 if when == "saves_after" else 0
    return [step for step in range(first, cadence.num_steps + 1) if getattr(cadence, when)(step)]


def test_the_last_step_is_always_saved():
    assert steps(Cadence(7, save_every=3, evaluate_every=None), "saves_after") == [3, 6, 7]
    assert steps(Cadence(6, save_every=3, evaluate_every=None), "saves_after") == [3, 6]
    assert steps(Cadence(7, save_every=None, evaluate_every=1), "saves_after") == [7]


def test_the_first_and_the_last_step_are_always_evaluated():
    assert steps(Cadence(7, save_every=1, evaluate_every=None), "evaluates_after") == [0, 7]
    assert steps(Cadence(7, save_every=None, evaluate_every=3), "evaluates_after") == [0, 3, 6, 7]


def test_steps_that_are_given_are_taken():
    assert plan_cadence(RunOptions(steps=9), num_sequences=1, batch_size=100).num_steps == 9


def test_one_pass_by_default_in_whole_batches():
    assert plan_cadence(RunOptions(), num_sequences=10, batch_size=4).num_steps == 2


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 10))
def test_whole_passes_are_exact(num_sequences: int, batch_size: int, passes: int):
    wanted = passes * num_sequences // batch_size
    run = RunOptions(passes=passes)
    if wanted == 0:
        with pytest.raises(ConfigError, match="do not fill one batch"):
            plan_cadence(run, num_sequences, batch_size)
    else:
        assert plan_cadence(run, num_sequences, batch_size).num_steps == wanted


@pytest.mark.parametrize(("passes", "num_steps"), [(0.1, 1), (0.3, 3), (0.7, 7), (1.1, 11), (0.19, 1)])
def test_parts_of_passes_do_not_lose_a_step_to_rounding(passes: float, num_steps: int):
    assert plan_cadence(RunOptions(passes=passes), num_sequences=100, batch_size=10).num_steps == num_steps


def test_a_run_without_a_whole_batch_is_refused():
    with pytest.raises(
        ConfigError, match=r"batch_size = 8: 0\.5 passes over 15 sequences do not fill one batch\. Lower batch_size"
    ):
        plan_cadence(RunOptions(passes=0.5), num_sequences=15, batch_size=8)


def test_the_cadence_takes_the_runs_intervals():
    cadence = plan_cadence(RunOptions(steps=4, save_every=2, evaluate_every=3), 10, 1)
    assert (cadence.save_every, cadence.evaluate_every) == (2, 3)


def test_optimizer_steps_of_a_traversal_are_those_of_the_models_trainings():
    model, rows = Model(path=Path("none")), Dataset(path=Path("none"))
    sft = SFT(model=model, dataset=rows, batch_size=24, minibatch_size=8).compile()
    assert optimizer_steps(sft.training.graph, "model") == 3
    grpo = GRPO(
        actor=model,
        prompts=rows,
        reward=Reward(function="exact_match"),
        sampling=Sampling(max_new_tokens=4),
        batch_size=8,
        group_size=4,
        minibatches=4,
        kl_coefficient=0.1,
    ).compile()
    assert optimizer_steps(grpo.training.graph, "actor") == 4
    assert optimizer_steps(grpo.training.graph, "reference") == 0
    (train,) = (call for call in sft.training.graph.model_calls)
    twice = Graph(
        "twice", (replace(train, passes=2), replace(train, name="half", batch_size=12)), ("tokens", "loss_mask")
    )
    assert optimizer_steps(twice, "model") == 2 * 3 + 2 * 2, "12 sequences are two minibatches, and go twice"
