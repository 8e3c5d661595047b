"""Function calls on the data worker: responses to text, text to rewards, rewards to advantages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...api.batch import Samples
from ...api.errors import RewardError
from ...api.graph import FunctionCall
from ...api.remap import input_keys, output_keys
from ...api.rewards import Item, Outcome, apply_policy, group_of
from ...system.rpc.commands import Example, FunctionDone, Mean
from ..data.source import SequenceSource
from ..data.store import Store, describe
from .advantages import group_advantages
from .pool import RewardPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_EXAMPLES = 4
"""Responses of each call that are shown as text."""
NUM_FAILURES = 8


class FunctionRunner:
    """One function call of a graph, with its processes."""

    def __init__(
        self, call: FunctionCall, file: Path, tokenizer: PreTrainedTokenizerBase, source: SequenceSource, store: Store
    ) -> None:
        self._call, self._tokenizer, self._source, self._store = call, tokenizer, source, store
        self._pool = RewardPool(file, call.function.reward)

    def run(self, samples: Samples) -> FunctionDone:
        """Scores every response. Raises `RewardError` if one has no score and the policy is to fail."""
        items = [self._item(sequence) for sequence in samples.ids]
        scored = self._pool.score(items)
        outcome = apply_policy(scored, self._call.function.reward)
        dropped = [item.id for item in items if item.id not in outcome.values]
        statistics = _statistics(outcome, len(items))
        values = {"reward": outcome.values}
        if self._call.function.has_advantages:
            advantages, alike = group_advantages(outcome.values, self._call.function.normalise_by_std)
            values["advantage"] = advantages
            num_groups = len({group_of(sequence) for sequence in outcome.values})
            statistics["zero_variance"] = Mean(total=len(alike), weight=num_groups)
            if self._call.function.drop_zero_variance:
                dropped += [sequence for sequence in outcome.values if group_of(sequence) in alike]
        examples = tuple(
            Example(id=item.id, prompt=item.prompt, response=item.response, reward=outcome.values.get(item.id))
            for item in items[:NUM_EXAMPLES]
        )
        return FunctionDone(
            statistics=statistics,
            outputs=self._keep(values, list(outcome.values)),
            dropped=tuple(dropped),
            failures=tuple(f"{failure.id}: {failure.failure}" for failure in outcome.failures[:NUM_FAILURES]),
            examples=examples,
        )

    def close(self) -> None:
        self._pool.close()

    def _item(self, sequence: str) -> Item:
        keys = input_keys(self._call)
        tokens, mask = (self._store.get(sequence, keys[name]) for name in ("tokens", "loss_mask"))
        return Item(
            id=sequence,
            prompt=self._text(tokens[~mask]),
            response=self._text(tokens[mask]),
            row=self._source.row(sequence),
        )

    def _text(self, tokens: torch.Tensor) -> str:
        return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def _keep(self, values: dict[str, dict[str, float]], ids: list[str]) -> Samples:
        """Puts one number a sequence and declared output into the store, as `[1]`, float32."""
        if not ids:
            return Samples(ids=(), keys={})
        values = {key: values[name] for name, key in output_keys(self._call).items()}
        tensors = {key: [torch.tensor([numbers[sequence]]) for sequence in ids] for key, numbers in values.items()}
        for key, column in tensors.items():
            for sequence, tensor in zip(ids, column, strict=True):
                if not tensor.isfinite():
                    value = values[key][sequence]
                    raise RewardError(
                        f"sample {sequence}: its {key} {value:g} is beyond float32. Scale the reward down"
                    )
                self._store.put(sequence, key, tensor)
        return describe(tensors, ids)


def _statistics(outcome: Outcome, num_items: int) -> dict[str, Mean]:
    rewards = outcome.values.values()
    return {
        "reward": Mean(total=sum(rewards), weight=len(rewards)),
        "failures": Mean(total=len(outcome.failures), weight=num_items),
    }
