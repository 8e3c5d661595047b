import json
from pathlib import Path

import datasets
import pytest
from trainmaster.api.config import Dataset
from trainmaster.api.errors import DataError
from trainmaster.workers.data.source import Limits, SequenceSource

NUM_ROWS = 12


@pytest.fixture(autouse=True)
def _no_cache_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, [{"prompt": "abc"[: at % 3], "answer": chr(ord("a") + at)} for at in range(NUM_ROWS)])


def source(
    path: Path,
    tokenizer,
    name: str = "dataset",
    seed: int = 0,
    max_tokens: int = 1000,
    vocabulary: int | None = None,
    prompts_each: int | None = None,
    **fields,
) -> SequenceSource:
    words = len(tokenizer) if vocabulary is None else vocabulary
    limits = Limits(tokens=max_tokens, vocabulary=words, bound=f"{max_tokens} is the context of model")
    return SequenceSource(name, Dataset(path=path, **fields), tokenizer, limits, seed, prompts_each)


def places(made: SequenceSource, start: int, count: int) -> list[tuple[int, int]]:
    """(pass, row) of stream positions."""
    parts = [sequence.id.split("/") for sequence in made.read(start, count)]
    assert all(part[0] == made.name and part[3] == "0" for part in parts)
    return [(int(part[1]), int(part[2])) for part in parts]


def test_each_pass_is_a_permutation_of_the_rows(path: Path, make_tokenizer):
    made = source(path, make_tokenizer())
    orders = []
    for number in range(3):
        stretch = places(made, number * NUM_ROWS, NUM_ROWS)
        assert {each[0] for each in stretch} == {number}
        orders.append([each[1] for each in stretch])
        assert sorted(orders[-1]) == list(range(NUM_ROWS))
    assert orders[0] != orders[1]
    assert orders[1] != orders[2]
    assert list(range(NUM_ROWS)) not in orders


def test_the_order_follows_from_the_seed_and_the_position_alone(path: Path, make_tokenizer):
    tokenizer = make_tokenizer()
    whole = places(source(path, tokenizer), 0, 3 * NUM_ROWS)
    other = source(path, tokenizer)
    assert places(other, 25, 5) == whole[25:30]  # later first, across no boundary
    assert places(other, 10, 20) == whole[10:30]  # then back, across two
    assert [each for at in range(3 * NUM_ROWS) for each in places(other, at, 1)] == whole


def test_seed_and_name_change_the_order(path: Path, make_tokenizer):
    tokenizer = make_tokenizer()
    orders = [
        places(source(path, tokenizer, **fields), 0, NUM_ROWS)
        for fields in ({}, {"seed": 1}, {"name": "evaluation"}, {"seed": 10})
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_of_a_seed_does_not_change_between_versions(path: Path, make_tokenizer):
    """A resumed run of another day must go on in the same order."""
    assert [row for _, row in places(source(path, make_tokenizer()), 0, NUM_ROWS)] == [
        7,
        11,
        2,
        8,
        6,
        10,
        1,
        4,
        3,
        9,
        5,
        0,
    ]


def test_without_shuffle_the_order_is_the_files(path: Path, make_tokenizer):
    made = source(path, make_tokenizer(), shuffle=False)
    assert places(made, 0, 2 * NUM_ROWS) == [(number, row) for number in range(2) for row in range(NUM_ROWS)]


def test_a_sequence_has_its_rows_tokens(path: Path, make_tokenizer):
    tokenizer = make_tokenizer()
    made = source(path, tokenizer, shuffle=False)
    (sequence,) = made.read(5, 1)
    assert sequence.id == "dataset/0/5/0"
    assert "".join(tokenizer.convert_ids_to_tokens(sequence.keys["tokens"].tolist())) == "abf<eos>"
    assert sequence.keys["loss_mask"].tolist() == [False, False, True, True]
    assert (str(sequence.keys["tokens"].dtype), str(sequence.keys["loss_mask"].dtype)) == ("torch.int64", "torch.bool")
    assert made.lengths.tolist() == [2 + at % 3 for at in range(NUM_ROWS)]
    assert (len(made), made.longest_id) == (NUM_ROWS, "dataset/0/2/0")


def test_a_sequence_over_the_limit_is_named_by_file_and_line(tmp_path: Path, make_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "aaaa", "answer": "bbb"}\n')
    assert len(source(path, make_tokenizer(), max_tokens=8)) == 2
    with pytest.raises(
        DataError, match=r"dataset\.path = '.*rows\.jsonl:3': this sequence has 8 tokens, over the limit of 7 .*Shorten"
    ):
        source(path, make_tokenizer(), max_tokens=7)


def test_a_prompt_that_leaves_no_room_for_its_response_may_be_cured_by_a_shorter_one(tmp_path: Path, make_tokenizer):
    path = write(tmp_path, [{"prompt": "aaaa", "answer": "b"}])
    with pytest.raises(
        DataError, match=r"4 tokens, .* less sampling\.max_new_tokens\)\. .* lower sampling\.max_new_tok"
    ):
        source(path, make_tokenizer(), max_tokens=-36, prompts_each=2)


def test_a_token_that_the_model_does_not_have_is_named_by_file_and_line(tmp_path: Path, make_tokenizer):
    tokenizer = make_tokenizer()
    highest = tokenizer.convert_tokens_to_ids("z")
    path = write(tmp_path, [{"prompt": "a", "answer": "b"}, {"prompt": "z", "answer": "b"}])
    assert len(source(path, tokenizer, vocabulary=highest + 1)) == 2
    with pytest.raises(
        DataError,
        match=rf"rows\.jsonl:2': this row has token {highest}, and the model's vocab_size is {highest}\. Use the",
    ):
        source(path, tokenizer, vocabulary=highest)


def test_a_row_without_a_token_to_learn_is_named_by_file_and_line(tmp_path: Path, make_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n')
    with pytest.raises(DataError, match=r"dataset\.path = '.*rows\.jsonl:3': this row has no token to learn\. Correct"):
        source(path, make_tokenizer(eos_token=None))


def test_a_lone_first_token_cannot_be_learnt(tmp_path: Path, make_tokenizer):
    """What precedes a token predicts it, and nothing precedes the first."""
    path = write(tmp_path, [{"prompt": "", "answer": "b"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1': this row has no token to learn"):
        source(path, make_tokenizer(eos_token=None))


def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, make_tokenizer):
    path = write(tmp_path, [{"prompt": "a", "answer": "b"}, {"prompt": 3, "answer": "b"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2, field prompt = .*3.*: must be a text"):
        source(path, make_tokenizer())


def test_a_line_that_is_not_json_is_named(tmp_path: Path, make_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2': this line is not JSON"):
        source(path, make_tokenizer())


@pytest.mark.parametrize("answer", ["2024-01-01", "2024-01-01 10:00:00", "2024-01-01T10:00:00Z", "12", "true", "null"])
def test_text_stays_text_whatever_it_looks_like(tmp_path: Path, make_tokenizer, answer: str):
    tokenizer = make_tokenizer()
    made = source(write(tmp_path, [{"prompt": "q", "answer": answer}] * 2), tokenizer)
    tokens = made.read(0, 1)[0].keys["tokens"].tolist()
    assert "".join(tokenizer.convert_ids_to_tokens(tokens)) == f"q{answer}<eos>"


def test_rows_may_have_other_fields_each(tmp_path: Path, make_tokenizer):
    rows = [
        {"prompt": "a", "answer": "b", "more": {"x": 1}},
        {"prompt": "a", "answer": "b", "more": "text", "other": [1]},
        {"prompt": "a", "answer": "b"},
    ]
    assert len(source(write(tmp_path, rows), make_tokenizer())) == 3


def test_chats_may_differ_in_keys_and_length(tmp_path: Path, make_tokenizer):
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "name": "n"}
    tokenizer = make_tokenizer()
    path = write(tmp_path, [{"chat": [user, assistant]}, {"chat": [user, assistant, user, assistant]}])
    made = source(path, tokenizer, messages="chat", shuffle=False)
    texts = ["".join(tokenizer.convert_ids_to_tokens(each.keys["tokens"].tolist())) for each in made.read(0, 2)]
    assert texts == ["U:hi|A:yes|", "U:hi|A:yes|U:hi|A:yes|"]
