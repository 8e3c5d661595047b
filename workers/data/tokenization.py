"""Rows to sequences: tokens in segments, each with or without loss. Tokens are never re-tokenised afterwards.

prompt and answer    [prompt + separator | no loss] [answer + end-of-sequence | loss]
chat                 [up to the assistant's turn | no loss] [its turn | loss] [...]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ...api.config import Dataset
from ...api.errors import ConfigError, DataError
from ...api.json_lines import Row

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


PANEL = (
    "The quick brown fox doesn't jump over 13 lazy dogs.",
    "12+34=46, 3.14 * 2 = 6.28; 1,000,000",
    "def f(x):\n    return x ** 2\n\n\n# end\t of  text",
    "Ünïcödé 你好 привет 🙂",
)
"""Texts on which two tokenizers are compared."""


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


def check_reload(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, field: str) -> None:
    """A checkpoint must bring the tokenizer that it was trained with.

    Beside a config.json of some model types, transformers reads a tokenizer as that type's own class, which cuts text
    in another way. Raises `ConfigError` if this one would come back so.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reloaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in PANEL:
        if reloaded(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ConfigError(
                field,
                tokenizer.name_or_path,
                f"beside a config.json of model type {config.model_type!r}, transformers reads this tokenizer as "
                f"{type(reloaded).__name__} and cuts text differently: a checkpoint would not tokenise as in training",
                "use a tokenizer of the model's own class, or another model type (for a new model, qwen3 or llama)",
            )


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, num_words: int, field: str, reader: str, stop_tokens: Collection[str] = ()
) -> None:
    """The model `reader`, of `num_words` tokens, must know every token of the tokenizer of the model `field`.

    A special token that begins or ends nothing may be beyond (the tokenizer of gemma3's text models has one more, for
    images): a row that has it is refused by itself. Raises `ConfigError`.
    """
    vocabulary = tokenizer.get_vocab()
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    used |= {vocabulary.get(token) for token in stop_tokens}
    aside = _special(tokenizer) - used
    highest, text = max((at, text) for text, at in vocabulary.items() if at not in aside)
    if highest >= num_words:
        raise ConfigError(
            f"{field}.tokenizer",
            tokenizer.name_or_path,
            f"its highest token is {highest} ({text!r}), and {reader} has a vocab_size of {num_words}: tokens 0 to "
            f"{num_words - 1}",
            f"use the tokenizer that belongs to the model, or, for a new model, raise {reader}.config.vocab_size to "
            f"{highest + 1} or more",
        )


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, field: str, of_other: str
) -> None:
    """A number that both know must be the same token in both. Raises `ConfigError` on `field`, the first one's.

    Special tokens may have other names: fine-tuning gives a meaning to reserved ones.
    """
    mine, others = ({at: text for text, at in each.get_vocab().items()} for each in (tokenizer, other))
    for at in sorted(mine.keys() & others.keys() - _special(tokenizer) - _special(other)):
        if mine[at] != others[at]:
            raise ConfigError(
                field,
                tokenizer.name_or_path,
                f"token {at} is {mine[at]!r} here and {others[at]!r} in the tokenizer of {of_other}, whose tokens this "
                "model is to read",
                f"take a model with the same tokenizer as {of_other}",
            )


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    try:
        return {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    except NotImplementedError:  # mistral-common's
        return set(tokenizer.all_special_ids)


def encode_rows(
    rows: Sequence[Row], dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: Sequence[str]
) -> list[Encoded]:
    """Rows as sequences. `where` names each row in errors. Raises `DataError`; `ConfigError` for no chat template."""
    if dataset.messages is not None:
        _check_template(dataset.messages, tokenizer)
        chats = [_chat_segments(row, dataset.messages, tokenizer, at) for row, at in zip(rows, where, strict=True)]
        return _encode(chats, tokenizer, is_chat=True)
    pairs = [
        [
            Segment(_text(row, dataset.prompt, at) + dataset.separator, False),
            Segment(_text(row, dataset.answer, at), True),
        ]
        for row, at in zip(rows, where, strict=True)
    ]
    return _encode(pairs, tokenizer, is_chat=False)


def encode_prompts(
    rows: Sequence[Row], dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: Sequence[str]
) -> list[Encoded]:
    """Rows as prompts to be answered; of a chat, all its messages. Raises as `encode_rows`."""
    if dataset.messages is None:
        texts = [_text(row, dataset.prompt, at) + dataset.separator for row, at in zip(rows, where, strict=True)]
        beginning, ids = _beginning(tokenizer), tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [Encoded([*beginning, *tokens], [False] * (len(beginning) + len(tokens))) for tokens in ids]
    _check_template(dataset.messages, tokenizer)
    texts = [
        _chat(row, dataset.messages, tokenizer, at).render(None, True) for row, at in zip(rows, where, strict=True)
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Encoded(tokens, [False] * len(tokens)) for tokens in ids]


def _check_template(field: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ConfigError(
            "dataset.messages",
            field,
            "the tokenizer has no chat template to render chats with",
            "use the tokenizer of a chat model, or add chat_template.jinja to its directory",
        )


def _encode(rows: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> list[Encoded]:
    """A chat template writes its own special tokens; a plain pair gets the tokenizer's beginning and an end."""
    texts = [segment.text for row in rows for segment in row]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    beginning = [] if is_chat else _beginning(tokenizer)
    end = [] if is_chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for row in rows:
        tokens, loss_mask = list(beginning), [False] * len(beginning)
        for segment in row:
            part = next(ids)
            tokens += part
            loss_mask += [segment.has_loss] * len(part)
        encoded.append(Encoded(tokens + end, loss_mask + [True] * len(end)))
    return encoded


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer writes before every text."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("x", add_special_tokens=True)["input_ids"]
    starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    assert starts, "special tokens stand around a text, not in it"
    return whole[: starts[0]]


@dataclass(frozen=True, slots=True)
class _Chat:
    """The messages of one row, and how they are rendered."""

    messages: list[dict[str, Any]]  # Any: the template's business
    tokenizer: PreTrainedTokenizerBase
    where: str

    def render(self, count: int | None, prompt: bool) -> str:
        """The first `count` messages as text; `prompt` adds what comes before an answer."""
        try:
            text = self.tokenizer.apply_chat_template(
                self.messages[:count], tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, ValueError, IndexError) as error:
            raise DataError(
                self.where,
                self.messages,
                f"the tokenizer's chat template refuses it: {error}",
                "correct the row, or use a template that takes it",
            ) from error
        assert isinstance(text, str), "tokenize=False gives text"
        return text


def _chat(row: Row, field: str, tokenizer: PreTrainedTokenizerBase, where: str) -> _Chat:
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
    return _Chat(messages, tokenizer, f"{where}, field {field}")


def _chat_segments(row: Row, field: str, tokenizer: PreTrainedTokenizerBase, where: str) -> list[Segment]:
    """Cuts the rendered chat at the assistant's turns, by rendering it up to each of them."""
    chat = _chat(row, field, tokenizer, where)
    if not any(message["role"] == "assistant" for message in chat.messages):
        raise DataError(chat.where, chat.messages, "has no assistant's turn to learn", "add one, or drop the row")
    segments, done = [], ""
    for at, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        for upto, has_loss in ((chat.render(at, prompt=True), False), (chat.render(at + 1, prompt=False), True)):
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
