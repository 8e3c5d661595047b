from pathlib import Path

import pytest
from trainmaster.api.config import Dataset
from trainmaster.api.errors import DataError
from trainmaster.api.json_lines import check_json_lines

GOOD = '{"prompt": "a", "answer": "b"}\n'


def check(folder: Path, content: str | bytes, **fields: str) -> int:
    path = folder / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return check_json_lines(Dataset(path=path, **fields), "dataset.path")


def test_rows_are_counted_and_blank_lines_skipped(tmp_path: Path):
    assert check(tmp_path, f"\n{GOOD}  \n{GOOD}\r\n{GOOD.rstrip()}") == 3


@pytest.mark.parametrize("line", ["{'prompt': 1}", "{", "\x00", '{"prompt": "a"} {}'])
def test_a_line_that_is_not_json_is_named_by_its_number(tmp_path: Path, line: str):
    with pytest.raises(
        DataError, match=r"^dataset\.path = '.*rows\.jsonl:3': this line is not JSON \(.*\. Correct or remove"
    ):
        check(tmp_path, f"{GOOD}\n{line}\n{GOOD}")


def test_a_line_that_is_not_text_is_named_by_its_number(tmp_path: Path):
    with pytest.raises(DataError, match=r"rows\.jsonl:2': this line is not JSON \('utf-8' codec"):
        check(tmp_path, GOOD.encode() + b'{"prompt": "\xff"}\n')


def test_a_line_that_is_nested_too_deeply_is_named_by_its_number(tmp_path: Path):
    with pytest.raises(DataError, match=r"rows\.jsonl:2': this line is not JSON"):
        check(tmp_path, GOOD + "[" * 100_000 + "\n")


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"a"', "str"), ("1", "int"), ("null", "NoneType")])
def test_a_line_that_is_not_an_object_is_named_by_its_number(tmp_path: Path, line: str, kind: str):
    with pytest.raises(DataError, match=rf"rows\.jsonl:2': this line is a {kind}, not an object\. Write one object"):
        check(tmp_path, f"{GOOD}{line}\n")


def test_a_row_without_a_field_is_named_with_what_it_has(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2': this row has no field 'answer', only \['prompt', 'reply'\]\. .*`dataset\.pro"
    ):
        check(tmp_path, GOOD + '{"reply": "b", "prompt": "a"}\n')


def test_the_datasets_own_field_names_count(tmp_path: Path):
    assert check(tmp_path, '{"q": "a", "a": "b"}', prompt="q", answer="a") == 1
    assert check(tmp_path, '{"chat": []}', messages="chat") == 1
    with pytest.raises(DataError, match="has no field 'chat'"):
        check(tmp_path, GOOD, messages="chat")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str):
    with pytest.raises(DataError, match=r"rows\.jsonl': the dataset is empty\. Give a file with one JSON object a li"):
        check(tmp_path, content)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"evaluation\.path = '.*none': cannot be read: No such file .*\. Give the path"
    ):
        check_json_lines(Dataset(path=tmp_path / "none"), "evaluation.path")


def test_a_directory_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        check_json_lines(Dataset(path=tmp_path), "dataset.path")
