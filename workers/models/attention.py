"""Attention over packed sequences, behind transformers' own registries.

    ids   [1, T]   a a a a a b b c c c c       T = sum(seqlens), no padding
    positions      0 1 2 3 4 0 1 0 1 2 3
    attention      each sequence alone: a split, then one kernel call for neighbours of one length

Two registered functions serve every model. The *mask function* builds no mask: it returns a `PackedMask` that carries
the batch and transformers' own predicate (causal, sliding window, chunks). Every model threads its `attention_mask`
down to its attention layers, so the batch reaches them without keywords, hooks or globals, also when activation
checkpointing recomputes in another thread. The *attention function* reads it and runs each sequence by itself.

On a GPU one kernel computes the whole row (`kernels`).

With a KV cache, sequences *decode* or *join*. One that decodes has one new token, which attends to what the cache holds
of its own, all in one kernel call; one that joins is as above, and its keys and values are kept. A pass has any number
of either: first those that decode, rows 0 to n-1 of the cache, then those that join, in the rows after them.

    ids   [1, T]   a b c d d d d               n = 3 decode, d joins
    positions      5 2 4 0 1 2 3

Invariants: no score ever crosses two sequences; a mask is dense only where the predicate hides more than the future,
and then once per (length, kind of layer) and forward pass.

Shapes: T tokens, L tokens of one sequence, S its keys, n live sequences, H heads, K key-value heads (K divides H), D
head size, E value head size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ...api.errors import ModelError
from . import hf_compat, kernels
from .cache import KVCache, Slots
from .kernels import Kernel, Need, Scores, Sight, Visible, attend, attend_cached

ATTENTION = "trainmaster_packed"


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
    starts: tuple[int, ...] = ()
    """The position of each sequence's first token, which counts what a KV cache holds of it; empty for zeros."""

    def __post_init__(self) -> None:
        assert min(self.seqlens, default=0) > 0, f"a packed batch wants lengths of at least 1, got {self.seqlens}"
        assert len(self.starts) in (0, len(self.seqlens)), "a packed batch wants one start for each sequence, or none"

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.seqlens)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, with what a KV cache holds of it."""
        starts = self.starts or (0,) * len(self.seqlens)
        return max(map(sum, zip(starts, self.seqlens, strict=True)))

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of one length, as (count, length): they attend in one kernel call."""
        return [(len(list(run)), length) for length, run in groupby(self.seqlens)]

    @cached_property
    def position_ids(self) -> Tensor:
        """[1, T] int64: every token's place within its own sequence."""
        if self.starts and self.num_tokens == len(self.seqlens):
            return torch.tensor([self.starts], device=self.device)
        lengths, starts = torch.tensor(self.seqlens), torch.tensor(self.starts or 0)
        shifts = lengths.cumsum(0) - lengths - starts  # of a sequence: its place in the row, less its first position
        return (torch.arange(self.num_tokens) - shifts.repeat_interleave(lengths))[None].to(self.device)

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
    cache: KVCache | None = None
    """Keeps the keys and values of this pass, and gives those of earlier ones."""
    num_decoding: int = 0
    """n: its first sequences, which have one new token each, and a past in the cache."""
    num_calls: Counter[int | None] = field(default_factory=Counter)
    """How often each layer (by its index) has attended."""

    @classmethod
    def step(cls, cache: KVCache, joining: tuple[int, ...], device: torch.device) -> PackedPass:
        """One more token for each live row of the cache, in the order of rows, and whole sequences that become rows.

        `joining`: their lengths.
        """
        starts = cache.lengths
        cache.advance(tuple([start + 1 for start in starts]) + joining)
        all_starts = starts + (0,) * len(joining) if starts else ()
        return cls(PackedBatch((1,) * len(starts) + joining, device, all_starts), cache, len(starts))

    @classmethod
    def prefill(cls, cache: KVCache, seqlens: tuple[int, ...], device: torch.device) -> PackedPass:
        """The first pass with a cache: whole sequences, which become its rows."""
        assert not cache.lengths, f"a cache of {len(cache.lengths)} live rows; a `step` lets sequences join them"
        return cls.step(cache, seqlens, device)

    @classmethod
    def decode(cls, cache: KVCache, device: torch.device) -> PackedPass:
        """A pass that nobody joins."""
        return cls.step(cache, (), device)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether the rows that decode are all equally long."""
        starts = self.batch.starts[: self.num_decoding]
        return min(starts) == max(starts)

    @cached_property
    def longest_decoding(self) -> int:
        """Tokens of the longest row that decodes, the new one included."""
        return max(self.batch.starts[: self.num_decoding]) + 1

    @cached_property
    def joining(self) -> PackedBatch:
        """The batch, less the sequences that decode."""
        if not self.num_decoding:
            return self.batch
        return PackedBatch(self.batch.seqlens[self.num_decoding :], self.batch.device)

    @cached_property
    def slots(self) -> Slots:
        """Where the cache keeps the tokens of this pass."""
        num_sequences, positions = len(self.batch.seqlens), self.batch.position_ids[0]  # [T]
        if self.num_decoding == num_sequences and self.is_uniform:
            return slice(num_sequences), slice(None), self.batch.starts[0]
        rows = torch.arange(num_sequences).repeat_interleave(torch.tensor(self.batch.seqlens))
        return rows.to(positions.device), slice(None), positions


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
        self._newest: Tensor | None = None

    @cached_property
    def sight(self) -> Sight:
        """What a token sees in the sequences that join."""
        if self.is_plain(self.current.joining.longest):
            return Sight.ALL
        return Sight.WINDOW if self._is_window else Sight.OTHER

    @property
    def _is_window(self) -> bool:
        """Whether the predicate is a sliding window, as seen where windows and chunks begin and end."""
        if self.is_custom or self.window is None:
            return False
        index = torch.arange(2 * self.window + 1, device=self.current.batch.device)
        query, key, zero = index[:: max(1, self.window // 2), None], index[None], index.new_zeros(1, 1)
        return torch.equal(self.visible(zero, zero, query, key), (key <= query) & (key > query - self.window))

    @cached_property
    def blocks(self) -> BlockMask:
        """Who sees whom in the row of sequences that join."""
        row = self.current.joining
        sequence = torch.arange(len(row.seqlens)).repeat_interleave(torch.tensor(row.seqlens))
        return kernels.blocks_of(self.visible, sequence.to(row.device), row.position_ids[0])

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

    def newest(self, num_keys: int) -> Tensor | None:
        """[n, 1, 1, S] bool: which of its S cached places each decoding row's new token sees, or None if all see all.

        Computed once for all layers of this kind; where rows are equally long, the first dimension may be 1.
        """
        if self.current.is_uniform and self.is_plain(num_keys):
            return None
        if self._newest is None:
            num_rows = 1 if self.current.is_uniform else self.current.num_decoding
            positions = self.current.batch.position_ids[0, :num_rows].view(-1, 1, 1, 1)
            index = torch.arange(num_keys, device=positions.device)[None, None, None]
            zero = index.new_zeros(1, 1, 1, 1)
            self._newest = self.visible(zero, zero, positions, index)
        return self._newest


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
    **others: Any,  # keywords for other attention functions
) -> tuple[Tensor, None]:
    """The registered attention function: every sequence of the row by itself, with its past if a cache holds one.

    query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> [1, T, H, E]. Raises ModelError for attention dropout,
    for additive position biases and whatever else scores depend on, and for models that alter the mask.
    """
    if not isinstance(attention_mask, PackedMask):
        raise ModelError(
            f"{type(module).__name__} replaces the attention mask by {type(attention_mask).__name__}, so it cannot run "
            "packed sequences; use a model type that hands the mask on"
        )
    if position_bias is not None:
        raise ModelError(f"{type(module).__name__} adds a position bias to its scores, which packed attention has not")
    for name, other in others.items():
        if isinstance(other, Tensor) and name != "position_ids":  # by which keys are rotated already
            reason = f"gives its attention {name}, which packed attention does not heed"
            raise ModelError(f"{type(module).__name__} {reason}")
    if dropout > 0.0:
        raise ModelError(_dropout_message(module, dropout))
    mask, scores = attention_mask, _scores_of(module, query, scaling, softcap, s_aux)
    current, layer = mask.current, getattr(module, "layer_idx", None)
    place = (layer, current.num_calls[layer])
    current.num_calls[layer] += 1
    num_decoding, decoded = current.num_decoding, []
    if current.cache is not None:
        keys, values = current.cache.write(place, key, value, current.slots)
        if num_decoding:
            longest = current.longest_decoding
            decoding = query[:, :, :num_decoding], keys[:num_decoding, :, :longest], values[:num_decoding, :, :longest]
            out = attend_cached(*decoding, mask.newest(longest), scores)
            if num_decoding == current.batch.num_tokens:
                return out, None
            decoded = [out[0]]
            query, key, value = (tensor[:, :, num_decoding:] for tensor in (query, key, value))
    joined = _attend_row(query, key, value, mask, scores)
    return torch.cat([*decoded, *joined])[None], None


def _attend_row(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> list[Tensor]:
    """The sequences that join, [1, heads, T, size] each -> [t, H, E], for one stretch of t tokens after another."""
    kernel = _kernel_of(query, value, mask, scores)
    if kernel is Kernel.RUNS:
        return _attend_runs(query, key, value, mask, scores)
    if kernel is Kernel.FLEX:
        return [kernels.attend_flex(query, key, value, mask.blocks, scores)]
    row, window = mask.current.joining, mask.window if mask.sight is Sight.WINDOW else None
    return [kernels.attend_fused(kernel, query, key, value, row.cu_seqlens, row.longest, window, scores)]


def _kernel_of(query: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> Kernel:
    if query.device.type != "cuda":
        return Kernel.RUNS
    sizes = query.shape[-1], value.shape[-1]
    return kernels.kernel_for(
        Need(query.dtype, sizes, mask.sight, scores.softcap is not None, scores.sinks is not None)
    )


def _attend_runs(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scores: Scores) -> list[Tensor]:
    runs = mask.current.joining.runs
    sizes = [count * length for count, length in runs]
    # split, not slices: the backward of n slices fills n tensors of full size with zeros, that of a split is one cat
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    rows = []
    for (count, length), part in zip(runs, parts, strict=True):
        # [count, heads, L, size]
        q, k, v = (tensor[0].unflatten(1, (count, length)).transpose(0, 1) for tensor in part)
        seen = None if scores.is_plain and mask.is_plain(length) else mask.dense(length)
        rows.append(attend(q, k, v, seen, scores).transpose(1, 2).flatten(0, 1))  # [count * L, H, E]
    return rows


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
