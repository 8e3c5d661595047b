"""Stages of every kind of model against transformers' whole model, one sequence at a time."""

import copy

import pytest
import torch
from trainmaster.api.errors import ConfigError
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.loading import init_stage, load_stage
from trainmaster.workers.models.stage import balanced_split

CPU = torch.device("cpu")
MICROBATCHES = ((5, 17, 1, 23), (12, 9))


def load_all(whole, num_stages):
    return [load_stage(whole.directory, index, num_stages, CPU) for index in range(num_stages)]


def assert_close(got, wanted, tolerance=1e-5):
    assert (got - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


def test_packed_logits_equal_the_whole_models(whole, num_stages, run_stages):
    stages = load_all(whole, num_stages)
    for ids, lengths, wanted in zip(whole.ids, MICROBATCHES, whole.logits, strict=True):
        assert_close(run_stages(stages, ids, lengths), wanted)


def test_gradients_over_microbatches_equal_the_whole_models(whole, num_stages):
    stages = load_all(whole, num_stages)
    for ids, lengths, weights in zip(whole.ids, MICROBATCHES, whole.weights, strict=True):
        train_on(stages, ids, PackedBatch(lengths, CPU), weights)
    tied = [stage.tied_embedding for stage in stages if stage.tied_embedding is not None]
    assert len(tied) in (0, 2)
    summed = [tied] if tied else []
    summed += [[stage.get_parameter(f"model.{name}") for stage in stages] for name, _ in stages[0].replicated]
    for copies in summed:  # what the caller does between stages
        total = sum(parameter.grad for parameter in copies if parameter.grad is not None)
        for parameter in copies:
            parameter.grad = total.clone()
    seen = set()
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            if name in whole.gradients:
                assert parameter.grad is not None, name
                assert_close(parameter.grad, whole.gradients[name])
                seen.add(name)
    assert seen == set(whole.gradients)


def train_on(stages, ids, batch, weights):
    """One microbatch, as between processes: only hidden states and their gradients cross."""
    received, sent = [None], []
    for stage in stages:
        sent.append(stage(ids, batch, received[-1]))
        received.append(sent[-1].detach().requires_grad_())
    (stages[-1].logits(received[-1]) * weights).sum().backward()
    for out, leaf in zip(reversed(sent), reversed(received[1:]), strict=True):
        out.backward(leaf.grad)


def test_a_sequence_changes_no_other(config, run_stages):
    stages = [init_stage(config, 3, index, 2, CPU) for index in range(2)]
    lengths = (6, 11, 4)
    ids = torch.arange(21)[None] + 3
    other = ids.clone()
    other[:, 6:17] = other[:, 6:17].flip(1)
    with torch.no_grad():
        before, after = run_stages(stages, ids, lengths), run_stages(stages, other, lengths)
    assert_close(after[:, :6], before[:, :6], 1e-6)
    assert_close(after[:, 17:], before[:, 17:], 1e-6)
    assert (after[:, 6:17] - before[:, 6:17]).abs().max() > 1e-3


def test_head_takes_any_slice_of_hidden_states(qwen2):
    stage = init_stage(qwen2, 1, 0, 1, CPU)
    hidden = stage(torch.arange(9)[None], PackedBatch((4, 5), CPU))
    assert_close(stage.logits(hidden[:, [2, 7]]), stage.logits(hidden)[:, [2, 7]], 1e-6)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_half_precision_does_not_depend_on_the_cut(config, run_stages):
    ids, lengths = torch.arange(20)[None] + 3, (8, 12)
    logits = []
    for num_stages in (1, 2):
        stages = [init_stage(config, 3, index, num_stages, CPU, torch.bfloat16) for index in range(num_stages)]
        logits.append(run_stages(stages, ids, lengths))
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


def test_a_copied_stage_is_independent(qwen2, run_stages):
    stage = init_stage(qwen2, 1, 0, 1, CPU)
    ids = torch.arange(9)[None]
    twin = copy.deepcopy(stage)
    before = run_stages([stage], ids, (4, 5))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(run_stages([stage], ids, (4, 5)), before)
    assert not run_stages([twin], ids, (4, 5)).any()


@pytest.mark.parametrize("num_layers", range(1, 12))
def test_split_is_balanced_and_complete(num_layers):
    for num_stages in range(1, num_layers + 1):
        ranges = balanced_split(num_layers, num_stages)
        assert [layer for lo, hi in ranges for layer in range(lo, hi)] == list(range(num_layers))
        sizes = [hi - lo for lo, hi in ranges]
        assert len(sizes) == num_stages
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("num_stages", [0, 5])
def test_split_refuses_stages_without_layers(num_stages):
    with pytest.raises(ConfigError, match=rf"model\.layout\.pp = {num_stages}: .*4 layers"):
        balanced_split(4, num_stages)
