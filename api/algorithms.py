"""Settings of the algorithms that graphs name: what an experiment compiles its hyper-parameters to."""

from __future__ import annotations

from enum import StrEnum

from pydantic import NonNegativeFloat, PositiveFloat

from .record import record
from .sampling import Sampling


class KLEstimator(StrEnum):
    """Estimators of KL(policy || reference) from one token's log-probabilities (Schulman 2020, "Approximating KL")."""

    K1 = "k1"
    """log(p / r): unbiased, may be negative."""
    K2 = "k2"
    """log(p / r)^2 / 2: biased, low variance, and its gradient is that of the KL."""
    K3 = "k3"
    """r / p - 1 - log(r / p): unbiased, never negative (GRPO's choice)."""


class LossNormalisation(StrEnum):
    """What a minibatch's policy loss is a mean over."""

    TOKEN = "token"
    """All response tokens of the minibatch alike (DAPO, arXiv 2503.14476, eq. 8)."""
    SEQUENCE = "sequence"
    """Responses alike, each the mean over its tokens (GRPO, arXiv 2402.03300, eq. 3)."""


@record
class SupervisedLoss:
    """See `workers/algorithms/sft.py`."""


@record
class PolicyLoss:
    """See `workers/algorithms/grpo.py`."""

    clip_low: NonNegativeFloat
    clip_high: NonNegativeFloat
    kl_coefficient: NonNegativeFloat
    kl_estimator: KLEstimator
    normalisation: LossNormalisation
    temperature: PositiveFloat
    """Of the sampling: log-probabilities are those of the distribution that was sampled from."""


@record
class LogProbabilities:
    """Inference that adds a key with the log-probability of each response token, and 0 elsewhere."""

    output: str
    """The key's name."""
    temperature: PositiveFloat


@record
class Generation:
    """Responses to prompts; see `workers/pipeline/generation.py`."""

    sampling: Sampling


AlgorithmSettings = SupervisedLoss | PolicyLoss | LogProbabilities | Generation
