"""Losses and scores, by their settings."""

from __future__ import annotations

from ...api.algorithms import AlgorithmSettings, LogProbabilities, PolicyLoss, SupervisedLoss
from .base import InferenceAlgorithm, TrainingAlgorithm
from .grpo import GroupRelativePolicy, ResponseLogProbabilities
from .sft import SupervisedFineTuning


def training_algorithm(settings: AlgorithmSettings) -> TrainingAlgorithm:
    """What a `train_step` with these settings runs."""
    match settings:
        case SupervisedLoss():
            return SupervisedFineTuning()
        case PolicyLoss():
            return GroupRelativePolicy(settings)
        case _:
            raise AssertionError(f"no recipe trains by {type(settings).__name__}")


def inference_algorithm(settings: AlgorithmSettings) -> InferenceAlgorithm:
    """What an `inference` with these settings runs."""
    match settings:
        case SupervisedLoss():
            return SupervisedFineTuning()
        case LogProbabilities():
            return ResponseLogProbabilities(settings)
        case _:
            raise AssertionError(f"no recipe infers by {type(settings).__name__}")
