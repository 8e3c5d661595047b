"""What stages write is an ordinary Hugging Face directory."""

import json

import pytest
import torch
from safetensors import safe_open
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.checkpoint import write_config, write_stage
from trainmaster.workers.models.loading import init_stage, load_stage
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")


def tensor_names(directory):
    names = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def test_a_round_trip_through_stages_changes_nothing(whole, num_stages, write_checkpoint, tmp_path):
    write_checkpoint([load_stage(whole.directory, index, num_stages, CPU) for index in range(num_stages)], tmp_path)
    assert sorted(tensor_names(tmp_path)) == sorted(tensor_names(whole.directory))
    with hf_compat.quiet():
        reread, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = whole.model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in reread.state_dict().items())
    ids = whole.ids[1][:, :12]
    with torch.no_grad():
        torch.testing.assert_close(reread(ids).logits, whole.logits[1][:, :12], atol=1e-5, rtol=1e-4)


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
