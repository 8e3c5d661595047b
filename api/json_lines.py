"""Reads a JSON Lines file line by line, so that a bad line is named by its number before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .config import Dataset
from .errors import DataError

Row = Mapping[str, Any]  # Any: a JSON object of the user's


def check_json_lines(dataset: Dataset, field: str, has_answers: bool = True) -> int:
    """Reads the file to its end. Returns the number of rows; raises `DataError` as `read_json_lines` does."""
    return sum(1 for _ in read_json_lines(dataset, field, has_answers))


def read_json_lines(dataset: Dataset, field: str, has_answers: bool = True) -> Iterator[tuple[int, Row]]:
    """Rows with their 1-based line numbers; blank lines are none. Every row is an object with the dataset's fields.

    Values are as they stand: no guessing of dates. Raises `DataError` naming the first bad line, or an empty
    or unreadable file; `field` is the experiment's field that holds the path.
    """
    if dataset.messages is not None:
        needed: tuple[str, ...] = (dataset.messages,)
    else:
        needed = (dataset.prompt, dataset.answer) if has_answers else (dataset.prompt,)
    is_empty = True
    try:
        with dataset.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    is_empty = False
                    yield number, _parse(line, needed, field, f"{dataset.path}:{number}")
    except OSError as error:
        raise DataError(
            field, str(dataset.path), f"cannot be read: {error.strerror}", "give the path of a JSON Lines file"
        ) from None
    if is_empty:
        raise DataError(field, str(dataset.path), "the dataset is empty", "give a file with one JSON object a line")


def _parse(line: bytes, needed: tuple[str, ...], field: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(field, where, f"this line is not JSON ({error})", "correct or remove the line") from None
    if not isinstance(row, dict):
        raise DataError(field, where, f"this line is a {type(row).__name__}, not an object", "write one object a line")
    for name in needed:
        if name not in row:
            raise DataError(
                field,
                where,
                f"this row has no field {name!r}, only {sorted(row)}",
                f"correct the row, or set `{field.removesuffix('.path')}.prompt`, `.answer` or `.messages`",
            )
    return row
