"""One dataclass a recipe."""

from .grpo import GRPO, GRPOEvaluation
from .sft import SFT

__all__ = ["GRPO", "SFT", "GRPOEvaluation"]
