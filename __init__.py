"""Trainmaster: a master and model workers that post-train language models.

    from trainmaster import SFT, Model, Dataset

Names are looked up on first use (PEP 562), so that importing the package costs nothing and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api.config import Dataset, Deadlines, Layout, Model, Optimizer, RunOptions
    from .api.experiments.sft import SFT

__version__ = "0.1.0"

_HOME = {
    "SFT": "api.experiments.sft",
    "Dataset": "api.config",
    "Deadlines": "api.config",
    "Layout": "api.config",
    "Model": "api.config",
    "Optimizer": "api.config",
    "RunOptions": "api.config",
}
__all__ = ["SFT", "Dataset", "Deadlines", "Layout", "Model", "Optimizer", "RunOptions"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'trainmaster' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
