"""One dataclass a recipe."""

from .sft import SFT

__all__ = ["SFT"]
