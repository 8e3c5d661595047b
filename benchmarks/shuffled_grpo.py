"""The demo's GRPO with its rewards shuffled over the step's responses: a control, from which nothing can be learnt.

trainmaster run benchmarks/shuffled_grpo.py --actor.path CHECKPOINT
"""

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "arithmetic"))

import grpo
from trainmaster import Reward
from trainmaster.api.rewards import exact_match


def shuffled_match(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Sequence[float]:
    """As many right answers as there are, handed to responses by lot."""
    scores = list(map(exact_match, prompts, responses, rows))
    random.Random(" ".join(responses)).shuffle(scores)
    return scores


experiment = replace(grpo.experiment, reward=Reward(function="shuffled_match", is_batched=True))
prepare = grpo.prepare
