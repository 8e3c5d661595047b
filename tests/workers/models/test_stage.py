"""Stages of every kind of model against transformers' whole model, one sequence at a time."""

import copy
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from architectures import MODEL_TYPES
from hypothesis import given
from hypothesis import strategies as st
from model_checks import check_gradients, check_packed, logits_of, make_reference
from tiny_models import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from trainmaster.api.config import Model
from trainmaster.api.errors import ConfigError, ModelError
from trainmaster.workers.models import attention, hf_compat
from trainmaster.workers.models.attention import PackedBatch, PackedPass
from trainmaster.workers.models.cache import KVCache
from trainmaster.workers.models.configs import model_limits
from trainmaster.workers.models.cut import balanced_split, layer_costs
from trainmaster.workers.models.kernels import attend
from trainmaster.workers.models.loading import init_stage, load_stage

CPU = torch.device("cpu")


def assert_close(got, wanted, tolerance=1e-5):
    assert (got - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


def test_sequences_of_a_row_are_as_each_alone_and_none_moves_another(whole, make_stages, num_stages):
    check_packed(make_stages, whole, num_stages)


def test_that_is_so_for_every_kind_of_attention(whole_of, stages_in_rows, monkeypatch):
    kinds = set()

    def watched(query, key, value, seen, scores):
        num_seen = query.shape[2] if seen is None else int(seen[0, 0, -1].sum())
        kinds.add({20: "all before", 8: "sliding window", 4: "chunk"}[num_seen])
        kinds.add("grouped heads" if query.shape[1] > key.shape[1] else "plain heads")
        kinds.update({"latent heads"} if value.shape[-1] != query.shape[-1] else ())
        kinds.update({"softcap"} if scores.softcap is not None else ())
        kinds.update({"sinks"} if scores.sinks is not None else ())
        return attend(query, key, value, seen, scores)

    models = [stages_in_rows(whole_of(model_type))(1) for model_type in MODEL_TYPES]
    monkeypatch.setattr(attention, "attend", watched)
    for stages in models:
        logits_of(stages, torch.arange(20)[None] + 3, (20,))
    heads = {"plain heads", "grouped heads", "latent heads"}
    assert kinds == {"all before", "sliding window", "chunk", "softcap", "sinks"} | heads


def test_gradients_over_microbatches_equal_the_whole_models(whole, make_stages, num_stages):
    check_gradients(make_stages, whole, num_stages)


def test_head_takes_any_slice_of_hidden_states(qwen2):
    stage = init_stage(qwen2, 1, 0, 1, CPU)
    hidden = stage(torch.arange(9)[None], PackedBatch((4, 5), CPU))
    assert_close(stage.logits(hidden[:, [2, 7]]), stage.logits(hidden)[:, [2, 7]], 1e-6)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_half_precision_does_not_depend_on_the_cut(config):
    ids, lengths = torch.arange(20)[None] + 3, (8, 12)
    logits = []
    for num_stages in (1, 2):
        stages = [init_stage(config, 3, index, num_stages, CPU, torch.bfloat16) for index in range(num_stages)]
        logits.append(logits_of(stages, ids, lengths))
    assert logits[0].dtype == torch.float32, "heads are float32; see `products`"
    assert torch.equal(*logits)


def test_attributes(qwen2):
    stages = [init_stage(qwen2, 1, index, 3, CPU) for index in range(3)]
    assert [(stage.index, stage.num_stages) for stage in stages] == [(0, 3), (1, 3), (2, 3)]
    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, False), (False, True)]
    assert {stage.hidden_size for stage in stages} == {32}
    assert [stage.tied_embedding is None for stage in stages] == [False, True, False]
    assert torch.equal(stages[0].tied_embedding, stages[2].tied_embedding)
    assert init_stage(qwen2, 1, 0, 1, CPU).tied_embedding is None


def test_a_copied_stage_is_independent(qwen2):
    stage = init_stage(qwen2, 1, 0, 1, CPU)
    ids = torch.arange(9)[None]
    twin = copy.deepcopy(stage)
    before = logits_of([stage], ids, (4, 5))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits_of([stage], ids, (4, 5)), before)
    assert not logits_of([twin], ids, (4, 5)).any()


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_layers_are_cut_by_what_a_token_costs(config):
    """The head of a large vocabulary takes the place of layers; experts that a token is not sent to cost nothing."""
    large = init_stage({**config, "vocab_size": 640}, 1, 0, 2, CPU)
    assert len(large.cut.layers) == 3
    assert len(init_stage(config, 1, 0, 2, CPU).cut.layers) == 2
    whole = init_stage({**config, "vocab_size": 640}, 1, 0, 1, CPU)
    with FlopCounterMode(display=False) as counter:
        hidden = whole(torch.arange(16)[None] + 3, PackedBatch((16,), CPU))
        in_layers = counter.get_total_flops()
        whole.logits(hidden)
    *layers, head = layer_costs(whole.cut.layers, [whole.model.lm_head], hf_compat.num_active_experts(whole.config))
    assert counter.get_total_flops() - in_layers == 2 * 16 * head
    if "moe" not in whole.config.model_type and "deepseek" not in whole.config.model_type:
        assert in_layers == 2 * 16 * sum(layers)  # the counter knows neither grouped experts nor attention on the CPU


def test_experts_count_as_far_as_a_token_is_sent_to_them():
    layer = torch.nn.Module()
    layer.experts = torch.nn.Parameter(torch.zeros(8, 3, 5))
    layer.norm = torch.nn.Parameter(torch.zeros(7))
    layer.gate = torch.nn.Linear(3, 8)
    assert layer_costs([layer], [layer.gate], 2) == [2 * 15 + 24, 24]
    assert layer_costs([layer], [], None) == [8 * 15 + 24, 0]
    assert layer_costs([layer], [], 20) == [8 * 15 + 24, 0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 12), st.data())
def test_no_split_has_a_cheaper_costliest_stage(costs, head_cost, data):
    num_stages = data.draw(st.integers(1, len(costs)))

    def stage_costs(bounds):
        sums = [sum(costs[lo:hi]) for lo, hi in pairwise(bounds)]
        return [*sums[:-1], sums[-1] + head_cost]

    ranges = balanced_split(costs, num_stages, head_cost)
    chosen = [0, *(hi for _, hi in ranges)]
    assert [layer for lo, hi in ranges for layer in range(lo, hi)] == list(range(len(costs)))
    assert len(ranges) == num_stages
    assert all(lo < hi for lo, hi in ranges)
    every = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_stages - 1)]
    keys = {bounds: (max(stage_costs(bounds)), sum(cost**2 for cost in stage_costs(bounds))) for bounds in every}
    assert keys[tuple(chosen)] == min(keys.values())


@pytest.mark.parametrize("num_layers", range(1, 12))
def test_layers_of_one_cost_are_cut_evenly_longer_stages_first(num_layers):
    for num_stages in range(1, num_layers + 1):
        sizes = [hi - lo for lo, hi in balanced_split([3] * num_layers, num_stages)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("num_stages", [0, 5])
def test_split_refuses_stages_without_layers(num_stages):
    with pytest.raises(ConfigError, match=rf"model\.layout\.pp = {num_stages}: .*4 layers"):
        balanced_split([1] * 4, num_stages)


def test_a_long_sequence_changes_the_rotary_embedding_of_no_other():
    """transformers scales this embedding with the longest sequence of a call."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = {"model_type": "phi3", "vocab_size": 64, "pad_token_id": 0, "max_position_embeddings": 32, **sizes}
    config["original_max_position_embeddings"] = 8
    stage = init_stage({**config, "rope_parameters": rope}, 1, 0, 1, CPU)
    ids = torch.arange(20)[None] + 3
    alone = stage(ids[:, :5], PackedBatch((5,), CPU))
    assert_close(stage(ids[:, :13], PackedBatch((5, 8), CPU))[:, :5], alone, 1e-6)
    assert stage(ids, PackedBatch((20,), CPU)).shape == (1, 20, 32)
    with pytest.raises(ModelError, match="a sequence of 15 tokens in a row with others: beyond 8"):
        stage(ids, PackedBatch((5, 15), CPU))
    limits = model_limits(Model(config={**config, "rope_parameters": rope}, tokenizer=Path("none")))
    assert limits == (8, 64)


def test_a_long_row_does_not_change_the_temperature_of_attention(tmp_path):
    """transformers takes a token's place in the call for its position."""
    config = tiny_config("llama4_text") | {"floor_scale": 24}
    reference = make_reference(config, tmp_path)  # whose second microbatch is of 12 and 9 tokens
    stage, row = load_stage(tmp_path, 0, 1, CPU).eval(), reference.microbatches[1].row
    assert_close(logits_of([stage], row, (12, 9)), reference.microbatches[1].logits)
    longer = torch.cat([row, row[:, :9]], 1)
    with torch.no_grad():
        alone = reference.model(input_ids=longer, use_cache=False).logits
    assert_close(logits_of([stage], longer, (30,)), alone)  # one sequence has the places that it would have alone
    with pytest.raises(ModelError, match=r"a row of 24 tokens: .* set microbatch_tokens to 23 or less"):
        stage(longer[:, :24], PackedBatch((12, 12), CPU))
    with pytest.raises(ModelError, match="a row of 24 tokens"):
        stage.run(longer[:, :24], PackedPass.prefill(KVCache(1, 24), (24,), CPU))
    assert model_limits(Model(config=config, tokenizer=Path("none"))) == (23, 64)


def test_one_sequence_a_call_equals_the_whole_model(tmp_path):
    """A hybrid of convolutions and attention, in microbatches of several sequences, and over stages."""
    reference = make_reference(tiny_config("lfm2"), tmp_path)
    for num_stages in (1, 2):
        stages = [load_stage(tmp_path, index, num_stages, CPU) for index in range(num_stages)]
        for each in reference.microbatches:
            hidden, batch = None, PackedBatch(each.lengths, CPU)
            for stage in stages:
                hidden = stage(each.row, batch, hidden)
            assert_close(stages[-1].logits(hidden), each.logits)
    with pytest.raises(ModelError, match="'lfm2' runs one sequence a call and has no cached decode"):
        stages[0].run(each.row, PackedPass.prefill(KVCache(2, 16), each.lengths, CPU))
