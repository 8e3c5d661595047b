"""Settings of the algorithms that graphs name: what an experiment compiles its hyper-parameters to.

Each says which keys its algorithm `reads` and `writes`, by the algorithm's own names; a call may read fewer than it has
and keep fewer than are written, and may know them by other names (its remaps).
"""

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

    @property
    def reads(self) -> tuple[str, ...]:
        return "tokens", "loss_mask"

    @property
    def writes(self) -> tuple[str, ...]:
        return ()


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

    @property
    def reads(self) -> tuple[str, ...]:
        keys = ("tokens", "loss_mask", "log_probabilities", "advantage")
        return (*keys, "reference_log_probabilities") if self.kl_coefficient > 0 else keys

    @property
    def writes(self) -> tuple[str, ...]:
        return ()


@record
class LogProbabilities:
    """Inference that adds the log-probability of each response token, and 0 elsewhere."""

    temperature: PositiveFloat

    @property
    def reads(self) -> tuple[str, ...]:
        return "tokens", "loss_mask"

    @property
    def writes(self) -> tuple[str, ...]:
        return ("log_probabilities",)


@record
class Generation:
    """Responses to prompts; see `workers/pipeline/generation.py`."""

    sampling: Sampling

    @property
    def reads(self) -> tuple[str, ...]:
        return ("prompt",)

    @property
    def writes(self) -> tuple[str, ...]:
        return "tokens", "loss_mask", "log_probabilities", "versions"


AlgorithmSettings = SupervisedLoss | PolicyLoss | LogProbabilities | Generation
