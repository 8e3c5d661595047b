"""Kernels for whole rows: which is chosen, how it is called, and that it gives what each sequence gives by itself.

The kernels themselves run on a GPU alone. Elsewhere `varlen_attn` and `flash_attn` are stood in for by functions that
do what their documentation says, in plain arithmetic, and `flex_attention` runs as torch's own unfused reference.
"""

import sys
import types
import warnings

import pytest
import torch
from trainmaster.workers.models import attention, kernels
from trainmaster.workers.models.attention import PackedBatch, PackedMask, PackedPass
from trainmaster.workers.models.kernels import Kernel, Need, Scores, Sight

CPU = torch.device("cpu")
LENGTHS = (7, 3, 3, 12)
WINDOW = 4
ALL = frozenset(Kernel)
HALF, FLOAT = torch.bfloat16, torch.float32


def full(_batch, _head, query, key):
    return key <= query


def sliding(_batch, _head, query, key):
    return (key <= query) & (key > query - WINDOW)


def chunked(_batch, _head, query, key):
    return (key <= query) & (key // WINDOW == query // WINDOW)


def need(dtype=HALF, sizes=(64, 64), sight=Sight.ALL, has_softcap=False, has_sinks=False):
    return Need(dtype, sizes, sight, has_softcap, has_sinks)


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (Kernel.VARLEN, need()),
        (Kernel.VARLEN, need(sight=Sight.WINDOW)),
        (Kernel.VARLEN, need(sizes=(192, 128))),
        (Kernel.FLASH, need(has_softcap=True)),
        (Kernel.FLEX, need(has_sinks=True)),
        (Kernel.FLEX, need(has_sinks=True, has_softcap=True)),
        (Kernel.FLEX, need(sight=Sight.OTHER)),
        (Kernel.FLEX, need(FLOAT)),
        (Kernel.FLEX, need(sizes=(512, 512))),
        (Kernel.FLEX, need(sizes=(20, 20))),
        (Kernel.FLEX, need(sizes=(64, 128))),
        (Kernel.RUNS, need(FLOAT, sizes=(8, 8))),
        (Kernel.RUNS, need(torch.float64)),
    ],
)
def test_the_best_kernel_that_can(wanted, what):
    assert kernels.best_of(ALL, what) is wanted


def test_what_is_not_installed_is_not_chosen():
    assert kernels.best_of(ALL - {Kernel.VARLEN}, need()) is Kernel.FLASH
    assert kernels.best_of(frozenset({Kernel.FLEX}), need()) is Kernel.FLEX
    assert kernels.best_of(frozenset(), need()) is Kernel.RUNS
    assert kernels.best_of(ALL - {Kernel.FLASH}, need(has_softcap=True)) is Kernel.FLEX


def test_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "installed", lambda: ALL)
    kernels.kernel_for.cache_clear()
    with caplog.at_level("INFO"):
        kernels.kernel_for(need(sight=Sight.WINDOW))
        kernels.kernel_for(need(sight=Sight.WINDOW))
        kernels.kernel_for(need(has_sinks=True))
    kernels.kernel_for.cache_clear()
    assert caplog.messages == [
        "sliding-window attention, torch.bfloat16, head size 64: computed by torch's varlen_attn",
        "full attention with sinks, torch.bfloat16, head size 64: computed by flex_attention",
    ]


@pytest.mark.parametrize(
    ("visible", "lengths", "sight"),
    [
        (sliding, LENGTHS, Sight.WINDOW),
        (sliding, (4, 2), Sight.ALL),
        (chunked, LENGTHS, Sight.OTHER),
        (chunked, (4, 2), Sight.ALL),
    ],
)
def test_windows_are_told_from_chunks(visible, lengths, sight):
    assert PackedMask(PackedPass(PackedBatch(lengths, CPU)), visible, WINDOW, is_custom=False).sight is sight


def test_a_mask_of_an_unknown_rule_is_no_window():
    mask = PackedMask(PackedPass(PackedBatch(LENGTHS, CPU)), sliding, WINDOW, is_custom=True)
    assert mask.sight is Sight.OTHER


def by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window, softcap=0.0):
    """[T, heads, size] -> [T, H, size]: what both packages document; `window`: (left, right), -1 for no bound."""
    assert query.dim() == key.dim() == value.dim() == 3
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    outs = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))  # [H, L, size]
        logits = q @ k.transpose(-1, -2) * scale
        if softcap > 0.0:
            logits = torch.tanh(logits / softcap) * softcap
        place = torch.arange(end - start)
        ahead = place[None] - place[:, None]  # of keys, beyond queries
        left, right = window
        hidden = (ahead > right) if right >= 0 else torch.zeros_like(ahead, dtype=torch.bool)
        if left >= 0:
            hidden |= -ahead > left
        outs.append((logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def stand_ins(monkeypatch):
    """Both packages' functions, with the signatures of torch 2.13 and of flash_attn 2.8."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert enable_gqa
        return by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
    ):
        left, right = window_size
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return by_definition(q, k, v, *bounds, softmax_scale, (left, 0 if causal else right), softcap)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    kernels._parameters.cache_clear()
    yield
    kernels._parameters.cache_clear()


class Layer(torch.nn.Module):
    layer_idx = 0


def attend_by(kernel, visible, scores, tensors, monkeypatch):
    """A layer over the row, as a transformers model would call it: out [1, T, H, E]."""
    device = tensors[0].device
    window = None if visible is full else WINDOW
    mask = PackedMask(PackedPass(PackedBatch(LENGTHS, device)), visible, window, is_custom=False)
    monkeypatch.setattr(attention, "_kernel_of", lambda *_: kernel)
    monkeypatch.setattr(attention.hf_compat, "is_plain_causal", lambda predicate: predicate is full)
    extra = {"scaling": scores.scale, "softcap": scores.softcap, "s_aux": scores.sinks}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return attention.packed_attention(Layer(), *tensors, mask, **extra)[0]


def drawn(dtype=FLOAT, device=CPU, heads=(4, 2), sizes=(16, 16)):
    """Queries, keys and values of a row: [1, heads, T, size]."""
    source, num_tokens = torch.Generator().manual_seed(0), sum(LENGTHS)
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    return [
        torch.randn(1, number, num_tokens, size, generator=source).to(device, dtype).requires_grad_()
        for number, size in shapes
    ]


def cases(*kernels_and_kinds):
    return pytest.mark.parametrize(("kernel", "visible", "softcap", "has_sinks", "heads", "sizes"), kernels_and_kinds)


FUSED = [
    (kernel, visible, softcap, False, heads, sizes)
    for kernel in (Kernel.VARLEN, Kernel.FLASH)
    for visible in (full, sliding)
    for softcap in ((None,) if kernel is Kernel.VARLEN else (None, 1.5))
    for heads, sizes in (((4, 2), (16, 16)), ((4, 4), (24, 16)))
]
FLEX = [
    (Kernel.FLEX, visible, softcap, has_sinks, heads, sizes)
    for visible in (full, sliding, chunked)
    for softcap, has_sinks in ((None, False), (1.5, False), (None, True), (1.5, True))
    for heads, sizes in (((4, 2), (16, 16)), ((4, 4), (24, 16)))
]


def of(softcap, has_sinks, num_heads, device=CPU):
    sinks = torch.randn(num_heads, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    return Scores(0.3, softcap, sinks if has_sinks else None)


@cases(*FUSED)
def test_whole_rows_equal_sequences_alone(kernel, visible, softcap, has_sinks, heads, sizes, stand_ins, monkeypatch):
    scores = of(softcap, has_sinks, heads[0])
    got, wanted = drawn(heads=heads, sizes=sizes), drawn(heads=heads, sizes=sizes)
    outs = [
        attend_by(which, visible, scores, tensors, monkeypatch)
        for which, tensors in ((kernel, got), (Kernel.RUNS, wanted))
    ]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
    for out in outs:
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


@cases(*FLEX)
def test_flex_rows_equal_sequences_alone(kernel, visible, softcap, has_sinks, heads, sizes, monkeypatch):
    scores = of(softcap, has_sinks, heads[0])
    tensors = [tensor.detach() for tensor in drawn(heads=heads, sizes=sizes)]  # torch has no backward of it for a CPU
    with torch.no_grad():
        got = attend_by(kernel, visible, scores, tensors, monkeypatch)
        wanted = attend_by(Kernel.RUNS, visible, scores, tensors, monkeypatch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("visible", [full, sliding, chunked])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_no_token_of_a_row_sees_another_sequence(visible, has_sinks, monkeypatch):
    scores, tensors = of(None, has_sinks, 4), [tensor.detach() for tensor in drawn()]
    before = attend_by(Kernel.FLEX, visible, scores, tensors, monkeypatch)
    start, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    for tensor in tensors:
        tensor[:, :, start:end] += 1.0
    after = attend_by(Kernel.FLEX, visible, scores, tensors, monkeypatch)
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end:], after[:, end:])
    assert not torch.equal(before[:, start:end], after[:, start:end])


@pytest.mark.gpu
@cases(*FUSED, *FLEX)
def test_on_a_gpu_rows_equal_sequences_alone(kernel, visible, softcap, has_sinks, heads, sizes, monkeypatch):
    if kernel not in kernels.installed():
        pytest.skip(f"{kernel.value} is not installed")
    cuda = torch.device("cuda")
    dtype, bound = (FLOAT, 1e-3) if kernel is Kernel.FLEX else (HALF, 2e-2)
    got = drawn(dtype, cuda, heads, sizes)
    wanted = [tensor.detach().float().requires_grad_() for tensor in got]
    scores = [of(softcap, has_sinks, heads[0], cuda) for _ in range(2)]
    outs = [
        attend_by(kernel, visible, scores[0], got, monkeypatch),
        attend_by(Kernel.RUNS, visible, scores[1], wanted, monkeypatch),
    ]
    torch.testing.assert_close(outs[0].float(), outs[1], atol=bound, rtol=bound)
    for out in outs:
        (out * torch.linspace(-1, 1, out.shape[-1], device=cuda)).sum().backward()
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.grad.float(), other.grad, atol=4 * bound, rtol=bound)
    if has_sinks:
        torch.testing.assert_close(scores[0].sinks.grad, scores[1].sinks.grad, atol=4 * bound, rtol=bound)
