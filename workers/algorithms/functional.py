"""Formulas that algorithms share, on packed rows: T tokens, S sequences, n chosen positions, V words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.attention import PackedBatch
from ..models.stage import Stage


def predicted_positions(mask: Tensor, packed: PackedBatch) -> Tensor:
    """Positions `[n]` where `mask` (`[T]`) is set and a token can be predicted: never the first of a sequence."""
    chosen = mask.clone()
    chosen[packed.cu_seqlens[:-1].long()] = False
    return chosen.nonzero().squeeze(1)


def token_log_probabilities(stage: Stage, hidden: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """`log p(token at each position | what precedes it)`, `[n]`, float32.

    hidden `[1, T, H]`, tokens `[1, T]`, positions `[n]`, none the first of its sequence. The head runs on these
    positions only, so a prompt costs no logits.
    """
    before = hidden[:, positions - 1]  # [1, n, H]
    logits = stage.logits(before)[0].float()  # [n, V]
    return -F.cross_entropy(logits, tokens[0, positions], reduction="none")


def chosen_log_probabilities(
    stage: Stage, hidden: Tensor, tokens: Tensor, positions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `token_log_probabilities`, of the softmax at this temperature, and the entropy of that softmax (no gradient).

    Both `[n]`, float32.
    """
    logits = stage.logits(hidden[:, positions - 1])[0].float() / temperature  # [n, V]
    log_probabilities = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return log_probabilities.gather(-1, tokens[0, positions, None]).squeeze(-1), entropy


def zero_connected(hidden: Tensor) -> Tensor:
    """The loss of a microbatch with nothing to learn: a zero, through which gradients of zero still flow."""
    return torch.zeros((), device=hidden.device) * hidden.sum()
