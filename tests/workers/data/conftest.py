"""A tokenizer of single characters, in memory."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>"]
CHAT = (
    "{% for message in messages %}{{ message.role[0] | upper }}:{{ message.content }}|{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def make_tokenizer() -> MakeTokenizer:
    """`make_tokenizer(chat_template, closes=True)`: one that writes <bos> and <eos> around a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    def make(chat_template: str | None = CHAT, closes: bool = False, **names: Any) -> PreTrainedTokenizerFast:
        vocabulary = {text: at for at, text in enumerate([*SPECIAL, *CHARACTERS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(SPECIAL)
        if closes:
            pieces = [("<bos>", 3), ("<eos>", 1)]
            tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=pieces)
        names = {"eos_token": "<eos>", **names}
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **names)
        made.chat_template = chat_template
        return made

    return make
