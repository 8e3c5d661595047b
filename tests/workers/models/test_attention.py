"""Packed batches, masks and the attention function itself."""

import pytest
import torch
from trainmaster.api.errors import ModelError
from trainmaster.workers.models import attention
from trainmaster.workers.models.attention import PackedBatch, PackedMask, PackedPass
from trainmaster.workers.models.kernels import Scores, attend
from trainmaster.workers.models.loading import init_stage
from transformers import AttentionInterface

CPU = torch.device("cpu")
LENGTH = 7


def reference(query, key, value, seen, scores):
    """[H, L, D] and so on, in float64, by the definition."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(x.double().repeat_interleave(repeats, 1) for x in (key, value))
    logits = (query @ key.transpose(-1, -2)) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    weights = logits.exp() * seen
    total = weights.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + scores.sinks.double().exp()[None, :, None, None]
    return (weights / total) @ value


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value_size", [8, 6])
def test_attend_equals_the_definition(window, softcap, with_sinks, value_size):
    source = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, LENGTH, size, generator=source) for heads, size in ((4, 8), (2, 8), (2, value_size))
    )
    index = torch.arange(LENGTH)
    seen = index[:, None] >= index[None]
    if window is not None:
        seen &= index[:, None] - index[None] < window
    scores = Scores(0.4, softcap, torch.randn(4, generator=source) if with_sinks else None)
    mask = None if window is None and scores.is_plain else seen[None, None]
    got = attend(query, key, value, mask, scores)
    assert got.shape == (1, 4, LENGTH, value_size)
    torch.testing.assert_close(got, reference(query, key, value, seen, scores).float(), atol=1e-5, rtol=1e-5)


def test_batch_positions_and_ends():
    batch = PackedBatch((3, 1, 2), CPU)
    assert batch.num_tokens == 6
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids is batch.position_ids


@pytest.mark.parametrize("seqlens", [(), (3, 0)])
def test_batch_wants_tokens(seqlens):
    with pytest.raises(AssertionError, match="at least 1"):
        PackedBatch(seqlens, CPU)


def test_window_masks_are_dense_only_beyond_the_window_and_made_once():
    calls = []

    def visible(_batch, _head, query, key):
        calls.append(1)
        return (key <= query) & (key > query - 4)

    mask = PackedMask(PackedPass(PackedBatch((4, 5, 5), CPU)), visible, window=4, is_custom=False)
    assert mask.is_plain(4)
    assert not mask.is_plain(5)
    assert mask.dense(5) is mask.dense(5)
    assert len(calls) == 1
    assert mask.dense(5)[0, 0].sum(-1).tolist() == [1, 2, 3, 4, 4]


def test_registration_is_idempotent():
    attention.register()
    found = AttentionInterface()[attention.ATTENTION]
    attention.register()
    assert AttentionInterface()[attention.ATTENTION] is found


def test_attention_dropout_is_refused_in_training_by_its_field():
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    stage = init_stage({**config, "attn_pdrop": 0.25}, 1, 0, 1, CPU)
    ids, batch = torch.arange(6)[None], PackedBatch((2, 4), CPU)
    with pytest.raises(ModelError, match=r"attn_pdrop = 0\.25"):
        stage(ids, batch)
    assert stage.eval()(ids, batch).shape == (1, 6, 32)
