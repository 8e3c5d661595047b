"""bfloat16 training beside float32 training of the same weights, and beside transformers' own in bfloat16."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_checks import make_reference
from pipelines import Case, make_context
from safetensors.torch import load_file
from shards import SAMPLING, STOP_IDS, shard_of
from tiny_models import tiny_config
from torch import Tensor, nn
from trainmaster.api.config import Layout, LoRA, Model, Optimizer, Precision, Recompute
from trainmaster.api.errors import ModelError
from trainmaster.api.experiments.base import PlacedModel
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.context import ShardGroups
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.checkpoint import write_config, write_stage
from trainmaster.workers.pipeline.generation import Prompt
from trainmaster.workers.precision import round_to, type_of
from trainmaster.workers.shard import ModelShard
from transformers import Qwen3ForCausalLM

CPU = torch.device("cpu")
OPTIMIZER = Optimizer(learning_rate=3e-3, warmup_steps=2, max_gradient_norm=None)
LENGTHS = ((17, 25, 3), (9, 30), (12, 12, 12))
STEPS = 8
BFLOAT16 = 2.0**-8
"""What one rounding may change."""


def microbatches(step: int) -> list[Microbatch]:
    generator, made = torch.Generator().manual_seed(step % 2), []
    for lengths in LENGTHS:
        tokens = torch.randint(3, 16, (1, sum(lengths)), generator=generator)
        keys = {"loss_mask": torch.ones(sum(lengths), dtype=torch.bool)}
        made.append(Microbatch(tokens=tokens, packed=PackedBatch(lengths, CPU), keys=keys))
    return made


def train(shard: ModelShard, num_steps: int) -> list[float]:
    """The loss of each step."""
    losses = []
    for step in range(num_steps):
        loss = shard.train(SupervisedFineTuning(), microbatches(step))["loss"]
        losses.append(loss.total / loss.weight)
    return losses


def pair(recompute: Recompute = Recompute.NONE) -> tuple[ModelShard, ModelShard]:
    layout = Layout(recompute=recompute)
    return tuple(shard_of(layout, OPTIMIZER, dtype) for dtype in (Precision.FLOAT32, Precision.BFLOAT16))


def test_training_follows_that_in_float32_within_the_bounds_of_one_rounding():
    exact, half = pair()
    losses, rounded = train(exact, STEPS), train(half, STEPS)
    assert rounded == pytest.approx(losses, rel=2 * BFLOAT16)
    assert rounded != losses
    assert rounded[-1] < 0.9 * rounded[0], "and it learns"
    masters = half.optimizer.masters
    start = dict(shard_of(Layout(), None).stage.model.named_parameters())
    for name, parameter in half.stage.model.named_parameters():
        wanted = dict(exact.stage.model.named_parameters())[name]
        way, error = (wanted - start[name]).norm(), (masters[parameter] - wanted).norm()
        assert error < 0.25 * way, f"{name} went another way"
        assert torch.equal(parameter.detach(), masters[parameter].detach().bfloat16())


def test_weights_are_those_of_the_float32_model_rounded_and_gradients_are_float32():
    exact, half = pair()
    wanted = dict(exact.stage.model.named_parameters())
    for name, parameter in half.stage.model.named_parameters():
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter.detach(), wanted[name].detach().bfloat16()), name
        assert torch.equal(half.optimizer.masters[parameter].detach(), wanted[name].detach()), name
    train(exact, 1)
    train(half, 1)
    for name, parameter in half.stage.model.named_parameters():
        assert parameter.grad.dtype is torch.float32
        error, size = (parameter.grad - wanted[name].grad).norm(), wanted[name].grad.norm()
        assert error < 0.1 * size, f"{name}: {error / size}"
    buffers = {buffer.dtype for buffer in half.stage.buffers() if buffer.is_floating_point()}
    assert buffers == {torch.float32}, "rotary frequencies are not rounded"


def test_a_stage_without_an_embedding_computes_in_the_models_type():
    layout = Layout(pp=4)
    (middle,) = shard_of(layout, OPTIMIZER, Precision.BFLOAT16, rank=1).stages
    (exact,) = shard_of(layout, OPTIMIZER, rank=1).stages
    batch, ids = PackedBatch((4, 3), CPU), torch.zeros(1, 7, dtype=torch.int64)
    hidden = torch.randn(1, 7, middle.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        out, wanted = middle(ids, batch, hidden), exact(ids, batch, hidden.float())
    assert out.dtype is torch.bfloat16
    assert (out.float() - wanted).norm() < 4 * BFLOAT16 * wanted.norm()


def test_gradients_of_microbatches_are_summed_in_float32():
    """Equal ones, whose number is a power of two, so that nothing but the sum could round."""
    half = shard_of(Layout(), OPTIMIZER, Precision.BFLOAT16)
    (first, *_), count = microbatches(0), 16
    half.train(SupervisedFineTuning(), [first])
    one = {name: each.grad.clone() for name, each in half.stage.model.named_parameters()}
    half = shard_of(Layout(), OPTIMIZER, Precision.BFLOAT16)
    half.train(SupervisedFineTuning(), [first] * count)
    for name, each in half.stage.model.named_parameters():
        torch.testing.assert_close(each.grad, one[name], rtol=1e-5, atol=1e-7 * float(one[name].abs().max()), msg=name)


def test_a_tiny_learning_rate_still_moves_a_model():
    """Each step is some 1e-6 of a weight: bfloat16 alone would never move."""
    optimizer = replace(OPTIMIZER, learning_rate=1e-6, warmup_steps=0)
    half = shard_of(Layout(), optimizer, Precision.BFLOAT16)
    name, norm = "model.norm.weight", dict(half.stage.model.named_parameters())["model.norm.weight"]
    before, master = norm.detach().clone(), half.optimizer.masters[norm]
    train(half, 5)
    assert torch.equal(norm.detach(), before), f"{name} itself is 1 with 8 bits"
    moved = (master.detach() - before.float()).abs()
    assert moved.max() == pytest.approx(5e-6, rel=0.1)


def test_a_model_that_is_not_trained_keeps_no_masters():
    shard = shard_of(Layout(), None, Precision.BFLOAT16)
    assert shard.optimizer is None
    assert {parameter.dtype for parameter in shard.stage.parameters()} == {torch.bfloat16}
    assert round_to(shard.stage, type_of(Precision.BFLOAT16), keeps_masters=True) == {}, "nothing is left to round"


def test_what_the_author_keeps_in_float32_stays_so(monkeypatch):
    shard = shard_of(Layout(), None)
    monkeypatch.setattr(Qwen3ForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    masters = round_to(shard.stage, torch.bfloat16, keeps_masters=True)
    for name, parameter in shard.stage.model.named_parameters():
        assert (parameter.dtype is torch.float32) == ("norm" in name), name
        assert (parameter in masters) == ("norm" not in name), name


def test_checkpoints_are_of_the_models_type(tmp_path: Path):
    shard = shard_of(Layout(), OPTIMIZER, Precision.BFLOAT16)
    train(shard, 1)
    write_config(shard.stage, tmp_path)
    written = load_file(tmp_path / write_stage(shard.stage, tmp_path).file)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_generation_is_scored_as_training_scores_it():
    """Both take float32 logits of the same rounded weights."""
    shard = shard_of(Layout(), OPTIMIZER, Precision.BFLOAT16)
    (response,) = shard.generate([[Prompt("d/0/0/0", torch.tensor([3, 4, 9]))]], SAMPLING, STOP_IDS)
    tokens = torch.cat([torch.tensor([3, 4, 9]), response.tokens])[None]
    with torch.no_grad():
        packed = PackedBatch((tokens.shape[1],), CPU)
        logits = shard.stage.logits(shard.stage(tokens, packed))[0]
    assert logits.dtype is torch.float32
    table = logits.log_softmax(-1)[2:-1]
    wanted = table.gather(-1, response.tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(response.logprobs, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("eta", [1.0, 1e-3])
def test_a_reference_moves_by_less_than_its_last_bit(eta: float):
    source = shard_of(Layout(), OPTIMIZER, Precision.BFLOAT16)
    target = shard_of(Layout(), None, Precision.BFLOAT16)
    start = {name: each.detach().float() for name, each in target.stage.model.named_parameters()}
    exact = shard_of(Layout(), None)
    with torch.no_grad():
        for parameter, master in source.optimizer.masters.items():
            master += 0.05
            parameter.copy_(master)
    count = 200
    for _ in range(count):
        target.move_towards(source, eta)
    left = (1 - eta) ** count
    for name, parameter in target.stage.model.named_parameters():
        weight = dict(source.stage.model.named_parameters())[name]
        if eta == 1.0:
            assert torch.equal(parameter, weight)
            continue
        wanted = left * start[name] + (1 - left) * source.optimizer.masters[weight].detach()
        torch.testing.assert_close(parameter.detach().float(), wanted, rtol=BFLOAT16, atol=1e-5, msg=name)
    assert exact.version == 0


FAMILIES = ("llama", "gemma2", "gpt_oss", "qwen3_moe")
ODD = ("ernie4_5_moe", "flint", "minimax", "modernbert-decoder", "xglm")
"""With parameters or buffers of a type of their own, or a head of several products."""


def shards_of(directory: Path, optimizer: Optimizer | None, num_stages: int = 2) -> list[ModelShard]:
    """In bfloat16, one for each pipeline rank, from a checkpoint."""
    model = Model(path=directory, layout=Layout(pp=num_stages), dtype=Precision.BFLOAT16)
    placed = PlacedModel(model=model, optimizer=optimizer, field="actor")
    contexts = [make_context(Case(layout=model.layout), rank) for rank in range(num_stages)]
    return [ModelShard(placed, context, ShardGroups()) for context in contexts]


def own_in_bfloat16(directory: Path, model_class: type, documents: list[Tensor], weights: Tensor) -> nn.Module:
    """transformers' own, with gradients of sum(logits * weights), and `logits`."""
    with hf_compat.quiet():
        own = model_class.from_pretrained(directory, dtype=torch.bfloat16).eval()
        own.logits = torch.cat([own(input_ids=ids, use_cache=False).logits for ids in documents], 1).float()
    (own.logits * weights).sum().backward()
    return own


@pytest.mark.parametrize("model_type", [*FAMILIES, *ODD])
def test_checkpoints_run_in_bfloat16_as_in_transformers_own(model_type: str, tmp_path: Path):
    """Trained ones are rounded from float32, others are read so: of the same types, with the same numbers."""
    reference = make_reference(tiny_config(model_type), tmp_path)
    lengths = (7, 11)
    documents = list(torch.randint(3, 60, (1, 18), generator=torch.Generator().manual_seed(1)).split(lengths, 1))
    weights = torch.randn(1, 18, 64, generator=torch.Generator().manual_seed(2))
    own = own_in_bfloat16(tmp_path, type(reference.model), documents, weights)
    wanted = {name: t.dtype for name, t in (*own.named_parameters(), *own.named_buffers())}
    logits, gradients = [], {}
    for optimizer in (OPTIMIZER, None):
        stages = [shard.stage.eval() for shard in shards_of(tmp_path, optimizer)]
        hidden, batch = None, PackedBatch(lengths, CPU)
        for stage in stages:
            hidden = stage(torch.cat(documents, 1), batch, hidden)
            tensors = {**dict(stage.model.named_parameters()), **dict(stage.model.named_buffers())}
            assert {n: t.dtype for n, t in tensors.items() if t.numel()}.items() <= wanted.items()
        logits.append(stages[-1].logits(hidden))
        if optimizer is not None:
            (logits[0] * weights).sum().backward()
            for name, parameter in (pair for stage in stages for pair in stage.model.named_parameters()):
                if parameter.grad is not None:
                    assert parameter.grad.dtype is torch.float32
                    gradients[name] = gradients.get(name, 0) + parameter.grad
    assert torch.equal(*logits)
    assert (logits[0] - own.logits).norm() < 4 * BFLOAT16 * own.logits.norm()
    theirs = {name: each.grad.float() for name, each in own.named_parameters() if each.grad is not None}
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        error, size = (gradients[name] - gradient).norm(), max(gradient.norm(), 1e-2 * largest)
        assert error < 0.05 * size, f"{name}: {error / size}"


def test_a_type_that_runs_in_float32_only_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch):
    """As minimax was: its buffers stayed float32, and a product of them with the rest failed at the first step."""
    types = hf_compat.tensor_types
    monkeypatch.setattr(
        hf_compat,
        "tensor_types",
        lambda model, dtype: types(model, dtype) | dict.fromkeys(["model.layers.0.mlp.up_proj.weight"], torch.float32),
    )
    with pytest.raises(ModelError, match="model type 'qwen3' cannot run as stage 0 of 1: "):
        shard_of(Layout(), OPTIMIZER, Precision.BFLOAT16)


def test_adapters_lie_on_a_base_that_is_read_in_its_type(tmp_path: Path):
    make_reference(tiny_config("llama"), tmp_path)
    model = Model(path=tmp_path, dtype=Precision.BFLOAT16, lora=LoRA())
    context = make_context(Case(layout=Layout()), 0)
    shard = ModelShard(PlacedModel(model=model, optimizer=OPTIMIZER, field="actor"), context, ShardGroups())
    assert {master.dtype for master in shard.optimizer.masters.values()} == {torch.float32}
    assert {parameter.dtype for parameter in shard.stage.parameters()} == {torch.bfloat16}
    losses = train(shard, STEPS)
    assert losses[-1] < losses[0]
    assert all(parameter.grad.dtype is torch.float32 for parameter in shard.optimizer.masters)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_trains_as_on_the_cpu():
    one, other = (shard_of(Layout(), OPTIMIZER, Precision.BFLOAT16, device=torch.device(d)) for d in ("cpu", "cuda"))
    losses = train(one, STEPS)
    assert train(other, STEPS) == pytest.approx(losses, rel=4 * BFLOAT16)
    other.offload()
    assert {master.device.type for master in other.optimizer.masters.values()} == {"cpu"}
    assert isinstance(next(iter(other.optimizer.masters)), nn.Parameter)
