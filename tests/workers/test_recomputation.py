"""Layers that compute again: the same numbers to the bit, fewer saved bytes, in every way that they are run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext
from trainmaster.api.config import Recompute
from trainmaster.api.errors import ModelError
from trainmaster.workers import recomputation
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.loading import init_stage
from trainmaster.workers.models.stage import Stage
from trainmaster.workers.pipeline.apart import Deferred, deferring
from trainmaster.workers.recomputation import recompute_layers

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 32, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
COMMON = SHAPE | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
CONFIGS = {
    "qwen3": COMMON | {"model_type": "qwen3", "head_dim": 8},
    "experts": COMMON
    | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64},
    "window": COMMON | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 5.0},
    "dropout": SHAPE
    | {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.2, "resid_pdrop": 0.3},
}
LENGTHS = (9, 14, 1)
BATCH = PackedBatch(LENGTHS, CPU)
AGAIN = [Recompute.SELECTIVE, Recompute.FULL]


def stage_of(name: str, recompute: Recompute) -> Stage:
    stage = init_stage(CONFIGS[name], 4, 0, 1, CPU)
    recompute_layers(stage.cut.layers, recompute)
    return stage


def ids() -> Tensor:
    return torch.randint(3, 32, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))


@contextmanager
def counting() -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps, but for parameters, and of what the policy of `selective` keeps; by address."""
    kept: dict[int, int] = {}
    policy = recomputation._policy

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def watched(context: SelectiveCheckpointContext, *args: object, **kwargs: object) -> CheckpointPolicy:
        chosen = policy(context, *args, **kwargs)
        if not context.is_recompute and chosen is not CheckpointPolicy.PREFER_RECOMPUTE:
            tree_map_only(Tensor, keep, context.op_output)
        return chosen

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(recomputation, "_policy", watched)
        yield kept


def trained(stage: Stage) -> tuple[Tensor, dict[str, Tensor], int]:
    """The output, gradients, and how many bytes were kept between the passes."""
    torch.manual_seed(8)
    with counting() as kept:
        out = stage(ids(), BATCH)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(9)  # another state than the forward's, which a recomputation must not see
    (out * weights).sum().backward()
    return out.detach(), {name: each.grad for name, each in stage.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_the_same_to_the_bit_and_less_is_kept(name: str):
    wanted, gradients, everything = trained(stage_of(name, Recompute.NONE))
    kept = []
    for recompute in AGAIN:
        out, got, num_bytes = trained(stage_of(name, recompute))
        assert torch.equal(out, wanted)
        for parameter, gradient in gradients.items():
            if gradient is None:  # the head's
                assert got[parameter] is None
            else:
                assert torch.equal(got[parameter], gradient), parameter
        kept.append(num_bytes)
    selective, full = kept
    assert full < 0.1 * everything
    assert full < selective < 0.5 * everything
    assert gradients["model.transformer.wte.weight" if name == "dropout" else "model.model.embed_tokens.weight"].any()


@pytest.mark.parametrize("recompute", list(Recompute))
def test_a_model_without_a_list_of_layers_is_refused(recompute: Recompute):
    """hrm_text has two, which it runs in turns."""
    stage = init_stage(tiny_config("hrm_text"), 4, 0, 1, CPU)
    if recompute in AGAIN:
        with pytest.raises(ModelError, match=f"layout.recompute = {recompute.value}: .*; set layout.recompute to none"):
            recompute_layers(stage.cut.layers, recompute)
    else:
        recompute_layers(stage.cut.layers, recompute)


def calls_of(stage: Stage) -> list[int]:
    """Counts calls of attention and of the layers' norms, by appending to the list."""
    counts = [0, 0]

    def count(place: int):
        def hook(*_: object) -> None:
            counts[place] += 1

        return hook

    for layer in stage.cut.layers:
        layer.self_attn.q_proj.register_forward_hook(count(0))
        layer.input_layernorm.register_forward_hook(count(1))
    return counts


@pytest.mark.parametrize(("recompute", "times"), [(Recompute.NONE, 1), (Recompute.SELECTIVE, 2), (Recompute.FULL, 2)])
def test_layers_run_again_in_the_backward_only(recompute: Recompute, times: int):
    stage = stage_of("qwen3", recompute)
    counts = calls_of(stage)
    out = stage(ids(), BATCH)
    assert counts == [2, 2]
    out.sum().backward()
    assert counts == [2 * times, 2 * times]
    with torch.no_grad():
        stage(ids(), BATCH)
    assert counts == [2 * times + 2, 2 * times + 2]


class Counting(TorchDispatchMode):
    """Operators that are computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def computed_in_the_backward(recompute: Recompute) -> Counter[str]:
    out = stage_of("qwen3", recompute)(ids(), BATCH)
    with Counting() as counting:
        out.backward(torch.ones_like(out))
    return counting.counts


def test_selective_repeats_no_product_and_no_attention():
    plain, selective, full = (computed_in_the_backward(each) for each in (Recompute.NONE, *AGAIN))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert plain["mm"] == selective["mm"] == full["mm"] - 12, "of the 7 products of a layer nobody needs the last again"
    assert (plain[attention], selective[attention], full[attention]) == (0, 0, 2 * len(LENGTHS))
    assert (plain["silu"], selective["silu"], full["silu"]) == (0, 2, 2)


@pytest.mark.parametrize("recompute", AGAIN)
@pytest.mark.parametrize("name", ["qwen3", "dropout"])
def test_gradients_of_weights_can_still_be_put_off(name: str, recompute: Recompute):
    _, wanted, _ = trained(stage_of(name, Recompute.NONE))
    stage, store = stage_of(name, recompute), Deferred()
    torch.manual_seed(8)
    with deferring(store):
        out = stage(ids(), BATCH)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    names = ("mlp.down_proj.weight", "mlp.c_proj.weight")
    late = [each for each_name, each in stage.named_parameters() if each_name.endswith(names)]
    assert [each.grad for each in late] == [None, None]
    store.run()
    for parameter, each in stage.named_parameters():
        if wanted[parameter] is not None:
            torch.testing.assert_close(each.grad, wanted[parameter], rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", AGAIN)
def test_on_a_gpu_memory_falls_and_gradients_stay(recompute: Recompute):
    device, found = torch.device("cuda"), []
    batch = PackedBatch((512, 512), device)
    tokens = torch.randint(3, 32, (1, 1024), device=device)
    for each in (Recompute.NONE, recompute):
        stage = stage_of("qwen3", each).to(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = stage(tokens, batch)
        kept = torch.cuda.memory_allocated() - before
        out.sum().backward()
        found.append((kept, [one.grad for one in stage.parameters() if one.grad is not None]))
    (most, wanted), (least, got) = found
    assert least < 0.8 * most
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
