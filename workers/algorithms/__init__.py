"""Losses, by the names that graphs give them."""

from __future__ import annotations

from .base import Algorithm
from .sft import SupervisedFineTuning

ALGORITHMS: dict[str, Algorithm] = {"sft": SupervisedFineTuning()}
