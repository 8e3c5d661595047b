"""How attention is computed, once it is known who sees whom: kernels and the choice among them.

    CPU                          one fused kernel call for each run of sequences of one length
    CUDA, half precision         torch's `varlen_attn`: the whole row at once, full attention and sliding windows
         with a softcap          `flash_attn`, where it is installed
         all else                `flex_attention`, compiled: float32, sinks, chunks, any mask
    where none of these can      as on a CPU

The choice is by layer, from what the layer needs and what is installed; each is logged once.

Invariants: a kernel gives what `attend` gives for each sequence by itself, but for rounding; tokens of two sequences of
a row never meet.

Does not: know models, batches or caches (`attention`).

Shapes: T tokens of a row of n sequences, L tokens of one sequence, S its keys, H heads, K key-value heads (K divides
H), D head size, E value head size.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from .products import HALF

logger = logging.getLogger(__name__)

# (batch, head, query position, key position) -> may see; broadcasts over index tensors
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """How a layer turns queries and keys into weights."""

    scale: float
    """Factor on the dot products."""
    softcap: float | None = None
    """c of c * tanh(scores / c)."""
    sinks: Tensor | None = None
    """[H] logits that take weight and give no value (gpt-oss)."""

    @property
    def is_plain(self) -> bool:
        """Whether a fused kernel computes them."""
        return self.softcap is None and self.sinks is None


class Kernel(StrEnum):
    """What computes attention over a row of sequences."""

    VARLEN = "torch's varlen_attn"
    FLASH = "flash_attn"
    FLEX = "flex_attention"
    RUNS = "scaled_dot_product_attention, a run of equal lengths at a time"


class Sight(StrEnum):
    """What a token sees of its own sequence."""

    ALL = "full"
    """Itself and all before it."""
    WINDOW = "sliding-window"
    """Itself and those just before it, so many in all."""
    OTHER = "masked"
    """Less than all before it, by any rule."""


@dataclass(frozen=True)
class Need:
    """What the choice of a kernel for a GPU depends on."""

    dtype: torch.dtype
    sizes: tuple[int, int]
    """D and E."""
    sight: Sight
    has_softcap: bool
    has_sinks: bool


@cache
def kernel_for(need: Need) -> Kernel:
    """The best of what this machine has. Logged at the first call for each need."""
    kernel = best_of(installed(), need)
    extras = " with a softcap" * need.has_softcap + " with sinks" * need.has_sinks
    what = f"{need.sight.value} attention{extras}, {need.dtype}, head size {max(need.sizes)}"
    logger.info("%s: computed by %s", what, kernel.value)
    return kernel


def best_of(available: frozenset[Kernel], need: Need) -> Kernel:
    """The first of `available` that can do it, in the order of `Kernel`; RUNS can do all."""
    able = set()
    is_regular = need.sight is not Sight.OTHER and not need.has_sinks
    key_size, value_size = need.sizes
    if is_regular and need.dtype in HALF and key_size % 8 == 0 and value_size <= key_size <= _LARGEST_FLASH:
        able |= {Kernel.FLASH} if need.has_softcap else {Kernel.FLASH, Kernel.VARLEN}
    if need.dtype in (*HALF, torch.float32) and min(need.sizes) >= _SMALLEST_FLEX:
        able.add(Kernel.FLEX)
    return next((kernel for kernel in Kernel if kernel in able & available), Kernel.RUNS)


_LARGEST_FLASH, _SMALLEST_FLEX = 256, 16
"""Head sizes that the kernels take."""


@cache
def installed() -> frozenset[Kernel]:
    """Kernels for rows on this machine's GPU."""
    if not torch.cuda.is_available():
        return frozenset()
    found = set()
    if torch.cuda.get_device_capability() >= (8, 0):
        if "window_size" in _parameters("torch.nn.attention.varlen", "varlen_attn"):
            found.add(Kernel.VARLEN)
        if "softcap" in _parameters("flash_attn", "flash_attn_varlen_func"):
            found.add(Kernel.FLASH)
    if importlib.util.find_spec("triton") is not None:
        found.add(Kernel.FLEX)
    return frozenset(found)


@cache
def _parameters(module: str, function: str) -> frozenset[str]:
    """Of a function that may be absent: then none."""
    try:
        return frozenset(inspect.signature(getattr(importlib.import_module(module), function)).parameters)
    except (ImportError, AttributeError):
        return frozenset()


def attend_fused(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    window: int | None,
    scores: Scores,
) -> Tensor:
    """A row by VARLEN or FLASH: query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> [T, H, E].

    `ends` [n + 1] int32: where each sequence starts, then T. `window`: how many tokens one sees, itself among them;
    None: all before it. No sinks; a softcap by FLASH only.
    """
    value_size, seen = value.shape[-1], (-1 if window is None else window - 1, 0)
    if value_size < key.shape[-1]:  # multi-head latent attention: the kernels want equal head sizes
        value = F.pad(value, (0, key.shape[-1] - value_size))
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]  # [T, heads, D]
    extra: dict[str, Any]  # as the packages name them
    if kernel is Kernel.VARLEN:
        name, function = "torch.nn.attention.varlen", "varlen_attn"
        extra = {"scale": scores.scale}
        if "enable_gqa" in _parameters(name, function):
            extra["enable_gqa"] = True
    else:
        name, function = "flash_attn", "flash_attn_varlen_func"
        extra = {"softmax_scale": scores.scale, "causal": True, "softcap": scores.softcap or 0.0}
    attend_rows = getattr(importlib.import_module(name), function)
    out: Tensor = attend_rows(*rows, ends, ends, longest, longest, window_size=seen, **extra)
    return out[..., :value_size]


def blocks_of(visible: Visible, sequence: Tensor, positions: Tensor) -> BlockMask:
    """Who sees whom in a row, for `attend_flex`.

    `sequence` and `positions` [T] int64: of each token, which sequence it is of, and its place there.
    """

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_same = sequence[query] == sequence[key]
        return is_same & visible(batch, head, positions[query], positions[key])

    size = len(positions)
    compiles = positions.device.type == "cuda"  # or T x T booleans would be made first
    return create_block_mask(seen, None, None, size, size, device=str(positions.device), _compile=compiles)


def attend_flex(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scores: Scores) -> Tensor:
    """A row by `flex_attention`: query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> [T, H, E]."""
    given: Any = _flex(query.device.type)(  # a tensor and what else was asked for
        query,
        key,
        value,
        score_mod=None if scores.softcap is None else _cap(scores.softcap),
        block_mask=blocks,
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    out, sums = given[0], given[1].lse
    if scores.sinks is not None:
        # a sink adds exp(sink) to what the weights are divided by
        out = out * torch.sigmoid(sums - scores.sinks.float()[:, None])[..., None].to(out.dtype)
    return out[0].transpose(0, 1)


def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query_place: Tensor, key_place: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return cap


@cache
def _flex(device_type: str) -> Callable[..., Any]:  # `flex_attention`, whose result depends on its arguments
    function: Callable[..., Any] = flex_attention
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Sequences of one length: query [n, H, L, D], key [n, K, S, D], value [n, K, S, E] -> [n, H, L, E].

    `mask` is bool, [1, 1, L, S], True where a query sees a key; None is plain causal with L = S and plain scores.
    """
    if not scores.is_plain:
        assert mask is not None, "the math path takes an explicit mask"
        return _attend_by_math(query, key, value, mask, scores)
    value_size = value.shape[-1]
    if value_size < key.shape[-1]:  # multi-head latent attention: the fused CPU kernel wants equal head sizes
        value = F.pad(value, (0, key.shape[-1] - value_size))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[..., :value_size]


def attend_cached(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """The newest token of each row: query [1, H, n, D], keys [n, K, S, D], values [n, K, S, E] -> [1, n, H, E].

    `mask` is bool, [n, 1, 1, S] or [1, 1, 1, S], True where a token sees a key; None: all see all.
    """
    num_rows, num_key_heads = keys.shape[:2]
    if not scores.is_plain:
        out = _attend_by_math(query.transpose(0, 2), keys, values, mask, scores)  # [n, H, 1, E]
        return out.reshape(1, num_rows, -1, values.shape[-1])
    # heads that share keys stand as queries of one head, so that no key is read twice and none is copied
    grouped = query.transpose(0, 2).reshape(num_rows, num_key_heads, -1, keys.shape[-1])  # [n, K, H / K, D]
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scores.scale)
    return out.reshape(1, num_rows, -1, values.shape[-1])


def _attend_by_math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """`attend`, for any number of sequences, with scores that no fused kernel computes; the softmax is in float32."""
    num_sequences, num_heads, num_queries, _ = query.shape
    # heads that share keys stand as queries of one head
    grouped = query.reshape(num_sequences, key.shape[1], -1, query.shape[-1])  # [n, K, H / K * L, D]
    logits = (grouped @ key.transpose(-1, -2)).view(num_sequences, num_heads, num_queries, -1) * scores.scale
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    logits = logits.float()  # [n, H, L, S]
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if scores.sinks is None:
        weights = logits.softmax(-1)
    else:
        sinks = scores.sinks.float().reshape(1, -1, 1, 1).expand(num_sequences, -1, num_queries, 1)  # [n, H, L, 1]
        weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    weights = weights.to(value.dtype).reshape(*grouped.shape[:3], -1)  # [n, K, H / K * L, S]
    return (weights @ value).view(num_sequences, num_heads, num_queries, -1)
