import gc
import resource
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_checks import make_reference
from pipelines import QWEN, Case, make_context
from tiny_models import tiny_config
from trainmaster.api.config import Layout, Model, Optimizer, Precision
from trainmaster.api.errors import ModelError
from trainmaster.api.experiments.base import PlacedModel
from trainmaster.workers import doctor, memory
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.context import ShardGroups
from trainmaster.workers.memory import Need, Room
from trainmaster.workers.shard import ModelShard
from transformers import LlamaForCausalLM

LARGE = QWEN | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128_000}
"""Some 57 billion parameters, of a head that is the embedding."""


@pytest.mark.parametrize(
    ("dtype", "is_trained", "total"),
    [(torch.float32, True, 16), (torch.bfloat16, True, 18), (torch.float32, False, 4), (torch.bfloat16, False, 2)],
)
def test_bytes_for_each_parameter(dtype, is_trained, total):
    assert Need.of(dtype, 100, 100 * is_trained).total == 100 * total


def test_an_optimizer_takes_what_it_was_estimated_to():
    case = Case(layout=Layout())
    context = make_context(case, 0)
    shard = ModelShard(context.compiled.models["model"], context, ShardGroups())
    shard.train(SupervisedFineTuning(), case.share(0, 0))
    num_parameters = sum(parameter.numel() for parameter in shard.own_parameters())
    kept = sum(t.nbytes for state in shard.optimizer.adamw.state.values() for t in state.values() if t.ndim)
    gradients = sum(parameter.grad.nbytes for parameter in shard.own_parameters())
    need = Need.of(torch.float32, num_parameters, num_parameters)
    assert (kept, gradients) == (need.optimizer, need.gradients)


def test_what_was_taken_is_not_there_for_the_next():
    room = Room("in a test", 9 * 2**30)
    room.take("actor", Need.of(torch.float32, 2**28, 2**28))
    room.take("reference", Need.of(torch.float32, 2**28, 0))
    with pytest.raises(ModelError) as refusal:
        room.take("critic", Need.of(torch.bfloat16, 2**28 + 1, 2**28 + 1))
    assert str(refusal.value) == (
        "critic: 268,435,457 parameters take 4.50 GiB on this worker (weights 0.50 GiB, gradients 1.00 GiB, optimizer "
        "3.00 GiB), and activations on top; there are 4.00 GiB, in a test, less what other models take. Raise "
        "critic.layout.pp and the number of workers, set critic.dtype to bfloat16, or take larger machines"
    )
    room.take("critic", Need.of(torch.bfloat16, 2**28, 0))


def test_a_model_that_does_not_fit_is_refused_before_anything_of_it_is_made():
    placed = PlacedModel(model=Model(config=LARGE, tokenizer=Path("none")), optimizer=Optimizer(), field="actor")
    context = replace(make_context(Case(layout=Layout()), 0), room=Room("in a test", 2**34))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"actor: 57,\d{3},\d{3},\d{3} parameters take 856\.\d\d GiB on this worker"):
        ModelShard(placed, context, ShardGroups())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize(
    ("dtype", "is_trained", "num_bytes"),
    [
        (Precision.FLOAT32, False, 4),
        (Precision.BFLOAT16, False, 4),  # drawn in float32, and then rounded
        (Precision.BFLOAT16, True, 6),  # beside its masters
    ],
)
def test_a_model_that_is_being_made_takes_more_than_one_that_is(dtype: Precision, is_trained: bool, num_bytes: int):
    placed = PlacedModel(
        model=Model(config=QWEN, tokenizer=Path("none"), dtype=dtype),
        optimizer=Optimizer() if is_trained else None,
        field="actor",
    )
    context, roomy = make_context(Case(layout=Layout()), 0), Room("there", 2**30)
    shard = ModelShard(placed, replace(context, room=Room("on a GPU", 2**30, roomy)), ShardGroups())
    assert roomy._left == 2**30, "only for a moment"
    num_parameters = sum(parameter.numel() for parameter in shard.own_parameters())
    host = Room("here", num_bytes * num_parameters - 1)
    with pytest.raises(
        ModelError, match=r"actor: [\d,]+ parameters take .* of the host's memory while they are made; .*"
    ):
        ModelShard(placed, replace(context, room=Room("on a GPU", 2**30, host)), ShardGroups())
    host = Room("here", num_bytes * num_parameters)
    ModelShard(placed, replace(context, room=Room("on a GPU", 2**30, host)), ShardGroups())


def test_the_doctors_whole_model_must_fit_too(monkeypatch: pytest.MonkeyPatch):
    compiled = make_context(Case(layout=Layout()), 0).compiled
    monkeypatch.setattr(Room, "on", lambda device, num_local_workers: Room("in a test", 2**10))
    with pytest.raises(ModelError, match=r"model: [\d,]+ parameters take .*; there are 0\.00 GiB, in a test"):
        doctor._whole_model(compiled, compiled.training.graph.model_calls[0])


def test_a_model_that_is_read_and_not_trained_is_never_larger_than_its_type_is(tmp_path: Path):
    make_reference(tiny_config("llama"), tmp_path)
    model = Model(path=tmp_path, dtype=Precision.BFLOAT16)
    context = make_context(Case(layout=Layout()), 0)
    num_parameters = sum(each.numel() for each in LlamaForCausalLM.from_pretrained(tmp_path).parameters())
    room = Room("here", 2 * num_parameters)
    shard = ModelShard(PlacedModel(model=model, field="reference"), replace(context, room=room), ShardGroups())
    assert room._left == 0
    assert sum(parameter.nbytes for parameter in shard.stage.parameters()) == 2 * num_parameters


def test_a_host_has_memory_and_a_container_no_more_than_its_limit(tmp_path, monkeypatch):
    free = Room.on(torch.device("cpu"), 1)._left
    assert free > 2**28
    assert Room.on(torch.device("cpu"), 2)._left == pytest.approx(free / 2, rel=0.3)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert Room.on(torch.device("cpu"), 2)._left == 300
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200\nactive_file 50\n")
    assert Room.on(torch.device("cpu"), 2)._left == 400, "what only caches files is as good as free"
    (tmp_path / "memory.max").write_text("max\n")
    assert Room.on(torch.device("cpu"), 1)._left > 2**28


class Held:
    """In a cycle, as a stage and its hooks are."""

    def __init__(self) -> None:
        self.itself = self


def test_what_earlier_models_left_behind_is_let_go_of_before_it_is_measured():
    left = weakref.ref(Held())
    gc.disable()
    try:
        assert left() is not None
        Room.on(torch.device("cpu"), 1)
        assert left() is None
    finally:
        gc.enable()
