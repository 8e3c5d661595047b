from pathlib import Path

import pytest
from trainmaster.api.algorithms import Generation, SupervisedLoss
from trainmaster.api.config import Dataset, Layout, Model, Optimizer, RunOptions
from trainmaster.api.errors import ConfigError
from trainmaster.api.experiments.answers import AnswerEvaluation
from trainmaster.api.experiments.sft import SFT
from trainmaster.api.graph import CallKind, Microbatching
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling

ANSWERS = AnswerEvaluation(
    dataset=Dataset(path="a"), reward=Reward(function="exact_match"), sampling=Sampling(max_new_tokens=3)
)


def sft(**fields) -> SFT:
    return SFT(**{"model": Model(path=Path("m"), layout=Layout(dp=2, pp=3)), "dataset": Dataset(path="d"), **fields})


def test_the_minibatch_is_by_default_the_batch():
    assert sft(batch_size=12).resolved_minibatch_size == 12
    assert sft(batch_size=12, minibatch_size=4).resolved_minibatch_size == 4


def test_the_batch_is_a_multiple_of_the_minibatch():
    with pytest.raises(ConfigError, match=r"batch_size = 10: must be a multiple of minibatch_size \(4\)\. Use .* 8\."):
        sft(batch_size=10, minibatch_size=4)
    with pytest.raises(ConfigError, match=r"batch_size = 2: must be a multiple of minibatch_size \(4\)\. Use .* 4\."):
        sft(batch_size=2, minibatch_size=4)


def test_every_replica_gets_a_sequence_of_each_minibatch():
    with pytest.raises(ConfigError, match=r"minibatch_size = 1: must be at least model\.layout\.dp \(2\)\. Raise it"):
        sft(batch_size=4, minibatch_size=1)


def test_the_number_of_workers_agrees_with_the_layout():
    assert sft(run=RunOptions(workers=6)).run.workers == 6
    with pytest.raises(ConfigError, match=r"run\.workers = 5: the layouts ask for 6 .*\. Leave run\.workers out"):
        sft(run=RunOptions(workers=5))


def test_an_evaluation_cadence_needs_an_evaluation_dataset():
    run = RunOptions(evaluate_every=2)
    assert sft(run=run, evaluation=Dataset(path="e")).evaluation is not None
    with pytest.raises(ConfigError, match=r"run\.evaluate_every = 2: there is nothing to evaluate on\. Give `evaluati"):
        sft(run=run)


def test_it_compiles_to_one_training_call():
    optimizer = Optimizer(learning_rate=0.1)
    compiled = sft(batch_size=12, minibatch_size=4, microbatch_tokens=99, optimizer=optimizer).compile()
    (call,) = compiled.training.graph.calls
    assert (call.name, call.model, call.kind, call.settings) == (
        "train",
        "model",
        CallKind.TRAIN_STEP,
        SupervisedLoss(),
    )
    assert (call.inputs, call.outputs) == (("tokens", "loss_mask"), ())
    assert (call.batch_size, call.minibatch_size, compiled.training.graph.batch_size) == (12, 4, 12)
    assert call.microbatching == Microbatching(max_tokens=99, min_count=3)
    assert compiled.models["model"].optimizer == optimizer
    assert compiled.models["model"].ranks == range(6)
    assert (compiled.num_workers, compiled.training.dataset_field, compiled.evaluations) == (6, "dataset", ())


def test_each_evaluation_is_a_graph_of_its_own():
    compiled = sft(batch_size=12, minibatch_size=4, evaluation=Dataset(path="e"), answers=ANSWERS).compile()
    assert list(compiled.graphs) == ["sft", "evaluation", "answers"]
    loss, answers = compiled.evaluations
    (call,) = loss.graph.calls
    assert (call.name, call.kind, call.batch_size, call.minibatch_size) == ("evaluate", CallKind.INFERENCE, 12, 12)
    assert (loss.dataset_field, loss.dataset.path) == ("evaluation", Path("e"))
    assert [call.name for call in answers.graph.calls] == ["generate", "score"]
    assert answers.graph.call("generate").settings == Generation(sampling=ANSWERS.sampling)
    assert (answers.dataset_field, answers.dataset.path) == ("answers.dataset", Path("a"))


def test_a_target_reward_needs_answers_between_steps():
    run = RunOptions(target_reward=0.5, evaluate_every=2)
    assert sft(run=run, answers=ANSWERS).run.target_reward == 0.5
    for fields in (
        {"run": run, "evaluation": Dataset(path="e")},
        {"run": RunOptions(target_reward=0.5), "answers": ANSWERS},
    ):
        with pytest.raises(ConfigError, match=r"run\.target_reward = 0\.5: it is compared with evaluation/reward.*Set"):
            sft(**fields)
