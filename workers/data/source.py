"""A dataset as an endless stream of sequences, read and checked as a whole before training starts.

Pass p of a dataset of N sequences fills positions `p*N ... (p+1)*N - 1` of the stream, in an order drawn from
(seed, p) alone. So a batch follows from its position, and a resumed run needs only that number.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...api.config import Dataset
from ...api.errors import DataError
from ...api.json_lines import read_json_lines
from .tokenization import encode_prompts, encode_rows

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 1000
"""Rows that are tokenised together."""


@dataclass(frozen=True, slots=True)
class SourceSequence:
    """One sequence of the stream."""

    id: str
    keys: dict[str, Tensor]
    """`tokens` (`[T]`, int64) and `loss_mask` (`[T]`, bool); of a prompt, `prompt` (`[T]`, int64)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sequence may be."""

    tokens: int
    """Its greatest length."""
    vocabulary: int
    """Tokens are below this."""
    bound: str
    """What makes the greatest length so, for errors: "1024 is the context of actor"."""


class SequenceSource:
    """Reads `dataset` at construction. `name` (`dataset`, `evaluation`) is its field in the experiment, and in ids.

    A row gives one sequence or, if `prompts_each` is set, that many copies of its prompt, to be answered.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        seed: int,
        prompts_each: int | None = None,
    ) -> None:
        self.name, self._dataset, self._seed, self._prompts_each = name, dataset, seed, prompts_each
        self._rows = _encoded_rows(dataset, tokenizer, f"{name}.path", has_answers=prompts_each is None)
        self.lengths = np.asarray(self._rows["length"], dtype=np.int64)
        self._order: tuple[int, np.ndarray] | None = None
        longest = int(self.lengths.argmax())
        self._check(longest, limits)
        self.longest_id = self._id(0, longest)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, start: int, count: int) -> list[SourceSequence]:
        """The sequences of the rows at stream positions `start ... start + count - 1`."""
        return [
            sequence
            for position in range(start, start + count)
            for sequence in self._read(*divmod(position, len(self)))
        ]

    def row(self, sequence: str) -> dict[str, Any]:  # Any: a JSON object of the user's
        """The row that a sequence of this id came from."""
        row: dict[str, Any] = json.loads(self._rows[int(sequence.split("/")[2])]["row"])
        return row

    def _check(self, longest: int, limits: Limits) -> None:
        field, path = f"{self.name}.path", self._dataset.path
        if self.lengths[longest] > limits.tokens:
            is_answered = self._prompts_each is not None
            raise DataError(
                field,
                f"{path}:{self._rows[longest]['line']}",
                f"this sequence has {self.lengths[longest]} tokens, over the limit of {limits.tokens} "
                f"({limits.bound}{', less sampling.max_new_tokens' if is_answered else ''})",
                "shorten or remove the row, "
                + ("lower sampling.max_new_tokens, " if is_answered else "")
                + "raise microbatch_tokens, or take a model with a longer context",
            )
        highest = np.asarray(self._rows["highest_token"])
        outside = np.flatnonzero(highest >= limits.vocabulary)
        if len(outside):
            raise DataError(
                field,
                f"{path}:{self._rows[int(outside[0])]['line']}",
                f"this row has token {highest[outside[0]]}, and the model's vocab_size is {limits.vocabulary}",
                "use the tokenizer that belongs to the model, or raise vocab_size",
            )

    def _read(self, number: int, place: int) -> list[SourceSequence]:
        index = self._index(number, place)
        row = self._rows[index]
        tokens = torch.tensor(row["tokens"], dtype=torch.int64)
        if self._prompts_each is None:
            keys = {"tokens": tokens, "loss_mask": torch.tensor(row["loss_mask"], dtype=torch.bool)}
            return [SourceSequence(self._id(number, index), keys)]
        return [SourceSequence(self._id(number, index, copy), {"prompt": tokens}) for copy in range(self._prompts_each)]

    def _id(self, number: int, index: int, attempt: int = 0) -> str:
        return f"{self.name}/{number}/{index}/{attempt}"  # source, pass, index, attempt

    def _index(self, number: int, place: int) -> int:
        if not self._dataset.shuffle:
            return place
        if self._order is None or self._order[0] != number:
            entropy = hashlib.sha256(f"{self._seed}/{self.name}/{number}".encode()).digest()
            generator = np.random.Generator(np.random.Philox(int.from_bytes(entropy[:16], "big")))
            self._order = number, generator.permutation(len(self))
        return int(self._order[1][place])


def _encoded_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, field: str, has_answers: bool
) -> datasets.Dataset:
    """Rows with `tokens`, `loss_mask`, `length`, `highest_token`, their 1-based `line` and their JSON, in memory."""
    import datasets

    parts = []
    rows = read_json_lines(dataset, field, has_answers)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        lines = [line for line, _ in chunk]
        where = [f"{dataset.path}:{line}" for line in lines]
        encode = encode_rows if has_answers else encode_prompts
        encoded = encode([row for _, row in chunk], dataset, tokenizer, where)
        for at, sequence in zip(where, encoded, strict=True):
            if has_answers and not any(sequence.loss_mask[1:]):
                raise DataError(field, at, "this row has no token to learn", "correct or remove the row")
            if not sequence.tokens:
                raise DataError(field, at, "this row's prompt has no token", "correct or remove the row")
        columns = {
            "tokens": [sequence.tokens for sequence in encoded],
            "loss_mask": [sequence.loss_mask for sequence in encoded],
            "length": [len(sequence.tokens) for sequence in encoded],
            "highest_token": [max(sequence.tokens) for sequence in encoded],
            "line": lines,
            "row": ["" if has_answers else json.dumps(row) for _, row in chunk],
        }
        parts.append(datasets.Dataset.from_dict(columns))
    return datasets.concatenate_datasets(parts)
