"""Models that end in a score: drawn, read, trained over stages, written, and what transformers makes of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config
from trainmaster.api.errors import ModelError
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.checkpoint import write_config
from trainmaster.workers.models.loading import init_stage, load_stage
from trainmaster.workers.models.stage import Head
from transformers import AutoModelForSequenceClassification

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe", "deepseek_v3", "opt"]
LENGTHS = (5, 12, 3)
IDS = torch.arange(20)[None] + 3


def values(stages):
    batch, hidden = PackedBatch(LENGTHS, CPU), None
    for stage in stages:
        hidden = stage(IDS, batch, hidden)
    return stages[-1].values(hidden)


def load_scalar(path, num_stages, seed=0):
    return [load_stage(path, index, num_stages, CPU, head=Head.SCALAR, seed=seed) for index in range(num_stages)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_reward_model_is_what_transformers_reads(model_type, write_checkpoint, tmp_path):
    config = tiny_config(model_type)
    stages = [init_stage(config, 5, index, 2, CPU, head=Head.SCALAR) for index in range(2)]
    write_checkpoint(stages, tmp_path)
    with hf_compat.quiet():
        whole, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(whole).__name__ in json.loads((tmp_path / "config.json").read_text())["architectures"]
    got = values([stage.eval() for stage in stages])
    assert got.shape == (1, 20)
    whole.eval()
    ends = torch.tensor(LENGTHS).cumsum(0)
    wanted = torch.cat([whole(input_ids=ids).logits[0] for ids in IDS.split(LENGTHS, 1)])
    torch.testing.assert_close(got[0, ends - 1], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_was_written_is_read_in_any_cut(model_type, write_checkpoint, tmp_path):
    write_checkpoint([init_stage(tiny_config(model_type), 5, 0, 1, CPU, head=Head.SCALAR)], tmp_path)
    wanted = values([stage.eval() for stage in load_scalar(tmp_path, 1)])
    for num_stages in (2, 4):
        stages = [stage.eval() for stage in load_scalar(tmp_path, num_stages)]
        torch.testing.assert_close(values(stages), wanted, atol=1e-6, rtol=1e-5)
        assert [name for stage in stages for name, _ in stage.model.named_parameters() if "score" in name] == [
            "score.weight"
        ]


def test_a_language_model_gets_a_score_that_depends_on_the_seed_alone(whole_of):
    directory = whole_of("llama").directory
    torch.manual_seed(1)
    first = load_scalar(directory, 1, seed=7)[0].model.score.weight
    torch.manual_seed(2)
    again = load_scalar(directory, 3, seed=7)[-1].model.score.weight
    other = load_scalar(directory, 1, seed=8)[0].model.score.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() > 0
    drawn = init_stage(whole_of("llama").config, 7, 0, 1, CPU, head=Head.SCALAR).model.score.weight
    assert torch.equal(first, drawn)


def test_the_rest_is_the_language_models(whole_of):
    whole = whole_of("qwen2")  # whose head is its embedding
    stages = load_scalar(whole.directory, 2)
    weights = dict(whole.model.named_parameters())
    names = [name for stage in stages for name, _ in stage.model.named_parameters()]
    assert sorted(names) == sorted([*weights, "score.weight"])  # each once: nothing is tied
    for stage in stages:
        assert stage.tied_embedding is None
        for name, parameter in stage.model.named_parameters():
            assert name == "score.weight" or torch.equal(parameter, weights[name])


def test_a_reward_model_without_its_score_is_refused(write_checkpoint, tmp_path):
    stages = [init_stage(tiny_config("llama"), 5, index, 2, CPU, head=Head.SCALAR) for index in range(2)]
    write_checkpoint(stages, tmp_path)
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"score\.weight is missing"):
        load_stage(tmp_path, 0, 1, CPU, head=Head.SCALAR)


def test_gradients_reach_all_stages():
    """Against one stage: that one is compared with transformers above."""
    config = tiny_config("qwen3")
    gradients = []
    for num_stages in (1, 3):
        stages = [init_stage(config, 5, index, num_stages, CPU, head=Head.SCALAR) for index in range(num_stages)]
        values(stages).square().sum().backward()
        gradients.append({name: p.grad for stage in stages for name, p in stage.model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, atol=1e-6, rtol=1e-4, msg=name)


def test_the_head_that_is_not_there_is_not_asked():
    scalar = init_stage(tiny_config("llama"), 1, 0, 1, CPU, head=Head.SCALAR)
    language = init_stage(tiny_config("llama"), 1, 0, 1, CPU)
    hidden = torch.zeros(1, 3, 32)
    with pytest.raises(AssertionError, match="gives values"):
        scalar.logits(hidden)
    with pytest.raises(AssertionError, match="gives logits"):
        language.values(hidden)


def test_saved_names_are_those_of_the_type(tmp_path, write_checkpoint):
    stage = init_stage(tiny_config("gpt2"), 1, 0, 1, CPU, head=Head.SCALAR)
    write_checkpoint([stage], tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "score.weight" in names
    assert not any("lm_head" in name for name in names)
    write_config(stage, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["architectures"] == ["GPT2ForSequenceClassification"]
