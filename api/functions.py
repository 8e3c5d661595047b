"""Function calls of a graph: a reward, and the advantages that follow from it."""

from __future__ import annotations

from .record import record
from .rewards import Reward


@record
class RewardFunction:
    """Scores responses; if asked to, compares each with its group. See `workers/functions/advantages.py`."""

    reward: Reward
    has_advantages: bool = True
    """Whether to add the key `advantage`; an evaluation does not."""
    normalise_by_std: bool = True
    """Whether advantages are divided by their group's standard deviation."""
    drop_zero_variance: bool = False
    """Whether groups whose rewards are all alike leave the batch."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Keys, by its own names, as of an algorithm's settings."""
        return "tokens", "loss_mask"

    @property
    def writes(self) -> tuple[str, ...]:
        return ("reward", "advantage") if self.has_advantages else ("reward",)
