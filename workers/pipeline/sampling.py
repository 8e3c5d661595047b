"""Choosing tokens: from logits and one uniform number each, a token and its log-probability. Pure.

Randomness comes from outside, as numbers that are a function of seed, sequence and position. A row's choice depends on
its own logits and number alone, so batches and layouts change a response no more than they change its logits.

Shapes: n rows, V vocabulary size, m new tokens at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...api.sampling import Sampling


def sample(
    logits: Tensor,
    uniforms: Tensor | None,
    sampling: Sampling,
    forbidden: Tensor | None = None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A token for each row, and its log-probability.

    logits [n, V]; uniforms [n] float32 in [0, 1), one for each row, or None at temperature 0; forbidden [any] int64,
    tokens that must not be chosen now; held [n] bool, the rows for which this holds, or None for all. -> [n] int64,
    [n] float32.

    The log-probability is of the token under the softmax of all logits over the temperature (of the logits alone at
    temperature 0), whatever was forbidden or cut off: what a trainer computes again. Draws are by inverse CDF, in the
    order of token ids.
    """
    scores = logits.float()
    if sampling.temperature not in (0.0, 1.0):
        scores = scores / sampling.temperature
    allowed = scores if forbidden is None else scores.index_fill(1, forbidden, float("-inf"))
    if held is not None:
        allowed = allowed.where(held[:, None], scores)
    if sampling.temperature == 0.0:
        tokens = allowed.argmax(-1, keepdim=True)  # [n, 1]
    else:
        assert uniforms is not None, "sampling at a temperature takes one number a row"
        weights = _cut_off(allowed.softmax(-1), sampling)
        cumulative = weights.cumsum(-1)
        total = cumulative[:, -1:]
        # below the total, so that rounding cannot choose past the last token of any weight
        target = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, target, right=True)
        tokens = tokens.clamp_(max=logits.shape[1] - 1)  # logits that are no numbers
    logprobs = scores.gather(1, tokens)[:, 0] - scores.logsumexp(-1)
    return tokens[:, 0], logprobs


def _cut_off(weights: Tensor, sampling: Sampling) -> Tensor:
    """Zero for the tokens that top-k and top-p leave out. weights [n, V], summing to 1 -> [n, V], not normalised.

    By a threshold on weights, so that tokens of equal weight stay or go together.
    """
    num_tokens = weights.shape[1]
    num_kept = num_tokens if sampling.top_k is None else min(sampling.top_k, num_tokens)
    if num_kept == num_tokens and sampling.top_p == 1.0:
        return weights
    if sampling.top_p == 1.0:
        likeliest = weights.topk(num_kept).values  # [n, k], from the likeliest down
        return weights.where(weights >= likeliest[:, -1:], 0.0)
    likeliest = weights.topk(num_kept).values if num_kept < num_tokens else weights.sort(descending=True).values
    weights = weights.where(weights >= likeliest[:, -1:], 0.0)
    before = likeliest.cumsum(-1) - likeliest  # of all likelier tokens
    num_before = (before < sampling.top_p * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    last = (num_before - 1).clamp_(min=0)  # logits that are no numbers
    return weights.where(weights >= likeliest.gather(1, last), 0.0)


def uniforms(seed: int, sequences: Sequence[str], num_tokens: int) -> Tensor:
    """[n, m] float32 in [0, 1), on the CPU: row i holds the numbers of `sequences[i]`, one for each new token.

    A function of seed, sequence and position only: 24 bits each of SHAKE-128 (FIPS 202) of the first two, so a longer
    row begins with a shorter one.
    """
    digests = b"".join(hashlib.shake_128(f"{seed}/{each}".encode()).digest(4 * num_tokens) for each in sequences)
    bits = np.frombuffer(digests, dtype="<u4").reshape(len(sequences), num_tokens) >> 8
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))
