"""What stages write is an ordinary Hugging Face directory."""

import json

import pytest
import torch
from model_checks import check_save
from safetensors import safe_open
from trainmaster.workers.models.checkpoint import write_config, write_stage
from trainmaster.workers.models.loading import init_stage, load_stage

CPU = torch.device("cpu")


def test_a_round_trip_through_stages_changes_nothing(whole, make_stages, num_stages):
    check_save(make_stages, whole, num_stages)


def test_what_was_initialised_can_be_written_and_cut_anew(config, write_checkpoint, tmp_path):
    drawn = [init_stage(config, 7, index, 2, CPU) for index in range(2)]
    write_checkpoint(drawn, tmp_path)
    wanted = {name: p for stage in drawn for name, p in stage.model.named_parameters()}
    for index in range(3):
        for name, parameter in load_stage(tmp_path, index, 3, CPU).model.named_parameters():
            assert torch.equal(parameter, wanted[name]), name


def test_file_names_and_index(qwen2, tmp_path):
    stages = [init_stage(qwen2, 1, index, 3, CPU) for index in range(3)]
    files = [write_stage(stage, tmp_path) for stage in stages]
    assert [file.file for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for file in files:
        with safe_open(tmp_path / file.file, "pt") as opened:
            assert sorted(opened.keys()) == sorted(file.tensors)
    assert "model.embed_tokens.weight" in files[0].tensors
    assert "model.embed_tokens.weight" not in files[2].tensors
    assert not any("lm_head.weight" in file.tensors for file in files)
    num_parameters = sum(p.numel() for p in init_stage(qwen2, 1, 0, 1, CPU).parameters())
    assert sum(file.size_bytes for file in files) == 4 * num_parameters
    assert write_stage(init_stage(qwen2, 1, 0, 1, CPU), tmp_path / "new" / "one").file == "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_config_is_transformers_own(qwen2, tmp_path, dtype):
    write_config(init_stage(qwen2, 1, 0, 2, CPU, dtype), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["architectures"] == ["Qwen2ForCausalLM"]
    assert described["dtype"] == str(dtype).removeprefix("torch.")
    assert {key: described[key] for key in qwen2} == qwen2
    assert not any("trainmaster" in str(value) for value in described.values())
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
