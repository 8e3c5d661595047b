"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), with DAPO's decoupled clip (arXiv 2503.14476).

For response i with tokens o^i_t, t = 1..n_i, of a minibatch, with the policy p that is trained, the policy q that
sampled, the reference r, and the advantage A_i of the response in its group (`workers/functions/advantages.py`):

    ratio_it = p(o_it | ...) / q(o_it | ...)
    gain_it  = min( ratio_it A_i,  clip(ratio_it, 1 - clip_low, 1 + clip_high) A_i )        PPO, arXiv 1707.06347, eq. 7
    loss_it  = - gain_it + kl_coefficient * KL(p || r)_it                                   GRPO, eq. 3

    L = sum_it loss_it / sum_i n_i                    normalisation `token`
    L = sum_i ( sum_t loss_it / n_i ) / sum_i 1       normalisation `sequence`

Sums go over the whole minibatch, all data-parallel ranks and microbatches, so that L does not depend on the layout.

KL(p || r) of one token with d = log r - log p:  k1 = -d,  k2 = d^2 / 2,  k3 = exp(d) - 1 - d.

Shapes: T tokens of the packed row, S sequences, n response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from ...api.algorithms import KLEstimator, LogProbabilities, LossNormalisation, PolicyLoss
from ..data.microbatch import Microbatch
from ..models.stage import Stage
from .functional import (
    log_probabilities_and_entropy,
    predicted_positions,
    token_log_probabilities,
    zero_connected,
)
from .statistics import Statistics

MAX_LOG_RATIO = 20.0
"""Log-ratios are bounded by this, so that one far-off token cannot overflow the gradient of all."""


def kl_divergence(log_probabilities: Tensor, reference: Tensor, estimator: KLEstimator) -> Tensor:
    """Per token, from log-probabilities `[n]` of the policy and of the reference."""
    difference = (reference - log_probabilities).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case KLEstimator.K1:
            return -difference
        case KLEstimator.K2:
            return difference.square() / 2
        case KLEstimator.K3:
            return difference.exp() - 1 - difference
        case _:
            assert_never(estimator)


@dataclass(frozen=True, slots=True)
class GroupRelativePolicy:
    """See the module's docstring."""

    settings: PolicyLoss

    def weight(self, microbatch: Microbatch) -> float:
        """Response tokens, or responses."""
        if self.settings.normalisation is LossNormalisation.SEQUENCE:
            return float(len(microbatch.packed.seqlens))
        return float(len(predicted_positions(microbatch.keys["loss_mask"], microbatch.packed)))

    def loss(self, stage: Stage, hidden: Tensor, microbatch: Microbatch, statistics: Statistics) -> Tensor:
        """The summed loss, a scalar."""
        keys, settings = microbatch.keys, self.settings
        positions = predicted_positions(keys["loss_mask"], microbatch.packed)  # [n]
        if len(positions) == 0:
            statistics.add("loss", 0.0, self.weight(microbatch))
            self._record(statistics, *(hidden.new_zeros(0) for _ in range(4)))
            return zero_connected(hidden)
        now, entropy = log_probabilities_and_entropy(stage, hidden, microbatch.tokens, positions, settings.temperature)
        sequence = torch.bucketize(positions, microbatch.packed.cu_seqlens[1:].long(), right=True)  # [n], of S
        advantage = keys["advantage"][sequence]
        log_ratio = now - keys["log_probabilities"][positions]
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        loss = -gain
        kl = torch.zeros_like(loss)
        if settings.kl_coefficient > 0:
            kl = kl_divergence(now, keys["reference_log_probabilities"][positions], settings.kl_estimator)
            loss = loss + settings.kl_coefficient * kl
        is_clipped = (clipped * advantage < ratio * advantage).float()
        self._record(statistics, kl, entropy, is_clipped, -log_ratio)
        if settings.normalisation is LossNormalisation.SEQUENCE:
            lengths = torch.bincount(sequence, minlength=len(microbatch.packed.seqlens))
            loss = loss / lengths[sequence]
        total = loss.sum()
        statistics.add("loss", total, self.weight(microbatch))  # what is minimised, whatever it is a mean over
        return total

    def _record(self, statistics: Statistics, kl: Tensor, entropy: Tensor, clipped: Tensor, drift: Tensor) -> None:
        """Means over response tokens; `sampler_kl` is k1 of the sampling policy against the trained one."""
        statistics.add("entropy", entropy.sum(), len(entropy))
        statistics.add("clip_fraction", clipped.sum(), len(entropy))
        statistics.add("sampler_kl", drift.sum(), len(entropy))
        if self.settings.kl_coefficient > 0:
            statistics.add("kl", kl.sum(), len(entropy))


@dataclass(frozen=True, slots=True)
class ResponseLogProbabilities:
    """Adds `log_probabilities`: float32 `[T]`, of each response token, 0 elsewhere."""

    settings: LogProbabilities

    def infer(self, stage: Stage, hidden: Tensor, microbatch: Microbatch, statistics: Statistics) -> dict[str, Tensor]:
        positions = predicted_positions(microbatch.keys["loss_mask"], microbatch.packed)
        out = torch.zeros(microbatch.num_tokens, device=hidden.device)
        if len(positions):
            temperature = self.settings.temperature
            out[positions] = token_log_probabilities(stage, hidden, microbatch.tokens, positions, temperature)
        return {"log_probabilities": out}
