"""Stages from checkpoints and from seeds."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from trainmaster.api.errors import ConfigError, ModelError
from trainmaster.api.model_support import Packing, Way
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.loading import init_stage, load_stage
from transformers import AutoConfig, AutoModelForCausalLM

CPU = torch.device("cpu")
ALONE = Way(Packing.ALONE)


@pytest.fixture
def llama_copy(whole_of, tmp_path):
    return shutil.copytree(whole_of("llama").directory, tmp_path / "llama")


def rewrite(directory, change):
    """Change a checkpoint's tensors."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_tensors_of_other_stages_are_no_fault_where_a_types_renaming_meets_them(write_checkpoint, tmp_path):
    """It makes `model.kv_norm` of the final norm, on a stage that has none to tell it better."""
    whole = init_stage(tiny_config("deepseek_v4"), 5, 0, 1, CPU, way=ALONE)
    write_checkpoint([whole], tmp_path)
    first = load_stage(tmp_path, 0, 2, CPU, way=ALONE)
    wanted = dict(whole.model.named_parameters())
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_initial_weights_do_not_depend_on_the_cut(config):
    whole = dict(init_stage(config, 7, 0, 1, CPU).model.named_parameters())
    for num_stages in (2, 3):
        stages = [init_stage(config, 7, index, num_stages, CPU) for index in range(num_stages)]
        parts = [(name, p) for stage in stages for name, p in stage.model.named_parameters()]
        assert {name for name, _ in parts} == set(whole)
        for name, parameter in parts:
            assert torch.equal(parameter, whole[name]), name


def test_initial_weights_depend_on_the_seed_and_on_nothing_drawn_before(qwen2):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = init_stage(qwen2, 1, 0, 1, CPU).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    again, other = init_stage(qwen2, 1, 0, 1, CPU).state_dict(), init_stage(qwen2, 2, 0, 1, CPU).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["model.model.embed_tokens.weight"], other["model.model.embed_tokens.weight"])


def test_initial_weights_have_the_authors_distribution_and_buffers(config):
    stage = init_stage(config, 7, 0, 1, CPU)
    torch.manual_seed(0)
    usual = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    buffers = dict(stage.model.named_buffers())
    assert set(buffers) == {name for name, _ in usual.named_buffers()}
    for name, buffer in usual.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
        assert buffer.dtype == buffers[name].dtype, name
    parameters = dict(stage.model.named_parameters())
    for name, wanted in usual.named_parameters():
        assert parameters[name].dtype == wanted.dtype
        if wanted.numel() > 1000:
            assert parameters[name].std().item() == pytest.approx(wanted.std().item(), rel=0.2), name
        elif not wanted.std().item() > 0:
            assert torch.equal(parameters[name], wanted), name


def test_rotary_buffers_stay_float32_in_half_precision(qwen2):
    stage = init_stage(qwen2, 7, 1, 2, CPU, torch.bfloat16)
    wanted = init_stage(qwen2, 7, 1, 2, CPU)
    assert {p.dtype for p in stage.parameters()} == {torch.bfloat16}
    assert torch.equal(stage.model.model.rotary_emb.inv_freq, wanted.model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("model_type", ["deepseek_v3"])
def test_what_stays_float32_when_loaded_stays_so_when_initialised(whole, config):
    loaded = load_stage(whole.directory, 0, 1, CPU, torch.bfloat16).state_dict()
    drawn = init_stage(config, 1, 0, 1, CPU, torch.bfloat16).state_dict()
    assert {name: t.dtype for name, t in loaded.items()} == {name: t.dtype for name, t in drawn.items()}
    assert torch.float32 in {tensor.dtype for tensor in loaded.values()}


def test_stages_hold_only_their_own(whole):
    names = [[n for n, _ in load_stage(whole.directory, i, 3, CPU).model.named_parameters()] for i in range(3)]
    assert set().union(*names) == {name for name, _ in whole.model.named_parameters()}
    layers = [{found[1] for name in part if (found := re.search(r"\.(\d+)\.", name))} for part in names]
    assert all(layers)
    assert not layers[0] & layers[1]
    assert not layers[1] & layers[2]


def test_stages_come_in_training_mode(qwen2, whole_of):
    assert all(module.training for module in init_stage(qwen2, 1, 0, 1, CPU).modules())
    assert all(module.training for module in load_stage(whole_of("qwen2").directory, 1, 2, CPU).modules())


def test_loading_and_initialising_are_silent(whole, config, capfd):
    load_stage(whole.directory, 0, 2, CPU)
    init_stage(config, 1, 0, 2, CPU)
    assert capfd.readouterr() == ("", "")


def test_a_repository_in_the_cache_is_read_by_its_name(qwen2, write_checkpoint, tmp_path, monkeypatch):
    """A snapshot of several files, as `hf download` leaves it: links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    written = [init_stage(qwen2, 7, index, 3, CPU) for index in range(3)]
    blobs, snapshot = tmp_path / "models--some--model" / "blobs", tmp_path / "models--some--model" / "snapshots" / "abc"
    write_checkpoint(written, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    wanted = {name: p for stage in written for name, p in stage.model.named_parameters()}
    for index in range(2):
        for name, parameter in load_stage(Path("some/model"), index, 2, CPU).model.named_parameters():
            assert torch.equal(parameter, wanted[name]), name
    with pytest.raises(ModelError, match=r"some/other holds no config\.json; .*`hf download some/other` fetches it"):
        load_stage(Path("some/other"), 0, 1, CPU)


def test_overwriting_the_file_does_not_change_a_loaded_stage(llama_copy):
    stage = load_stage(llama_copy, 0, 1, CPU)
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    file = llama_copy / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.state_dict().items())


def test_missing_tensor_is_named(llama_copy):
    rewrite(llama_copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    load_stage(llama_copy, 0, 3, CPU)  # does not need it
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_stage(llama_copy, 1, 3, CPU)


def test_a_tensor_of_no_stage_is_named_by_all(llama_copy):
    rewrite(llama_copy, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(5)}))
    for index in range(2):
        with pytest.raises(
            ModelError, match=r"json: model\.layers\.9\.mlp\.up_proj\.weight is of no use to the model\. "
        ):
            load_stage(llama_copy, index, 2, CPU)


def test_misshapen_tensor_is_named(llama_copy):
    rewrite(llama_copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[5\] where the model has \[32\]"):
        load_stage(llama_copy, 1, 2, CPU)


EXPERT = "model.layers.3.mlp.experts.{}.{}_proj.weight"


def renamed(tensors, old, new):
    for part in ("gate", "up", "down"):
        tensors[EXPERT.format(new, part)] = tensors.pop(EXPERT.format(old, part))


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (lambda tensors: tensors.pop(EXPERT.format(1, "gate")), [EXPERT.format(1, "gate") + " is missing"]),
        (lambda tensors: tensors.pop(EXPERT.format(3, "down")), [EXPERT.format(3, "down") + " is missing"]),
        (
            lambda tensors: tensors.update({EXPERT.format(2, "up"): torch.ones(3, 32)}),
            [EXPERT.format(2, "up") + r" has shape \[3, 32\] where the model has \[16, 32\]"],
        ),
        (  # which transformers loads, the fifth as the fourth
            lambda tensors: renamed(tensors, 3, 4),
            [EXPERT.format(3, "down") + " is missing", EXPERT.format(4, "down") + " is of no use to the model"],
        ),
    ],
    ids=["missing", "last missing", "misshapen", "shifted"],
)
def test_tensors_that_are_stacked_are_named_one_by_one(whole_of, tmp_path, change, faults):
    directory = shutil.copytree(whole_of("qwen3_moe").directory, tmp_path / "experts")
    rewrite(directory, change)
    load_stage(directory, 0, 2, CPU)  # does not need them
    with pytest.raises(ModelError, match=".*".join(faults)):
        load_stage(directory, 1, 2, CPU)


def test_what_transformers_cannot_convert_is_refused(whole_of, tmp_path, monkeypatch):
    """As in a format that it reads and would not write, of which we do not know what must be there."""
    directory = shutil.copytree(whole_of("qwen3_moe").directory, tmp_path / "experts")
    rewrite(directory, lambda tensors: tensors.pop(EXPERT.format(1, "gate")))
    monkeypatch.setattr(hf_compat, "conversion_faults", lambda model, found: [])
    with pytest.raises(ModelError, match="experts cannot be read as a safetensors checkpoint: "):
        load_stage(directory, 0, 1, CPU)


def test_experts_that_are_stacked_in_the_file_are_read_as_they_are(whole_of, tmp_path):
    directory = shutil.copytree(whole_of("qwen3_moe").directory, tmp_path / "experts")
    state = dict(whole_of("qwen3_moe").model.state_dict())
    rewrite(directory, lambda tensors: (tensors.clear(), tensors.update(state)))
    loaded = load_stage(directory, 0, 1, CPU).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_of_many_faults_the_first_are_named_and_the_rest_counted(llama_copy):
    rewrite(llama_copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name])
    rest = r"; and 5 more\. Take the config\.json that was saved with it, or fetch the files anew$"
    with pytest.raises(ModelError, match=r"json: (model\.layers\.1\.[\w.]+ is missing(; )?){4}" + rest):
        load_stage(llama_copy, 0, 1, CPU)


def test_head_that_contradicts_its_tie_is_refused(whole_of, tmp_path):
    directory = shutil.copytree(whole_of("qwen2").directory, tmp_path / "qwen2")
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": torch.ones(64, 32)}))
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load_stage(directory, 1, 2, CPU)


def test_what_is_no_checkpoint_is_refused(llama_copy, tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_stage(tmp_path / "nothing", 0, 1, CPU)
    (llama_copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read as a safetensors checkpoint"):
        load_stage(llama_copy, 0, 1, CPU)


def test_checkpoint_of_unknown_type_is_refused(llama_copy):
    described = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps(described | {"model_type": "no_such_type"}))
    with pytest.raises(ModelError, match="no_such_type"):
        load_stage(llama_copy, 0, 1, CPU)


def test_more_stages_than_layers_are_refused(qwen2, whole_of):
    with pytest.raises(ConfigError, match=r"model\.layout\.pp = 5: .*4 layers"):
        init_stage(qwen2, 1, 0, 5, CPU)
    with pytest.raises(ConfigError, match=r"model\.layout\.pp = 9: .*4 layers"):
        load_stage(whole_of("qwen2").directory, 0, 9, CPU)


def test_a_model_that_leaves_a_parameter_unset_is_refused():
    config = {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn\.weight.* without initial values"):
        init_stage(config, 1, 0, 1, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_stages", [2])
def test_weights_and_outputs_do_not_depend_on_the_device(config, num_stages):
    hidden, ids, lengths = {}, torch.arange(20)[None] + 3, (9, 11)
    for device in (CPU, torch.device("cuda")):
        stages = [init_stage(config, 7, index, num_stages, device) for index in range(num_stages)]
        first = stages[0](ids.to(device), PackedBatch(lengths, device))
        hidden[device.type] = stages[1](ids.to(device), PackedBatch(lengths, device), first).cpu()
    torch.testing.assert_close(hidden["cpu"], hidden["cuda"], atol=1e-4, rtol=1e-4)
