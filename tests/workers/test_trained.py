"""What is trained, and what is not: values, gradients, optimizer state and memory; and one base under two models."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from pipelines import GPT2, QWEN, Case, make_context, make_shard, microbatch
from tiny_models import tiny_config
from trainmaster.api.algorithms import LogProbabilities
from trainmaster.api.config import Layout, LoRA, Precision
from trainmaster.api.errors import ConfigError, ModelError
from trainmaster.api.experiments.base import PlacedModel
from trainmaster.api.sampling import Sampling
from trainmaster.workers.adapters import is_adapter
from trainmaster.workers.algorithms import inference_algorithm
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.context import ShardGroups
from trainmaster.workers.memory import Room
from trainmaster.workers.optimizer_state import read_state, write_state
from trainmaster.workers.pipeline.generation import Prompt
from trainmaster.workers.shard import ModelShard

SOME = Case(layout=Layout(), trainable=(r"layers\.[13]\..*_proj", "norm"), num_steps=2)
ADAPTERS = Case(layout=Layout(), lora=LoRA(r=2, lora_alpha=16), num_steps=2)
CASES = pytest.mark.parametrize("case", [SOME, ADAPTERS], ids=["parts", "adapters"])
SCORES = inference_algorithm(LogProbabilities(temperature=1.0))


def train(shard: ModelShard, case: Case) -> None:
    for step in range(case.num_steps):
        shard.train(SupervisedFineTuning(), case.share(0, step))


@pytest.mark.parametrize("dtype", list(Precision))
@CASES
def test_what_is_not_trained_stays_and_takes_nothing(case: Case, dtype: Precision) -> None:
    shard = make_shard(replace(case, dtype=dtype), 0, None)
    before = {name: each.detach().clone() for name, each in shard.stage.model.named_parameters()}
    train(shard, case)
    num_trained = 0
    for name, parameter in shard.stage.model.named_parameters():
        is_trained = is_adapter(name) or "norm" in name or (case is SOME and ("s.1." in name or "s.3." in name))
        if case is ADAPTERS:
            is_trained = is_adapter(name)
        num_trained += is_trained
        assert parameter.requires_grad == is_trained, name
        assert (parameter.grad is not None) == is_trained, name
        assert (parameter in shard.optimizer.masters) == is_trained, name
        if dtype is Precision.FLOAT32 or not is_trained:
            assert parameter.equal(before[name]) == (not is_trained), name
    assert 0 < num_trained < len(before)
    assert len(shard.optimizer.adamw.state) == num_trained


def test_parts_take_the_gradients_that_they_take_in_the_whole_model() -> None:
    case, whole = (
        replace(each, optimizer=replace(each.optimizer, max_gradient_norm=None))
        for each in (SOME, Case(layout=Layout()))
    )
    some, every = make_shard(case, 0, None), make_shard(whole, 0, None)
    for shard in (some, every):
        shard.train(SupervisedFineTuning(), case.share(0, 0))
    wanted = dict(every.stage.model.named_parameters())
    num_trained = 0
    for name, parameter in some.stage.model.named_parameters():
        if parameter.grad is not None:
            num_trained += 1
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-5, atol=1e-7, msg=name)
    is_wanted = [re.search("|".join(SOME.trainable), name) is not None for name in wanted]
    assert 0 < num_trained == sum(is_wanted) < len(wanted)


@pytest.mark.parametrize(("config", "pattern"), [(QWEN, "lm_head"), (QWEN, r"layers\.7\."), (GPT2, "embed_tokens")])
def test_a_pattern_that_finds_nothing_in_the_whole_model_is_named_on_every_stage(config, pattern: str) -> None:
    case = Case(layout=Layout(pp=2), config=config, trainable=(r"\.3\.", pattern))
    message = r"model\.trainable\[1\] = .* no parameter that the model can train has such a name.* a tied head has its"
    for rank in range(2):
        with pytest.raises(ConfigError, match=message):
            make_shard(case, rank, None)


def test_what_its_author_never_trains_is_not_trained_whatever_is_asked_for() -> None:
    case, room = Case(layout=Layout(), config=tiny_config("afmoe"), trainable=(r"layers\.3\.",)), Room("here", 2**30)
    context = replace(make_context(case, 0), room=room)
    shard = ModelShard(context.compiled.models["model"], context, ShardGroups())
    named = dict(shard.stage.model.named_parameters())
    assert not named["model.layers.3.mlp.expert_bias"].requires_grad
    trained = [each for name, each in named.items() if "layers.3." in name and not name.endswith("expert_bias")]
    assert all(each.requires_grad for each in trained)
    num_trained, num_all = (sum(each.numel() for each in some) for some in (trained, named.values()))
    assert 2**30 - room._left == 4 * num_all + 12 * num_trained
    with pytest.raises(ConfigError, match=r"trainable\[0\] = 'expert_bias': no parameter that the model can train has"):
        make_shard(replace(case, trainable=("expert_bias",)), 0, None)


def test_a_stage_may_have_nothing_to_train() -> None:
    case = Case(layout=Layout(pp=2), trainable=(r"layers\.3\.",))
    first, last = (make_shard(case, rank, None) for rank in range(2))
    assert not first.optimizer.masters
    assert first.optimizer.step(1) == last.optimizer.step(1) > 0


@CASES
def test_a_stages_state_is_that_of_what_it_trains(case: Case, tmp_path) -> None:
    shard, again = make_shard(case, 0, None), make_shard(case, 0, None)
    train(shard, case)
    write_state(shard.stage, shard.optimizer, shard.version, tmp_path)
    assert read_state(again.stages, again.optimizer, tmp_path) == 2
    moments = [
        [each.optimizer.adamw.state[key]["exp_avg"] for key in each.optimizer.masters] for each in (shard, again)
    ]
    assert all(one.equal(other) for one, other in zip(*moments, strict=True))
    other = make_shard(replace(case, trainable=(), lora=None), 0, None)
    with pytest.raises(ModelError, match=r"has no state of .*: it was not trained there, or the model is another"):
        read_state(other.stages, other.optimizer, tmp_path)


@CASES
@pytest.mark.parametrize("dtype", list(Precision))
def test_the_estimate_of_memory_is_what_there_is_after_a_step(case: Case, dtype: Precision) -> None:
    room = Room("in a test", 2**30)
    context = replace(make_context(replace(case, dtype=dtype), 0), room=room)
    shard = ModelShard(context.compiled.models["model"], context, ShardGroups())
    train(shard, case)
    optimizer = shard.optimizer
    found = list(shard.stage.parameters())
    found += [parameter.grad for parameter in found if parameter.grad is not None]
    found += [master for parameter, master in optimizer.masters.items() if master is not parameter]
    found += [each for state in optimizer.adamw.state.values() for each in state.values() if each.ndim]
    assert 2**30 - room._left == sum(each.nbytes for each in found)


# -- one base under two models ----------------------------------------------------------------------------------------


def pair(case: Case) -> tuple[ModelShard, ModelShard, ModelShard]:
    """A trained actor, a reference on its weights, and one with weights of its own."""
    context = make_context(case, 0)
    placed = context.compiled.models["model"]
    base = PlacedModel(model=replace(placed.model, lora=None, trainable=()), field="reference")
    actor = ModelShard(placed, context, ShardGroups())
    return actor, ModelShard(base, context, ShardGroups(), owner=actor), ModelShard(base, context, ShardGroups())


def scores(shard: ModelShard) -> torch.Tensor:
    _, outputs = shard.infer(SCORES, [microbatch(0), microbatch(2)])
    return torch.cat([each["log_probabilities"] for each in outputs])


@CASES
@pytest.mark.parametrize("dtype", list(Precision))
def test_a_reference_on_the_actors_weights_scores_as_one_with_its_own(case: Case, dtype: Precision) -> None:
    case = replace(case, dtype=dtype)
    actor, reference, apart = pair(case)
    wanted = scores(apart)
    assert scores(reference).equal(wanted)
    train(actor, case)
    learnt = scores(actor)
    assert scores(reference).equal(wanted), "whatever the actor learns"
    assert scores(actor).equal(learnt), "whatever the reference reads"
    assert not torch.allclose(learnt, wanted, atol=1e-2)
    assert sum(each.numel() for each in reference.own_parameters()) == sum(
        each.numel() for each in apart.own_parameters()
    )
    assert (reference.version, actor.version) == (0, 2)


@CASES
def test_only_what_the_actor_trains_of_its_base_is_in_memory_twice(case: Case) -> None:
    room = Room("in a test", 2**30)
    context = replace(make_context(case, 0), room=room)
    actor, reference, apart = pair(case)
    own = {each.data_ptr() for each in actor.stage.parameters()}
    assert {each.data_ptr() for each in reference.own_parameters()} <= own, "there is no second copy"
    assert not {each.data_ptr() for each in apart.own_parameters()} & own
    before = room._left
    ModelShard(reference.placed, context, ShardGroups(), owner=actor)
    num_copied = sum(each.numel() for each in actor.optimizer.masters) if case is SOME else 0
    assert before - room._left == 4 * num_copied
    assert num_copied < sum(each.numel() for each in actor.stage.parameters())
    with pytest.raises(ModelError, match=r"reference: [\d,]+ parameters take .* Raise reference\.layout\.pp"):
        ModelShard(reference.placed, replace(context, room=Room("here", -1)), ShardGroups(), owner=pair(SOME)[0])


@CASES
def test_a_reference_on_the_actors_weights_answers_as_the_base_and_the_actor_goes_on(case: Case) -> None:
    actor, reference, apart = pair(case)
    other, _, _ = pair(case)
    prompts, sampling = [[Prompt("d/0/0/0", torch.tensor([3, 4, 5]))]], Sampling(max_new_tokens=6)
    for step in range(3):
        found, wanted = (each.generate(prompts, sampling, (1,)) for each in (reference, apart))
        assert found[0].tokens.equal(wanted[0].tokens)
        assert found[0].logprobs.equal(wanted[0].logprobs)
        done = [each.train(SupervisedFineTuning(), case.share(0, step))["loss"] for each in (actor, other)]
        assert done[0] == done[1], "as if nobody else used its weights"


@CASES
def test_offloading_is_each_ones_own_and_the_reference_brings_all_back(case: Case) -> None:
    actor, reference, apart = pair(case)
    train(actor, case)
    reference.offload()
    assert not actor.is_offloaded
    actor.offload()
    assert scores(reference).equal(scores(apart))
    assert not actor.is_offloaded
    assert not reference.is_offloaded


@CASES
def test_an_error_leaves_the_actor_what_it_learnt(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, reference, _ = pair(case)
    train(actor, case)
    wanted = scores(actor)
    with monkeypatch.context() as patch:
        patch.setattr(type(SCORES), "infer", lambda *_: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            scores(reference)
    assert scores(actor).equal(wanted)
