"""What is refused, by name and before any work: configurations, model types, stages that the probe finds leaking."""

from pathlib import Path

import pytest
import torch
from pipelines import Case, make_context
from tiny_models import tiny_config
from trainmaster.api.config import Layout, Model
from trainmaster.api.errors import ConfigError, ModelError
from trainmaster.api.experiments.base import PlacedModel
from trainmaster.api.model_support import Packing, Way
from trainmaster.workers.context import ShardGroups
from trainmaster.workers.models import probe
from trainmaster.workers.models.configs import model_limits
from trainmaster.workers.models.loading import init_stage
from trainmaster.workers.shard import ModelShard

CPU = torch.device("cpu")


def init(config, num_stages=1, index=0):
    return init_stage(config, 1, index, num_stages, CPU)


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"hiden_size": 32}, "model.config.hiden_size", "you may mean hidden_size|You may mean hidden_size"),
        ({"temperature": 0.5}, "model.config.temperature", "no keyword of Qwen2Config"),
        ({"attn_implementation": "sdpa"}, "model.config.attn_implementation", "no keyword of Qwen2Config"),
        ({"model_type": "qwen22"}, "model.config.model_type", "(?i)you may mean qwen2"),
        ({"model_type": None}, "model.config.model_type", "must be a model type of transformers"),
        ({"hidden_size": "32"}, "model.config.hidden_size", "expected int"),
    ],
)
def test_configuration(qwen2, change, field, says):
    with pytest.raises(ConfigError, match=says) as caught:
        init({**qwen2, **change})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "layout", "field"),
    [
        ({"hiden_size": 32}, Layout(), "reference.config.hiden_size"),
        ({"model_type": "qwen22"}, Layout(), "reference.config.model_type"),
        ({"hidden_size": "32"}, Layout(), "reference.config.hidden_size"),
        ({}, Layout(pp=5), "reference.layout.pp"),
    ],
)
def test_an_error_names_the_experiments_field(qwen2, changes, layout, field):
    model = Model(config=qwen2 | changes, tokenizer=Path("none"), layout=layout)
    context = make_context(Case(layout=layout), 0)
    with pytest.raises(ConfigError) as caught:
        ModelShard(PlacedModel(model=model, field="reference"), context, ShardGroups())
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} = ")
    if changes:
        with pytest.raises(ConfigError) as caught:
            model_limits(model, "reference")
        assert caught.value.field == field


def test_keywords_that_transformers_translates_are_known(qwen2):
    stage = init({**qwen2, "rope_theta": 5000.0, "num_labels": 2, "architectures": ["Qwen2ForCausalLM"]})
    assert stage.config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5"}, "'t5' is no causal language model"),
        ({"model_type": "bart"}, "'bart' is an encoder-decoder; use another type"),
        ({"model_type": "gemma3"}, r"'gemma3' has more parts than a language model of text \(gemma3_text is that\)"),
        ({"model_type": "clip_text_model"}, "'clip_text_model' is no causal language model"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "'gemma2' with use_bidirectional.* not causal"),
        ({"model_type": "falcon", "alibi": True}, "'falcon' with alibi = True has wrong outputs.*; set alibi to False"),
    ],
)
def test_model_types(config, says):
    with pytest.raises(ModelError, match=says):
        init(config)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "hrm_text"])
def test_a_type_that_cannot_be_cut_is_refused_on_two_stages(model_type):
    with pytest.raises(ModelError, match=f"'{model_type}' .*so it cannot be cut; set layout.pp and chunks to 1"):
        init(tiny_config(model_type), num_stages=2)
    init(tiny_config(model_type))


def test_layers_that_are_skipped_at_random_are_refused_on_two_stages():
    config = tiny_config("opt") | {"layerdrop": 0.2}
    with pytest.raises(
        ModelError, match=r"'opt' with layerdrop = 0\.2 skips layers at random.*; set layerdrop to 0, or"
    ):
        init(config, num_stages=2)
    init(config)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("gptj", "'gptj' takes no attention but its own"),
        ("bloom", "'bloom' computes with its attention mask"),
        ("mamba2", "'mamba2' has layers that do not attend through transformers' attention interface"),
        ("falcon_h1", "'falcon_h1' carries state from one packed sequence into the next"),
        ("inkling_text", "adds a position bias to its scores"),
        ("minimax_m3_vl_text", "MiniMaxM3VLAttention gives its attention block_indices, which packed attention does"),
    ],
)
def test_the_probe_refuses_rows_where_the_table_would_be_wrong(model_type, says):
    with pytest.raises(ModelError, match=says):
        init_stage(tiny_config(model_type), 1, 0, 1, CPU, way=Way(Packing.ROW))


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("xlm", "is not causal"),
        ("cpmant", "holds tokens in another order than one row after another"),
        ("xlnet", "holds tokens in another order than one row after another"),
    ],
)
def test_the_probe_refuses_what_is_not_causal(model_type, says):
    with pytest.raises(ModelError, match=f"'{model_type}' {says}"):
        init_stage(tiny_config(model_type), 1, 0, 1, CPU, way=Way(Packing.ALONE))


def test_layers_that_hand_on_more_than_hidden_states_are_not_cut():
    with pytest.raises(ModelError, match="'zaya' has layers that hand on more than hidden states"):
        init_stage(tiny_config("zaya"), 1, 0, 2, CPU, way=Way(Packing.ALONE))


def test_layers_that_read_embeddings_need_them_on_every_stage():
    config = {
        "model_type": "gemma4_text",
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "hidden_size": 32,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
    }
    with pytest.raises(ModelError, match=r"needs model\.embed_tokens on stage 1 of 3.*set layout\.pp and chunks to 1"):
        init_stage(config, 1, 1, 3, CPU, way=Way())
    stage = init(config, num_stages=3, index=1)
    assert {name for name, _ in stage.replicated} >= {"model.embed_tokens.weight"}
    assert stage.tied_embedding is None


def mix_neighbours(_module, args):
    return (args[0] + args[0].roll(1, 1), *args[1:])


def mix_followers(_module, args):
    hidden = args[0]
    return (torch.cat([hidden[:, :5], hidden[:, 5:] + hidden[:, 5:].mean(1, keepdim=True)], 1), *args[1:])


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("leak", "says"), [(mix_neighbours, "carries state"), (mix_followers, "is not causal")])
def test_probe_finds_leaks(qwen2, index, leak, says):
    stage = init(qwen2, 2, index)
    probe.check(stage)
    stage.cut.layers[1].mlp.register_forward_pre_hook(leak)
    with pytest.raises(ModelError, match=f"'qwen2' {says}"):
        probe.check(stage)


def test_probe_finds_layers_without_our_attention(qwen2):
    stage = init(qwen2)
    stage.cut.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelError, match="do not attend through transformers' attention interface"):
        probe.check(stage)


class Labelled(torch.Tensor):
    """What no stage sends."""


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        (lambda out: out.as_subclass(Labelled), "has layers that give Labelled, not a tensor"),
        (lambda out: (out, None, None, None), "cannot run as stage 0 of 2"),
    ],
)
def test_probe_finds_layers_that_give_other_things(qwen2, gives, says):
    stage = init(qwen2, num_stages=2)
    stage.cut.layers[1].register_forward_hook(lambda _module, _args, out: gives(out))
    with pytest.raises(ModelError, match=says):
        probe.check(stage)


def test_stand_ins_give_what_the_layers_give():
    stages = [init(tiny_config("bloom"), num_stages=3, index=index) for index in range(3)]
    for stage in stages:
        assert {stand_in.tuple_size for stand_in in stage.cut.stand_ins} == {2}


def test_probe_leaves_no_trace(qwen2):
    stage = init(qwen2)
    stage.cut.layers[0].eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    probe.check(stage)
    assert torch.equal(torch.get_rng_state(), before)
    assert not stage.cut.layers[0].training
    assert stage.cut.layers[1].training
    assert all(parameter.grad is None for parameter in stage.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stage.modules())


def test_a_configuration_that_builds_no_model(qwen2):
    with pytest.raises(ModelError, match="'qwen2' cannot be built from its configuration: KeyError"):
        init({**qwen2, "hidden_act": "no_such_activation"})
