"""One pipeline stage of a causal language model: packed sequences in, hidden states or logits out.

Owns the pruned transformers model of one stage and the way it is called. Invariants: a stage's parameters have the
names of the whole model (`stage.model.named_parameters()`); stages share nothing, so stages of different models, or all
stages of one, live in one process.

Does not: load, initialise (`loading`), write (`checkpoint`), send or receive.

Shapes: T tokens in a packed row, H hidden size, V vocabulary size, n any number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...api.errors import ModelError
from ...api.model_support import Packing
from .attention import PackedBatch, PackedPass, packed
from .configs import rotary_limit, row_limit
from .cut import Cut
from .products import HALF, float32_products


class Head(StrEnum):
    """What a model ends in."""

    LANGUAGE = "language"
    """Its own head, over the vocabulary."""
    SCALAR = "scalar"
    """`score`, one number a token: for reward models and critics."""


class Stage(nn.Module):
    """Some layers of a model, as `cut.balanced_split` has them, with what its author put before the first and after the
    last. Made by `loading.load_stage` and `loading.init_stage`.

        hidden = stages[0](ids, batch)                          # [1, T, H]
        hidden = stages[1](ids, batch, hidden)
        logits = stages[1].logits(hidden[:, wanted])            # [1, n, V]

    Attributes: `index` of `num_stages`; `is_first`, `is_last`; `head`, `packing`; `hidden_size` (H, what one stage
    sends to the next); `config`, the whole model's; `model`, the pruned one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cut: Cut,
        index: int,
        num_stages: int,
        packing: Packing = Packing.ROW,
        head: Head = Head.LANGUAGE,
    ) -> None:
        super().__init__()
        self.packing, self.head = packing, head
        self.index: int = index
        self.num_stages: int = num_stages
        self.is_first: bool = index == 0
        self.is_last: bool = index == num_stages - 1
        self.model: PreTrainedModel = model
        self.config: PretrainedConfig = model.config
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self.cut = cut
        self.rotary_limit, self.row_limit = rotary_limit(model.config), row_limit(model.config)

    @property
    def tied_embedding(self) -> nn.Parameter | None:
        """This stage's copy of an embedding that is the head, too, and hence on the first and on the last stage.

        The caller sums the two gradients before an optimizer step. None on all other stages, in models that tie
        nothing, and where one stage is all.
        """
        if self.num_stages == 1 or not self.cut.has_tied_embedding:
            return None
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, nn.Parameter), "the cut keeps a tied embedding"
        return weight

    @property
    def replicated(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that every stage holds, by their names in `model`; empty where one stage is all.

        The caller sums their gradients over all stages (a stage that does not use one leaves it None).
        """
        if self.num_stages == 1:
            return []
        return [(name, parameter) for name, parameter in self.model.named_parameters() if self.cut.is_shared(name)]

    def own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """By their names in `model`, less copies of those that an earlier stage holds: all stages' are the model's."""
        copies = set() if self.is_first else {id(parameter) for _, parameter in self.replicated}
        if not self.is_first and self.tied_embedding is not None:
            copies.add(id(self.tied_embedding))
        return [pair for pair in self.model.named_parameters() if id(pair[1]) not in copies]

    @property
    def reads_tokens(self) -> bool:
        """Whether it matters which ids it is given: to embed them, to score them, or for what every stage holds."""
        return self.is_first or self.is_last or bool(self.replicated)

    def forward(self, ids: Tensor, batch: PackedBatch, hidden: Tensor | None = None) -> Tensor:
        """Run this stage's part.

        ids [1, T] int64, on every stage, of any value where it does not read them; hidden [1, T, H], from the stage
        before, on all but the first. -> [1, T, H]: what the next stage takes, or, on the last stage, after the final
        norm: what the head takes.
        """
        return self.run(ids, PackedPass(batch), hidden)

    def run(self, ids: Tensor, current: PackedPass, hidden: Tensor | None = None) -> Tensor:
        """`forward`, for a caller that wants to see the pass."""
        assert (hidden is None) == self.is_first, f"stage {self.index}: hidden states are for all but the first stage"
        assert ids.shape == (1, current.batch.num_tokens), (
            f"ids {list(ids.shape)} for a batch of {current.batch.num_tokens} tokens"
        )
        if self.packing is Packing.ALONE:
            return self._run_alone(ids, current, hidden)
        self._check_row(current)
        return self._run(ids, current, hidden, current.batch.model_kwargs())

    def _check_row(self, current: PackedPass) -> None:
        """Raise ModelError for a row in which sequences would change each other's positions."""
        limit = self.rotary_limit
        if limit is not None and len(current.batch.seqlens) > 1 and current.batch.longest > limit:
            raise ModelError(
                f"a sequence of {current.batch.longest} tokens in a row with others: beyond {limit} it would change "
                "the rotary embedding of all; give it a microbatch of its own, or shorten it"
            )
        num_tokens, limit = max(current.batch.num_tokens, current.batch.longest), self.row_limit
        is_alone = len(current.batch.seqlens) == 1 and current.cache is None
        if limit is not None and num_tokens > limit and not is_alone:
            raise ModelError(
                f"a row of {num_tokens} tokens: with attn_temperature_tuning, places in a row beyond {limit} would "
                f"count for positions in a sequence; set microbatch_tokens to {limit} or less"
            )

    def _run_alone(self, ids: Tensor, current: PackedPass, hidden: Tensor | None) -> Tensor:
        """One call of the model for each sequence, which then needs to keep nothing apart."""
        if current.cache is not None:
            raise ModelError(
                f"model type {self.config.model_type!r} runs one sequence a call and has no cached decode, so it "
                "cannot generate; train it, or use another type"
            )
        lengths = current.batch.seqlens
        parts: list[Tensor | None] = [None] * len(lengths) if hidden is None else list(hidden.split(lengths, 1))
        outs = []
        for tokens, part in zip(ids.split(lengths, 1), parts, strict=True):
            alone = PackedPass(PackedBatch((tokens.shape[1],), ids.device))
            outs.append(self._run(tokens, alone, part, {"use_cache": False}))
        return torch.cat(outs, 1)

    def _run(self, ids: Tensor, current: PackedPass, hidden: Tensor | None, keywords: dict[str, Any]) -> Tensor:
        inlet, outlet = self.cut.inlet, self.cut.outlet
        if inlet is not None:
            inlet.received = hidden
        try:
            with packed(current):
                out = self.cut.decoder(input_ids=ids, **keywords)
            if outlet is None:
                return out[0]
            if outlet.captured is None:
                raise RuntimeError("its layers give no hidden states")  # of foreign code; the probe says which
            return outlet.captured
        finally:  # let go of what autograd does not need
            if inlet is not None:
                inlet.received = None
            if outlet is not None:
                outlet.captured = None

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own head, softcap and scaling included, on any of the last stage's outputs.

        hidden [1, n, H] -> [1, n, V], float32 in models of half precision, too.
        """
        assert self.is_last, f"stage {self.index} of {self.num_stages} has no head"
        assert self.head is Head.LANGUAGE, "a model with a scalar head gives values"
        with self._decoder_gives(hidden), float32_products() if hidden.dtype in HALF else nullcontext():
            return self.model(inputs_embeds=hidden, use_cache=False).logits

    def values(self, hidden: Tensor) -> Tensor:
        """One number for each of the last stage's outputs: a reward, or a critic's value.

        hidden [1, n, H] -> [1, n].
        """
        assert self.is_last, f"stage {self.index} of {self.num_stages} has no head"
        assert self.head is Head.SCALAR, "a language model gives logits"
        score = self.model.get_submodule("score")
        values: Tensor = score(hidden)
        return values[..., 0]

    @contextmanager
    def _decoder_gives(self, hidden: Tensor) -> Iterator[None]:
        """Let the model's forward find `hidden` where it calls its decoder, and so compute only its head."""
        instance = self.cut.decoder.__dict__
        instance["forward"] = lambda *args, **kwargs: _Given(hidden)
        try:
            yield
        finally:
            del instance["forward"]


class _Given:
    """A decoder's output of hidden states alone; every optional field reads as None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Any:  # a model's output is a tuple of many types
        return self.last_hidden_state if place == 0 else ()
