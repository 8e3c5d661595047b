"""Attention over packed sequences, behind transformers' own registries.

    ids   [1, T]   a a a a a b b c c c c       T = sum(seqlens), no padding
    positions      0 1 2 3 4 0 1 0 1 2 3
    attention      each sequence alone: a split, then one kernel call per sequence

Two registered functions serve every model. The *mask function* builds no mask: it returns a `PackedMask` that carries
the batch and transformers' own predicate (causal, sliding window, chunks). Every model threads its `attention_mask`
down to its attention layers, so the batch reaches them without keywords, hooks or globals, also when activation
checkpointing recomputes in another thread. The *attention function* reads it and runs each sequence by itself.

Invariants: no score ever crosses two sequences; a mask is dense only where the predicate hides more than the future,
and then once per (length, kind of layer) and forward pass. A KV cache will hang off `PackedPass`, which knows the layer
and how often it has attended; `attend` already takes keys longer than queries where it is given a mask.

Shapes: T tokens, L tokens of one sequence, S its keys, H heads, K key-value heads (K divides H), D head size, E value
head size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...api.errors import ModelError
from . import hf_compat

ATTENTION = "trainmaster_packed"

# (batch, head, query position, key position) -> may see; broadcasts over index tensors
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences laid end to end in one row of tokens.

    Immutable, but for tensors that are computed once on first use; share one among all layers, microsteps and models
    that see the same row.

        batch = PackedBatch((5, 2, 4), torch.device("cpu"))
        hidden = stage(ids, batch)                              # ids [1, 11]
    """

    seqlens: tuple[int, ...]
    """Tokens of each sequence, in the order of the row; every one at least 1."""
    device: torch.device
    """Where the row lives."""

    def __post_init__(self) -> None:
        assert min(self.seqlens, default=0) > 0, f"a packed batch wants lengths of at least 1, got {self.seqlens}"

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.seqlens)

    @cached_property
    def position_ids(self) -> Tensor:
        """[1, T] int64: every token's place within its own sequence."""
        return torch.cat([torch.arange(length) for length in self.seqlens])[None].to(self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[num_sequences + 1] int32: where each sequence starts, then T."""
        ends = torch.tensor(self.seqlens).cumsum(0)
        return F.pad(ends, (1, 0)).to(torch.int32).to(self.device)

    @cached_property
    def _no_padding(self) -> Tensor:
        return torch.ones(1, self.num_tokens, dtype=torch.bool, device=self.device)

    def model_kwargs(self) -> dict[str, Any]:  # keywords of a foreign function
        """Keywords for any transformers decoder, besides its tokens.

        The mask of ones switches off transformers' own guess at packing, so that its predicates stay functions of
        positions within a sequence.
        """
        return {"position_ids": self.position_ids, "attention_mask": self._no_padding, "use_cache": False}


@dataclass(eq=False)
class PackedPass:
    """One forward pass over a batch through one model: what its attention layers share."""

    batch: PackedBatch
    num_calls: Counter[int | None] = field(default_factory=Counter)
    """How often each layer (by its index) has attended."""


_current: ContextVar[PackedPass | None] = ContextVar("trainmaster_packed_pass", default=None)


@contextmanager
def packed(current: PackedPass) -> Iterator[None]:
    """Let the transformers model that is called inside attend over the batch of `current`."""
    token = _current.set(current)
    try:
        yield
    finally:
        _current.reset(token)


def register() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers. Idempotent; loading calls it."""
    hf_compat.register_attention(ATTENTION, packed_attention, packed_mask)


class PackedMask:
    """What transformers believes to be an attention mask: one kind of layer's view of one packed forward pass."""

    def __init__(self, current: PackedPass, visible: Visible, window: int | None, is_custom: bool) -> None:
        self.current, self.visible, self.window, self.is_custom = current, visible, window, is_custom
        self._dense: dict[int, Tensor] = {}

    def is_plain(self, length: int) -> bool:
        """Whether, in a sequence of `length`, a token sees exactly itself and all before it."""
        if hf_compat.is_plain_causal(self.visible):
            return True
        return not self.is_custom and self.window is not None and length <= self.window

    def dense(self, length: int) -> Tensor:
        """[1, 1, L, L] bool: who sees whom in a sequence of `length`. Computed once for all layers of this kind."""
        if length not in self._dense:
            index = torch.arange(length, device=self.current.batch.device)
            zero = index.new_zeros(1, 1, 1, 1)
            seen = self.visible(zero, zero, index[None, None, :, None], index[None, None, None, :])
            self._dense[length] = seen.expand(1, 1, length, length)
        return self._dense[length]


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Visible,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,  # keywords for other mask functions
) -> PackedMask:
    """The registered mask function: hands the running pass and the model's own predicate to `packed_attention`."""
    current = _current.get()
    assert current is not None, "a packed model is called through its Stage, or inside `with packed(...)`"
    num_tokens = current.batch.num_tokens
    assert (batch_size, q_length, kv_length) == (1, num_tokens, num_tokens), (
        f"a packed batch is one row of {num_tokens} tokens; the model asks for {batch_size} x {q_length} x {kv_length}"
    )
    return PackedMask(current, mask_function, local_size, is_custom=use_vmap)


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


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,  # keywords for other attention functions
) -> tuple[Tensor, None]:
    """The registered attention function: every sequence of the row by itself.

    query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> [1, T, H, E]. Raises ModelError for attention dropout,
    for additive position biases, and for models that alter the mask.
    """
    if not isinstance(attention_mask, PackedMask):
        raise ModelError(
            f"{type(module).__name__} replaces the attention mask by {type(attention_mask).__name__}, so it cannot run "
            "packed sequences; use a model type that hands the mask on"
        )
    if position_bias is not None:
        raise ModelError(f"{type(module).__name__} adds a position bias to its scores, which packed attention has not")
    if dropout > 0.0:
        raise ModelError(_dropout_message(module, dropout))
    mask, scores = attention_mask, _scores_of(module, query, scaling, softcap, s_aux)
    mask.current.num_calls[getattr(module, "layer_idx", None)] += 1
    lengths = list(mask.current.batch.seqlens)
    # split, not slices: the backward of n slices fills n tensors of full size with zeros, that of a split is one cat
    rows = [
        attend(q, k, v, None if scores.is_plain and mask.is_plain(length) else mask.dense(length), scores)
        for length, q, k, v in zip(
            lengths, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
        )
    ]
    return torch.cat(rows, 2).transpose(1, 2).contiguous(), None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """One sequence: query [1, H, L, D], key [1, K, S, D], value [1, K, S, E] -> [1, H, L, E].

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


def _attend_by_math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """`attend` for scores that no fused kernel computes; the softmax is in float32."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)  # [1, H, S, D], [1, H, S, E]
    logits = (query @ key.transpose(-1, -2)) * scores.scale  # [1, H, L, S]
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    logits = logits.float().masked_fill(~mask, float("-inf"))
    if scores.sinks is None:
        return logits.softmax(-1).to(value.dtype) @ value
    sinks = scores.sinks.float().reshape(1, -1, 1, 1).expand(-1, -1, logits.shape[2], 1)  # [1, H, L, 1]
    weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value


def _scores_of(
    module: nn.Module, query: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Scores:
    if sinks is None:
        sinks = getattr(module, "sinks", None)
    return Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks)


def _dropout_message(module: nn.Module, dropout: float) -> str:
    config: Any = getattr(module, "config", None)  # most attention modules keep their model's
    fields = {} if config is None else config.to_dict()
    names = [name for name, value in fields.items() if "att" in name and "drop" in name and value == dropout]
    return (
        f"{' or '.join(names) or 'attention dropout'} = {dropout}: packed attention trains without dropout of "
        "attention weights. Set it to 0.0 in model.config, or in the config.json of the checkpoint"
    )
