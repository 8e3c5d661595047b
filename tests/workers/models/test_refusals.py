"""What is refused, by name and before any work: configurations, hybrids, and stages that the probe finds leaking."""

import pytest
import torch
from trainmaster.api.errors import ConfigError, ModelError
from trainmaster.workers.models import probe
from trainmaster.workers.models.loading import init_stage

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


def test_keywords_that_transformers_translates_are_known(qwen2):
    stage = init({**qwen2, "rope_theta": 5000.0, "num_labels": 2, "architectures": ["Qwen2ForCausalLM"]})
    assert stage.config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mamba2", "num_hidden_layers": 2}, "'mamba2' has layers of kind linear_attention"),
        ({"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "'lfm2'.*conv"),
        ({"model_type": "t5"}, "'t5' is an encoder-decoder"),
        ({"model_type": "gemma3"}, "'gemma3' has more parts than a text model"),
        ({"model_type": "clip_text_model"}, "'clip_text_model' has no causal language model"),
        ({"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "'gptj' takes no attention"),
    ],
)
def test_model_types(config, says):
    with pytest.raises(ModelError, match=says):
        init(config)


def test_a_model_whose_attention_alters_the_mask():
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    with pytest.raises(ModelError, match="'bloom' cannot run as stage 0 of 1"):
        init(config)


def test_a_model_whose_layers_read_embeddings_is_cut_nowhere():
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
    init(config)
    with pytest.raises(ModelError, match=r"needs model\.embed_tokens on stage 1 of 3.*set model\.layout\.pp to 1"):
        init(config, num_stages=3, index=1)


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


def test_probe_finds_layers_that_give_tuples(qwen2):
    stage = init(qwen2)
    stage.cut.layers[3].register_forward_hook(lambda _module, _args, out: torch.nn.Parameter(out.detach()))
    with pytest.raises(ModelError, match="layers that give Parameter, not a tensor"):
        probe.check(stage)


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
