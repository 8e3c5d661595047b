import re
from pathlib import Path

import pytest
from trainmaster.api.config import Dataset
from trainmaster.api.errors import ConfigError, DataError
from trainmaster.workers.data.tokenization import Encoded, check_reload, encode_rows, load_tokenizer

WHERE = "rows.jsonl:7"
PAIR, CHAT = Dataset(path="rows.jsonl"), Dataset(path="rows.jsonl", messages="messages")


def encode_row(row: dict[str, object], dataset: Dataset, tokenizer, where: str) -> Encoded:
    (encoded,) = encode_rows([row], dataset, tokenizer, [where])
    return encoded


def turns(*contents: str, **more: object) -> dict[str, object]:
    """A chat in which user and assistant take turns."""
    return {
        "messages": [
            {"role": "user" if at % 2 == 0 else "assistant", "content": content, **more}
            for at, content in enumerate(contents)
        ]
    }


def text_of(encoded: Encoded, tokenizer, has_loss: bool | None = None) -> str:
    """The text of all tokens, or of those with or without loss."""
    assert len(encoded.tokens) == len(encoded.loss_mask)
    chosen = [
        token
        for token, mask in zip(encoded.tokens, encoded.loss_mask, strict=True)
        if has_loss is None or mask is has_loss
    ]
    return "".join(tokenizer.convert_ids_to_tokens(chosen))


# -- prompt and answer ------------------------------------------------------------------------------------------------


def test_loss_is_on_the_answer_and_its_end(make_tokenizer):
    tokenizer = make_tokenizer()
    encoded = encode_row({"prompt": "1+2=", "answer": "3."}, PAIR, tokenizer, WHERE)
    assert text_of(encoded, tokenizer) == "1+2=3.<eos>"
    assert encoded.loss_mask == [False] * 4 + [True] * 3


def test_the_separator_belongs_to_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer()
    dataset = Dataset(path="rows.jsonl", prompt="q", answer="a", separator="\n")
    encoded = encode_row({"q": "x", "a": "y", "prompt": "no", "answer": "no"}, dataset, tokenizer, WHERE)
    assert text_of(encoded, tokenizer, has_loss=False) == "x\n"
    assert text_of(encoded, tokenizer, has_loss=True) == "y<eos>"


def test_without_an_end_of_sequence_token_there_is_no_end(make_tokenizer):
    tokenizer = make_tokenizer(eos_token=None)
    assert tokenizer.eos_token_id is None
    encoded = encode_row({"prompt": "x", "answer": "y"}, PAIR, tokenizer, WHERE)
    assert text_of(encoded, tokenizer) == "xy"


def test_what_a_tokenizer_writes_around_a_text_stands_around_the_sequence(make_tokenizer):
    tokenizer = make_tokenizer(closes=True)
    encoded = encode_row({"prompt": "x", "answer": "y"}, PAIR, tokenizer, WHERE)
    assert text_of(encoded, tokenizer) == "<bos>xy<eos>"
    assert encoded.loss_mask == [False, False, True, True]


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        ({"prompt": 3, "answer": "y"}, "prompt", "3"),
        ({"prompt": "x", "answer": None}, "answer", "None"),
        ({"prompt": "x"}, "answer", "None"),
        ({"prompt": ["x"], "answer": "y"}, "prompt", r"\['x'\]"),
    ],
)
def test_a_field_that_is_no_text_is_named(make_tokenizer, row: dict[str, object], field: str, value: str):
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7, field {field} = {value}: must be a text\. Correct the row"):
        encode_row(row, PAIR, make_tokenizer(), WHERE)


@pytest.mark.parametrize("closes", [False, True])
def test_rows_together_are_the_same_as_each_alone(make_tokenizer, closes: bool):
    tokenizer = make_tokenizer(closes=closes)
    pairs = [{"prompt": "x" * at, "answer": "y" * (5 - at)} for at in range(6)]
    chats = [turns("hi", "yes"), turns("hi", "yes", "more", "no"), turns("a", "b", "c")]
    for rows, dataset in ((pairs, PAIR), (chats, CHAT)):
        alone = [encode_row(row, dataset, tokenizer, WHERE) for row in rows]
        assert encode_rows(rows, dataset, tokenizer, [WHERE] * len(rows)) == alone


def test_of_rows_together_the_bad_one_is_named(make_tokenizer):
    rows = [{"prompt": "x", "answer": "y"}, {"prompt": "x", "answer": 3}]
    with pytest.raises(DataError, match=r"^second, field answer = 3: must be a text"):
        encode_rows(rows, PAIR, make_tokenizer(), ["first", "second"])


# -- chat -------------------------------------------------------------------------------------------------------------


def test_loss_is_on_the_assistants_turns_alone(make_tokenizer):
    tokenizer = make_tokenizer()
    encoded = encode_row(turns("hi", "yes", "more", "no"), CHAT, tokenizer, WHERE)
    assert text_of(encoded, tokenizer) == "U:hi|A:yes|U:more|A:no|"
    assert text_of(encoded, tokenizer, has_loss=True) == "yes|no|"
    assert text_of(encoded, tokenizer, has_loss=False) == "U:hi|A:U:more|A:"


def test_what_follows_the_last_assistants_turn_is_left_out(make_tokenizer):
    tokenizer = make_tokenizer()
    encoded = encode_row(turns("hi", "yes", "more"), CHAT, tokenizer, WHERE)
    assert text_of(encoded, tokenizer) == "U:hi|A:yes|"


def test_a_chat_template_writes_its_own_special_tokens(make_tokenizer):
    template = (
        "<bos>{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}"
    )
    tokenizer = make_tokenizer(template, closes=True)
    encoded = encode_row(turns("hi", "yes"), CHAT, tokenizer, WHERE)
    assert text_of(encoded, tokenizer) == "<bos>hiyes<eos>"
    assert text_of(encoded, tokenizer, has_loss=True) == "yes<eos>"


def test_a_messages_other_keys_are_there_for_the_template(make_tokenizer):
    template = (
        "{% for message in messages %}{{ message.content }}{% if 'name' in message %}!{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    assert text_of(encode_row(turns("a", "b"), CHAT, tokenizer, WHERE), tokenizer) == "ab"
    assert text_of(encode_row(turns("a", "b", name="n"), CHAT, tokenizer, WHERE), tokenizer) == "a!b!"


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    template = (
        "{% for message in messages %}{{ message.role[0] | upper }}:"
        "{% if message.role == 'assistant' and not loop.last %}-{% else %}{{ message.content }}{% endif %}|"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    assert text_of(encode_row(turns("hi", "yes"), CHAT, tokenizer, WHERE), tokenizer) == "U:hi|A:yes|"
    with pytest.raises(
        DataError, match=r"rows\.jsonl:7, message 3 = .*: the tokenizer's chat template rewrites earlier turns.* Use a"
    ):
        encode_row(turns("hi", "yes", "more", "no"), CHAT, tokenizer, WHERE)


def test_a_template_that_refuses_a_chat_is_a_data_error_of_its_row(make_tokenizer):
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"rows\.jsonl:7.*roles must alternate"):
        encode_row(turns("hi", "yes"), CHAT, tokenizer, WHERE)


def test_a_tokenizer_without_a_chat_template_is_a_config_error(make_tokenizer):
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        encode_row(turns("hi", "yes"), CHAT, make_tokenizer(None), WHERE)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hi",
        [3],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "assistant", "content": 3}],
        [{"role": "assistant", "content": None}],
    ],
)
def test_a_chat_that_is_no_list_of_messages_is_named(make_tokenizer, messages: object):
    shown = re.escape(repr(messages))
    with pytest.raises(DataError, match=rf"rows\.jsonl:7, field messages = {shown}: must be a list of .*Correct the"):
        encode_row({"messages": messages}, CHAT, make_tokenizer(), WHERE)


@pytest.mark.parametrize("row", [turns("hi"), {"messages": []}])
def test_a_chat_without_an_assistant_is_named(make_tokenizer, row: dict[str, object]):
    with pytest.raises(DataError, match=r"rows\.jsonl:7, field messages = .* has no assistant's turn to learn\. Add o"):
        encode_row(row, CHAT, make_tokenizer(), WHERE)


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_read_from_its_directory(make_tokenizer, tmp_path: Path):
    make_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    loaded = load_tokenizer(tmp_path / "tokenizer", "model.tokenizer")
    encoded = encode_row({"prompt": "x", "answer": "y"}, PAIR, loaded, WHERE)
    assert text_of(encoded, loaded) == "xy<eos>"


def test_a_directory_without_a_tokenizer_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"(?s)model\.tokenizer = '.*': no tokenizer can be read there: .* Name a"):
        load_tokenizer(tmp_path, "model.tokenizer")


def test_a_tokenizer_that_a_checkpoint_would_not_bring_back_is_refused(make_tokenizer):
    from transformers import AutoConfig

    tokenizer = make_tokenizer()
    check_reload(tokenizer, AutoConfig.for_model("qwen3"), "model.tokenizer")
    with pytest.raises(
        ConfigError, match=r"model\.tokenizer = .*'qwen2', transformers reads this tokenizer as Qwen2Tok"
    ):
        check_reload(tokenizer, AutoConfig.for_model("qwen2"), "model.tokenizer")
