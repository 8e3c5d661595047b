"""One dataclass a recipe."""

from .answers import AnswerEvaluation
from .grpo import GRPO
from .sft import SFT

__all__ = ["GRPO", "SFT", "AnswerEvaluation"]
