"""Advantages: how a response compares with the others of its group.

With rewards R_1..R_G of a group's responses, A_i = R_i - mean(R), and, if normalised, A_i / std(R), where
std(R)^2 = sum_i (R_i - mean(R))^2 / (G - 1)        (GRPO, arXiv 2402.03300, section 4.1.2; without std: Dr. GRPO)

A group whose rewards are all alike teaches nothing: its advantages are 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...api.rewards import group_of

ROUNDING = 1e-9
"""Rewards that differ by no more than this part of the largest are alike."""


def group_advantages(rewards: Mapping[str, float], normalise_by_std: bool) -> tuple[dict[str, float], set[str]]:
    """From rewards by sequence: advantages by sequence, and the groups whose rewards are all alike."""
    groups: dict[str, list[str]] = {}
    for sequence in rewards:
        groups.setdefault(group_of(sequence), []).append(sequence)
    advantages: dict[str, float] = {}
    alike: set[str] = set()
    for group, sequences in groups.items():
        values = np.array([rewards[sequence] for sequence in sequences])
        if np.ptp(values) <= ROUNDING * np.abs(values).max():
            alike.add(group)
            advantages.update(dict.fromkeys(sequences, 0.0))
            continue
        difference = values - values.mean()
        if normalise_by_std:
            difference = difference / values.std(ddof=1)
        advantages.update(zip(sequences, difference.tolist(), strict=True))
    return advantages, alike
