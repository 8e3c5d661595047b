"""Checks a JSON Lines file line by line, so that a bad line is named by its number before anything starts."""

from __future__ import annotations

import json

from .config import Dataset
from .errors import DataError


def check_json_lines(dataset: Dataset, field: str) -> int:
    """Every line must be a JSON object with the dataset's fields. Returns the number of rows.

    Raises `DataError` naming the first bad line, or an empty or unreadable file.
    """
    needed = (dataset.messages,) if dataset.messages is not None else (dataset.prompt, dataset.answer)
    num_rows = 0
    try:
        with dataset.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                _check_line(line, needed, field, f"{dataset.path}:{number}")
                num_rows += 1
    except OSError as error:
        raise DataError(
            field, str(dataset.path), f"cannot be read: {error.strerror}", "give the path of a JSON Lines file"
        ) from None
    if num_rows == 0:
        raise DataError(field, str(dataset.path), "the dataset is empty", "give a file with one JSON object a line")
    return num_rows


def _check_line(line: bytes, needed: tuple[str, ...], field: str, where: str) -> None:
    try:
        row = json.loads(line)
    except ValueError as error:
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
