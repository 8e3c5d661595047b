"""A training that was saved and loaded into other layouts goes on as if nothing had been."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import GPT2, OPTIMIZER, QWEN, Case, make_context, make_shard
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from trainmaster.api.config import Layout, Model, Optimizer, Precision, RateSchedule
from trainmaster.api.errors import ModelError
from trainmaster.api.experiments.base import PlacedModel
from trainmaster.system.service.manifest import WrittenFile, write_manifest
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.context import ShardGroups
from trainmaster.workers.models.checkpoint import write_config, write_stage
from trainmaster.workers.optimizer import ShardOptimizer
from trainmaster.workers.optimizer_state import FOLDER, read_state, write_state
from trainmaster.workers.shard import ModelShard

DECAYING = replace(OPTIMIZER, schedule=RateSchedule.COSINE, warmup_steps=1, decay_steps=6)
CHUNKED = Layout(pp=2, schedule="interleaved", chunks=2)


def save(shards: list[ModelShard], directory: Path) -> Path:
    for shard in shards:
        for stage in shard.stages:
            write_stage(stage, directory)
            assert shard.optimizer is not None
            write_state(stage, shard.optimizer, shard.version, directory)
    write_config(shards[0].stages[0], directory)
    if len(shards) > 1:
        files = sorted(directory.glob("model-*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for file in files:
            file.unlink()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def load(
    directory: Path, layout: Layout, optimizer: Optimizer = DECAYING, dtype: Precision = Precision.FLOAT32
) -> list[ModelShard]:
    """Every worker's, in this process."""
    model = Model(path=directory, layout=layout, dtype=dtype)
    placed = PlacedModel(model=model, optimizer=replace(optimizer, state=directory), field="model")
    shards = []
    for rank in range(layout.num_workers):
        shards.append(ModelShard(placed, make_context(Case(layout=layout), rank), ShardGroups()))
    return shards


def train(shard: ModelShard, case: Case, steps: range) -> list[dict[str, float]]:
    done = [shard.train(SupervisedFineTuning(), case.share(0, step)) for step in steps]
    return [{name: mean.total for name, mean in each.items()} for each in done]


def trained(config: dict[str, object], folder: Path, num_steps: int = 2) -> tuple[ModelShard, Case, Path]:
    case = Case(layout=Layout(), config=config, optimizer=DECAYING)
    shard = make_shard(case, 0, None)
    train(shard, case, range(num_steps))
    return shard, case, save([shard], folder / "first")


@pytest.mark.parametrize("config", [QWEN, GPT2], ids=["tied", "dropout"])
@pytest.mark.parametrize("layout", [Layout(pp=4), CHUNKED], ids=["stages", "chunks"])
def test_saved_and_loaded_into_another_layout_and_back_it_goes_on_bit_for_bit(config, layout, tmp_path):
    shard, case, first = trained(config, tmp_path)
    cut = load(first, layout)
    assert [each.version for each in cut] == [2] * layout.num_workers
    (whole,) = load(save(cut, tmp_path / "second"), Layout())
    assert train(shard, case, range(2, 4)) == train(whole, case, range(2, 4))
    for (name, one), other in zip(shard.stage.model.named_parameters(), whole.stage.parameters(), strict=True):
        assert one.equal(other), name


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "afmoe"])
def test_a_model_with_parameters_that_its_author_never_trains_goes_on_bit_for_bit(model_type, tmp_path):
    case = Case(layout=Layout(), config=tiny_config(model_type), optimizer=replace(DECAYING, weight_decay=0.1))
    shard = make_shard(case, 0, None)
    biases = {name: each for name, each in shard.stage.model.named_parameters() if name.endswith("bias")}
    assert biases
    with torch.no_grad():
        for each in biases.values():
            each.normal_()
    before = {name: each.clone() for name, each in biases.items()}
    train(shard, case, range(2))
    (again,) = load(save([shard], tmp_path), Layout(), case.optimizer)
    assert train(shard, case, range(2, 4)) == train(again, case, range(2, 4))
    for each in (shard, again):
        found = dict(each.stage.model.named_parameters())
        assert all(found[name].equal(value) and not found[name].requires_grad for name, value in before.items())


def test_a_parameter_that_no_gradient_reached_goes_on_without_moments(tmp_path):
    case = Case(layout=Layout(), config=QWEN, optimizer=DECAYING)
    shards = [make_shard(case, 0, None) for _ in range(2)]
    for shard in shards:
        shard.stage.model.register_parameter("unused", torch.nn.Parameter(torch.ones(2, 2)))
        shard.optimizer = ShardOptimizer(list(shard.stage.model.named_parameters()), DECAYING, 6, {})
    first, again = shards
    train(first, case, range(2))
    write_state(first.stage, first.optimizer, first.version, tmp_path)
    assert read_state(again.stages, again.optimizer, tmp_path) == 2
    unused = dict(again.stage.model.named_parameters())["unused"]
    assert unused not in again.optimizer.adamw.state
    assert len(again.optimizer.adamw.state) == len(first.optimizer.adamw.state) > 0


def test_without_its_state_it_goes_on_otherwise(tmp_path):
    shard, case, first = trained(QWEN, tmp_path)
    shutil.rmtree(first / FOLDER)
    placed = PlacedModel(model=Model(path=first), optimizer=DECAYING, field="model")
    fresh = ModelShard(placed, make_context(case, 0), ShardGroups())
    assert train(shard, case, range(2, 4)) != train(fresh, case, range(2, 4))


def test_masters_are_saved_and_loaded(tmp_path):
    _, case, first = trained(QWEN, tmp_path)
    (half,) = load(first, Layout(), dtype=Precision.BFLOAT16)
    (again,) = load(save([half], tmp_path / "half"), Layout(), dtype=Precision.BFLOAT16)
    assert train(half, case, range(2, 4)) == train(again, case, range(2, 4))
    (whole,) = load(save([again], tmp_path / "again"), Layout())
    parameter = whole.stage.model.get_input_embeddings().weight
    assert parameter.equal(again.optimizer.masters[again.stage.model.get_input_embeddings().weight])
    assert not parameter.equal(parameter.bfloat16().float())


def test_a_rate_falls_over_the_steps_before_and_those_of_this_run(tmp_path):
    _, case, first = trained(QWEN, tmp_path)
    placed = PlacedModel(
        model=Model(path=first), optimizer=replace(DECAYING, decay_steps=None, state=first), field="model"
    )
    shard = ModelShard(placed, make_context(case, 0), ShardGroups(), num_optimizer_steps=4)
    (one,) = train(load(first, Layout())[0], case, range(2, 3))  # 6 decay_steps
    (other,) = train(shard, case, range(2, 3))
    assert one["learning_rate"] == other["learning_rate"] < OPTIMIZER.learning_rate


def test_a_state_of_no_steps_is_none(tmp_path):
    shard, _, first = trained(QWEN, tmp_path, num_steps=0)
    assert [each.version for each in load(first, Layout(pp=2))] == [0, 0]
    assert shard.version == 0


def test_a_directory_without_a_state_is_refused(tmp_path):
    _, _, first = trained(QWEN, tmp_path)
    shutil.rmtree(first / FOLDER)
    with pytest.raises(ModelError, match=r"first holds no state of an optimizer .* run\.save_optimizer"):
        load(first, Layout())


def test_a_parameter_without_a_state_of_its_shape_is_named(tmp_path):
    _, _, first = trained(QWEN, tmp_path)
    (file,) = (first / FOLDER).iterdir()
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight.exp_avg": torch.ones(3)}, file, {"version": "2"})
    with pytest.raises(
        ModelError, match=r"model\.norm\.weight\.exp_avg has shape \[3\] where the parameter has \[\d+\]"
    ):
        load(first, Layout())
    save_file({name: each for name, each in tensors.items() if "model.norm" not in name}, file, {"version": "2"})
    with pytest.raises(ModelError, match=r"has no state of model\.norm\.weight: it was not trained there, or the"):
        load(first, Layout())
    lacking = {name: each for name, each in tensors.items() if name != "model.norm.weight.exp_avg_sq"}
    save_file(lacking, file, {"version": "2"})
    with pytest.raises(ModelError, match=r"first/optimizer lacks model\.norm\.weight\.exp_avg_sq; copy the checkpoint"):
        load(first, Layout())


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"version": "two"}])
def test_a_file_of_another_tool_is_named(metadata, tmp_path):
    _, _, first = trained(QWEN, tmp_path)
    (file,) = (first / FOLDER).iterdir()
    save_file(load_file(file), file, metadata)
    with pytest.raises(ModelError, match=r"00001-of-00001\.safetensors is no stage's state of an optimizer: 'version'"):
        load(first, Layout())
    save_file(load_file(file), first / FOLDER / "optimizer.safetensors", {"version": "2"})
    file.unlink()
    with pytest.raises(ModelError, match=r"optimizer\.safetensors is no stage's state of an optimizer"):
        load(first, Layout())


def test_a_file_of_a_stage_that_is_not_there_is_named(tmp_path):
    _, _, first = trained(QWEN, tmp_path)
    second = save(load(first, Layout(pp=2)), tmp_path / "second")
    (second / FOLDER / "00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"second/optimizer lacks 00001-of-00002\.safetensors; copy the checkpoint"):
        load(second, Layout())


def test_what_was_not_trained_then_is_named(tmp_path):
    _, _, first = trained(QWEN, tmp_path)
    case = Case(layout=Layout(), trainable=("norm",), optimizer=DECAYING)
    some = make_shard(case, 0, None)
    train(some, case, range(1))
    (file,) = (first / FOLDER).iterdir()
    file.unlink()
    write_state(some.stage, some.optimizer, some.version, first)
    with pytest.raises(ModelError, match=r"no state of model\.embed_tokens\.weight: it was .* \(trainable, lora\), or"):
        load(first, Layout())


def test_every_stage_hashes_the_state_that_it_reads(tmp_path):
    _, _, first = trained(QWEN, tmp_path)
    (file,) = (first / FOLDER).iterdir()
    written = WrittenFile(size_bytes=file.stat().st_size, sha256="0" * 64)
    write_manifest(first, {f"{FOLDER}/{file.name}": written})
    case = Case(layout=Layout(pp=2))
    placed = PlacedModel(model=Model(path=first, layout=case.layout), optimizer=DECAYING, field="model")
    for rank in range(2):
        shard = ModelShard(placed, make_context(case, rank), ShardGroups())
        with pytest.raises(ModelError, match=rf"{file.name} is not as it was written"):
            read_state(shard.stages, shard.optimizer, first)


def test_files_of_several_checkpoints_are_refused(tmp_path):
    _, _, first = trained(QWEN, tmp_path)
    save_file({"other.exp_avg": torch.ones(3)}, first / FOLDER / "00002-of-00002.safetensors", {"version": "7"})
    with pytest.raises(ModelError, match=r"states after \[2, 7\] steps"):
        load(first, Layout())
