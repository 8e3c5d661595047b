"""Rows to sequences: tokens in segments, each with or without loss. Tokens are never re-tokenised afterwards.

prompt and answer    [prompt + separator | no loss] [answer + end-of-sequence | loss]
chat                 [up to the assistant's turn | no loss] [its turn | loss] [...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...api.config import Dataset
from ...api.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]  # Any: a JSON object of the user's


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text from one source."""

    text: str
    has_loss: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence, before it becomes tensors. Both lists are `[T]`."""

    tokens: list[int]
    loss_mask: list[bool]


def load_tokenizer(path: Path, field: str) -> PreTrainedTokenizerBase:
    """Reads a tokenizer from a Hugging Face directory. Raises `ConfigError` if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            field, str(path), f"no tokenizer can be read there: {error}", "name a directory with tokenizer.json"
        ) from error
    return tokenizer


def encode_row(row: Row, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> Encoded:
    """One row as a sequence. `where` names the row in errors. Raises `DataError`."""
    if dataset.messages is not None:
        return _encode(_chat_segments(row, dataset.messages, tokenizer, where), tokenizer, end=False)
    prompt, answer = _text(row, dataset.prompt, where), _text(row, dataset.answer, where)
    segments = [Segment(prompt + dataset.separator, False), Segment(answer, True)]
    return _encode(segments, tokenizer, end=True)


def _encode(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, end: bool) -> Encoded:
    tokens: list[int] = []
    loss_mask: list[bool] = []
    for at, segment in enumerate(segments):
        # a chat template writes its own special tokens; a plain prompt gets the tokenizer's beginning
        special = end and at == 0
        ids = tokenizer(segment.text, add_special_tokens=special)["input_ids"]
        if special and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers close what they open: the answer goes on here
        tokens += ids
        loss_mask += [segment.has_loss] * len(ids)
    if end and tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
        loss_mask.append(True)
    return Encoded(tokens, loss_mask)


def _chat_segments(row: Row, field: str, tokenizer: PreTrainedTokenizerBase, where: str) -> list[Segment]:
    """Cuts the rendered chat at the assistant's turns, by rendering it up to each of them."""
    messages = row.get(field)
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise DataError(
            f"{where}, field {field}",
            messages,
            'must be a list of {"role": text, "content": text}',
            "correct the row, or name another field by dataset.messages",
        )
    # `datasets` fills keys that a message lacks with None: a template must not see those
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{where}, field {field}", messages, "has no assistant's turn to learn", "add one, or drop the row"
        )

    def render(count: int, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str), "tokenize=False gives text"
        return text

    segments, done = [], ""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for upto, has_loss in ((render(at, prompt=True), False), (render(at + 1, prompt=False), True)):
            if not upto.startswith(done):
                raise DataError(
                    f"{where}, message {at}",
                    upto[: len(done)][-60:],
                    "the tokenizer's chat template rewrites earlier turns, so the turn cannot be cut out",
                    "use a template that only appends",
                )
            segments.append(Segment(upto[len(done) :], has_loss))
            done = upto
    return segments


def _text(row: Row, field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise DataError(
            f"{where}, field {field}",
            value,
            "must be a text",
            "correct the row, or name the fields by prompt and answer",
        )
    return value
