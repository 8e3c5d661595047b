"""Trainmaster: a master and model workers that post-train language models.

    from trainmaster import SFT, Model, Dataset

Names are looked up on first use (PEP 562), so that importing the package costs nothing and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api.algorithms import KLEstimator, LossNormalisation
    from .api.config import (
        Dataset,
        Deadlines,
        Layout,
        LoRA,
        Model,
        NaNPolicy,
        Optimizer,
        ParameterGroup,
        Precision,
        RateSchedule,
        Recompute,
        RunOptions,
        Schedule,
    )
    from .api.experiments.answers import AnswerEvaluation
    from .api.experiments.grpo import GRPO
    from .api.experiments.sft import SFT
    from .api.rewards import OnFailure, Reward
    from .api.sampling import Sampling

__version__ = "0.1.0"

_HOME = {
    "SFT": "api.experiments.sft",
    "GRPO": "api.experiments.grpo",
    "AnswerEvaluation": "api.experiments.answers",
    "Dataset": "api.config",
    "Deadlines": "api.config",
    "KLEstimator": "api.algorithms",
    "Layout": "api.config",
    "LoRA": "api.config",
    "LossNormalisation": "api.algorithms",
    "Model": "api.config",
    "NaNPolicy": "api.config",
    "OnFailure": "api.rewards",
    "Optimizer": "api.config",
    "ParameterGroup": "api.config",
    "Precision": "api.config",
    "RateSchedule": "api.config",
    "Recompute": "api.config",
    "Reward": "api.rewards",
    "RunOptions": "api.config",
    "Sampling": "api.sampling",
    "Schedule": "api.config",
}
__all__ = [
    "GRPO",
    "SFT",
    "AnswerEvaluation",
    "Dataset",
    "Deadlines",
    "KLEstimator",
    "Layout",
    "LoRA",
    "LossNormalisation",
    "Model",
    "NaNPolicy",
    "OnFailure",
    "Optimizer",
    "ParameterGroup",
    "Precision",
    "RateSchedule",
    "Recompute",
    "Reward",
    "RunOptions",
    "Sampling",
    "Schedule",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'trainmaster' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
