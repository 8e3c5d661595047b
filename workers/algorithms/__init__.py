"""Losses and scores, by the names that graphs give them."""

from __future__ import annotations

from .base import InferenceAlgorithm, TrainingAlgorithm
from .sft import SupervisedFineTuning

TRAINING: dict[str, TrainingAlgorithm] = {"sft": SupervisedFineTuning()}
INFERENCE: dict[str, InferenceAlgorithm] = {"sft": SupervisedFineTuning()}
