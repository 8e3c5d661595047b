from dataclasses import replace

import pytest
import trainmaster
from trainmaster.api.algorithms import Generation, KLEstimator, LogProbabilities, LossNormalisation, PolicyLoss
from trainmaster.api.config import Dataset, Layout, LoRA, Model, Optimizer, Precision, RunOptions
from trainmaster.api.errors import ConfigError
from trainmaster.api.experiments.answers import AnswerEvaluation
from trainmaster.api.experiments.grpo import GRPO
from trainmaster.api.functions import RewardFunction
from trainmaster.api.graph import DATASET, CallKind, Microbatching
from trainmaster.api.hooks import Reshard
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling

ACTOR = Model(path="m", layout=Layout(dp=2, pp=3))
OTHER = Model(path="r", layout=Layout(dp=1, pp=2))
REWARD = Reward(function="number_match")
EVALUATION = AnswerEvaluation(
    dataset=Dataset(path="e"),
    reward=Reward(function="exact_match"),
    sampling=Sampling(max_new_tokens=9, temperature=0.0),
    batch_size=48,
)


def grpo(**fields) -> GRPO:
    return GRPO(
        **{
            "actor": ACTOR,
            "prompts": Dataset(path="p"),
            "reward": REWARD,
            "sampling": Sampling(max_new_tokens=7, temperature=0.8, top_p=0.9),
            "batch_size": 6,
            "group_size": 4,
            **fields,
        }
    )


def edges(graph) -> dict[tuple[str, str], tuple[str, ...]]:
    return {(source, target): keys for source, target, keys in graph.edges.edges.data("keys")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 1}, r"group_size = 1: a response is compared with others of its group\. Raise it"),
        (
            {"sampling": Sampling(max_new_tokens=7, temperature=0.0)},
            r"sampling\.temperature = 0\.0: greedy responses to one prompt are all the same\. Use for example 1\.0",
        ),
        ({"minibatches": 5}, r"minibatches = 5: must divide the 24 responses .* at least actor\.layout\.dp \(2\)"),
        ({"minibatches": 24}, r"minibatches = 24: must divide the 24 responses .* at least actor\.layout\.dp \(2\)"),
        ({"reference": OTHER}, r"reference = 'a model': nothing reads it while kl_coefficient is 0\. Raise kl_coeffic"),
        ({"reference_apart": True}, r"reference_apart = True: there is no reference while kl_coefficient is 0"),
        ({"reference_eta": 0.5}, r"reference_eta = 0\.5: there is no reference while kl_coefficient is 0\. Raise it"),
        ({"reference_eta": 1.1}, r"GRPO\.reference_eta = 1\.1: input should be less than or equal to 1"),
        ({"reference_eta": -0.1}, r"GRPO\.reference_eta = -0\.1: input should be greater than or equal to 0"),
        (
            {"reference_eta": 0.5, "kl_coefficient": 0.1, "reference_apart": True},
            r"reference_eta = 0\.5: .* on the actor's workers only\. Leave reference_apart out, or this",
        ),
        (
            {"reference_eta": 0.5, "kl_coefficient": 0.1, "reference": OTHER},
            r"reference_eta = 0\.5: .* of the actor's layout only\. Make reference\.layout and actor\.layout equal",
        ),
        (
            {"reference_eta": 0.5, "kl_coefficient": 0.1, "actor": replace(ACTOR, lora=LoRA())},
            r"reference_eta = 0\.5: the reference is the base of the actor's adapters, .* train the actor without lora",
        ),
        ({"run": RunOptions(workers=5)}, r"run\.workers = 5: the layouts ask for 6 "),
        ({"run": RunOptions(evaluate_every=2)}, r"run\.evaluate_every = 2: there is nothing to evaluate on"),
        ({"clip_low": -0.1}, r"GRPO\.clip_low = -0\.1: input should be greater than or equal to 0"),
        ({"kl_estimator": "k4"}, r"GRPO\.kl_estimator = 'k4': input should be 'k1', 'k2' or 'k3'"),
        ({"clip_low": 1.0}, r"clip_low = 1\.0: a probability ratio is never negative\. Use a value below 1"),
        (
            {"run": RunOptions(target_reward=0.5, evaluate_every=2)},
            r"run\.evaluate_every = 2: there is nothing to evaluate on",
        ),
        (
            {"run": RunOptions(target_reward=0.5), "evaluation": EVALUATION},
            r"run\.target_reward = 0\.5: it is compared with evaluation/reward.* Set run\.evaluate_every",
        ),
        ({"clip": 0.2}, r"GRPO\.clip = 0\.2: GRPO has no such field"),
    ],
)
def test_rules(fields, message):
    with pytest.raises(ConfigError, match=message):
        grpo(**fields)


def test_what_the_rules_allow():
    assert grpo(minibatches=12).minibatches == 12  # two responses each, one a replica
    assert grpo(group_size=2).group_size == 2
    assert grpo(reference=OTHER, kl_coefficient=0.1).reference == OTHER
    assert grpo(run=RunOptions(evaluate_every=2), evaluation=EVALUATION).evaluation == EVALUATION


@pytest.mark.parametrize(
    ("fields", "workers"),
    [
        ({}, 6),
        ({"kl_coefficient": 0.1}, 6),
        ({"kl_coefficient": 0.1, "reference_apart": True}, 12),
        ({"kl_coefficient": 0.1, "reference": OTHER}, 6),
        ({"kl_coefficient": 0.1, "reference": OTHER, "reference_apart": True}, 8),
        ({"kl_coefficient": 0.1, "reference": ACTOR, "actor": OTHER}, 6),
    ],
)
def test_the_number_of_workers_agrees_with_the_layouts(fields, workers):
    made = grpo(**fields, run=RunOptions(workers=workers))
    assert made.compile().num_workers == workers
    with pytest.raises(ConfigError, match=rf"run\.workers = {workers + 1}: the layouts ask for {workers}"):
        grpo(**fields, run=RunOptions(workers=workers + 1))


def test_without_a_penalty_it_compiles_to_three_calls():
    optimizer = Optimizer(learning_rate=0.1)
    compiled = grpo(optimizer=optimizer).compile()
    assert [call.name for call in compiled.training.graph.calls] == ["generate", "reward", "train"]
    assert edges(compiled.training.graph) == {
        (DATASET, "generate"): ("prompt",),
        ("generate", "reward"): ("tokens", "loss_mask"),
        ("generate", "train"): ("tokens", "loss_mask", "log_probabilities"),
        ("reward", "train"): ("advantage",),
    }
    assert set(compiled.models) == {"actor"}
    placed = compiled.models["actor"]
    assert (placed.model, placed.optimizer, placed.field, placed.ranks) == (ACTOR, optimizer, "actor", range(6))
    assert (compiled.training.dataset_field, compiled.training.dataset.path.name) == ("prompts", "p")
    assert compiled.evaluations == ()
    assert compiled.graphs == {"grpo": compiled.training}


def test_with_a_penalty_the_reference_reads_responses_and_the_actor_reads_it():
    compiled = grpo(kl_coefficient=0.1).compile()
    assert [call.name for call in compiled.training.graph.calls] == ["generate", "reference", "reward", "train"]
    assert edges(compiled.training.graph) == {
        (DATASET, "generate"): ("prompt",),
        ("generate", "reward"): ("tokens", "loss_mask"),
        ("generate", "reference"): ("tokens", "loss_mask"),
        ("generate", "train"): ("tokens", "loss_mask", "log_probabilities"),
        ("reward", "train"): ("advantage",),
        ("reference", "train"): ("reference_log_probabilities",),
    }


@pytest.mark.parametrize(
    ("fields", "model", "field", "ranks"),
    [
        ({}, ACTOR, "actor", range(6)),
        ({"reference_apart": True}, ACTOR, "actor", range(6, 12)),
        ({"reference": OTHER}, OTHER, "reference", range(2)),
        ({"reference": OTHER, "reference_apart": True}, OTHER, "reference", range(6, 8)),
    ],
)
def test_the_reference_is_placed_and_never_trained(fields, model, field, ranks):
    compiled = grpo(kl_coefficient=0.1, **fields).compile()
    assert set(compiled.models) == {"actor", "reference"}
    placed = compiled.models["reference"]
    assert (placed.model, placed.field, placed.ranks, placed.optimizer) == (model, field, ranks, None)
    assert compiled.models["actor"].ranks == range(6)
    call = compiled.training.graph.call("reference")
    assert call.kind is CallKind.INFERENCE
    assert call.microbatching.min_count == model.layout.pp


@pytest.mark.parametrize("reference", [None, Model(path="r", layout=ACTOR.layout)])
def test_the_reference_moves_towards_the_actor_after_each_training(reference):
    compiled = grpo(kl_coefficient=0.1, reference_eta=0.3, reference=reference).compile()
    hooks = {call.name: (call.pre_hooks, call.post_hooks) for call in compiled.training.graph.model_calls}
    move = Reshard(source="actor", target="reference", eta=0.3)
    assert hooks == {"generate": ((), ()), "reference": ((), ()), "train": ((), (move,))}


@pytest.mark.parametrize(
    ("fields", "owner"),
    [
        ({}, "actor"),
        ({"reference": ACTOR}, "actor"),
        ({"reference": replace(ACTOR, layout=replace(ACTOR.layout, recompute=True))}, "actor"),
        ({"reference": OTHER}, None),
        ({"reference": replace(ACTOR, layout=Layout(dp=3, pp=2))}, None),
        ({"reference": replace(ACTOR, dtype=Precision.BFLOAT16)}, None),
        ({"reference": replace(ACTOR, lora=LoRA(path="l"))}, None),
        ({"reference_apart": True}, None),
        ({"actor": ACTOR}, None),
        ({"actor": replace(ACTOR, trainable=("norm",))}, "actor"),
        ({"actor": replace(ACTOR, trainable=("norm",)), "reference": OTHER}, None),
        ({"actor": replace(ACTOR, trainable=("norm",)), "reference_apart": True}, None),
        ({"actor": replace(ACTOR, trainable=("norm",)), "reference_eta": 0.3}, None),
    ],
)
def test_the_reference_of_an_actor_that_is_not_all_trained_is_its_base_and_shares_weights(fields, owner):
    compiled = grpo(**{"kl_coefficient": 0.1, "actor": replace(ACTOR, lora=LoRA()), **fields}).compile()
    assert compiled.owner_of("reference") == owner
    assert compiled.owner_of("actor") is None
    if "reference" not in fields:
        assert compiled.models["reference"].model == ACTOR


def test_the_reference_stays_by_default():
    graph = grpo(kl_coefficient=0.1).compile().training.graph
    assert all(call.pre_hooks == call.post_hooks == () for call in graph.model_calls)


def test_each_call_has_its_settings():
    compiled = grpo(
        kl_coefficient=0.1,
        kl_estimator=KLEstimator.K2,
        clip_low=0.1,
        clip_high=0.3,
        loss_normalisation=LossNormalisation.SEQUENCE,
        normalise_by_std=False,
        drop_zero_variance=True,
    ).compile()
    generate, reference, reward, train = (
        compiled.training.graph.call(name) for name in ("generate", "reference", "reward", "train")
    )
    assert generate.settings == Generation(sampling=grpo().sampling)
    assert generate.outputs == ("tokens", "loss_mask", "log_probabilities", "versions")
    assert reference.settings == LogProbabilities(temperature=0.8)
    assert reference.outputs == ("reference_log_probabilities",)
    assert reference.output_remap == {"log_probabilities": "reference_log_probabilities"}
    assert reward.function == RewardFunction(reward=REWARD, normalise_by_std=False, drop_zero_variance=True)
    assert train.settings == PolicyLoss(
        clip_low=0.1,
        clip_high=0.3,
        kl_coefficient=0.1,
        kl_estimator=KLEstimator.K2,
        normalisation=LossNormalisation.SEQUENCE,
        temperature=0.8,
    )
    assert [call.kind for call in (generate, reference, train)] == list(CallKind)
    assert [call.model for call in (generate, reference, train)] == ["actor", "reference", "actor"]


def test_sizes_count_responses_and_rows_count_prompts():
    compiled = grpo(kl_coefficient=0.1, minibatches=3, passes=2, microbatch_tokens=99).compile()
    graph = compiled.training.graph
    assert (graph.sequences_per_row, graph.batch_size) == (4, 6)
    assert {call.name: call.batch_size for call in graph.calls} == dict.fromkeys(
        ("generate", "reference", "reward", "train"), 24
    )
    sizes = {call.name: (call.minibatch_size, call.passes) for call in graph.model_calls}
    assert sizes == {"generate": (24, 1), "reference": (24, 1), "train": (8, 2)}
    assert {call.microbatching for call in graph.model_calls} == {Microbatching(max_tokens=99, min_count=3)}


def test_the_evaluation_answers_each_prompt_once_and_scores_it():
    compiled = grpo(evaluation=EVALUATION, microbatch_tokens=99).compile()
    (plan,) = compiled.evaluations
    assert plan is not None
    assert (plan.dataset, plan.dataset_field) == (EVALUATION.dataset, "evaluation.dataset")
    assert [call.name for call in plan.graph.calls] == ["generate", "score"]
    assert edges(plan.graph) == {(DATASET, "generate"): ("prompt",), ("generate", "score"): ("tokens", "loss_mask")}
    assert (plan.graph.sequences_per_row, plan.graph.batch_size) == (1, 48)
    generate, score = plan.graph.calls
    assert generate.settings == Generation(sampling=EVALUATION.sampling)
    assert (generate.minibatch_size, generate.microbatching) == (48, Microbatching(max_tokens=99, min_count=3))
    assert score.function == RewardFunction(reward=EVALUATION.reward, has_advantages=False)
    assert score.outputs == ("reward",)
    assert compiled.graphs["evaluation"] is plan


def test_whatever_a_user_writes_it_with_is_public():
    names = {"GRPO", "AnswerEvaluation", "KLEstimator", "LossNormalisation", "OnFailure", "Reward", "Sampling"}
    assert names <= set(trainmaster.__all__)
    for name in names:
        assert getattr(trainmaster, name).__name__ == name
    assert trainmaster.GRPO is GRPO


def test_a_reference_has_no_more_copies_than_there_are_responses():
    with pytest.raises(ConfigError, match=r"reference\.layout\.dp = 8: a step has only 2 responses"):
        grpo(batch_size=1, group_size=2, kl_coefficient=0.1, reference=Model(path="m", layout=Layout(dp=8)))
