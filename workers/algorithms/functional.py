"""Formulas that algorithms share, on packed rows: T tokens, S sequences, n chosen positions, H hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.attention import PackedBatch
from ..models.stage import Stage
from .scoring import score


def predicted_positions(mask: Tensor, packed: PackedBatch) -> Tensor:
    """Positions `[n]` where `mask` (`[T]`) is set and a token can be predicted: never the first of a sequence."""
    chosen = mask.clone()
    chosen[packed.cu_seqlens[:-1].long()] = False
    return chosen.nonzero().squeeze(1)


def token_log_probabilities(
    stage: Stage, hidden: Tensor, tokens: Tensor, positions: Tensor, temperature: float = 1.0
) -> Tensor:
    """`log p(token at each position | what precedes it)` of the softmax at this temperature, `[n]`, float32.

    hidden `[1, T, H]`, tokens `[1, T]`, positions `[n]`, none the first of its sequence. The head runs on these
    positions only, so a prompt costs no logits; see `scoring`.
    """
    return _score(stage, hidden, tokens, positions, temperature, with_entropy=False)[0]


def log_probabilities_and_entropy(
    stage: Stage, hidden: Tensor, tokens: Tensor, positions: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As `token_log_probabilities`, and the entropy of the same softmax (no gradient). Both `[n]`, float32."""
    log_probabilities, entropy = _score(stage, hidden, tokens, positions, temperature, with_entropy=True)
    assert entropy is not None, "asked for"
    return log_probabilities, entropy


def zero_connected(hidden: Tensor) -> Tensor:
    """The loss of a microbatch with nothing to learn: a zero, through which gradients of zero still flow."""
    return torch.zeros((), device=hidden.device) * hidden.sum()


def _score(
    stage: Stage, hidden: Tensor, tokens: Tensor, positions: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    before, num_words = hidden[:, positions - 1], stage.config.get_text_config().vocab_size  # [1, n, H]
    return score(stage.logits, before, tokens[0, positions], num_words, temperature, with_entropy)
