"""Rewards: what a user says about a reward function, how its name is resolved, and what a failure of it means.

A reward function is plain Python in the experiment file, or one that ships here (`exact_match`, `number_match`):

    def reward(prompt: str, response: str, row: dict) -> float: ...
    def reward(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]: ...   # is_batched=True

It is called in processes of its own (`workers.functions`), so it may print, hang or crash without harm to the run.
Invariant: a sample has a finite score or a failure in words, never a score that nobody gave.
Nothing here calls a function on samples.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from .errors import ConfigError, DataError, RewardError
from .record import record

Row = Mapping[str, Any]  # Any: a dataset's fields are the user's own


class OnFailure(StrEnum):
    """What becomes of a sample that its reward function gave no score for."""

    FAIL = "fail"
    """Fail the run with a `RewardError`."""
    DROP = "drop"
    """Drop the sample's whole group."""
    SCORE = "score"
    """Give the sample `failure_score`."""


@record
class Reward:
    """A function that scores responses.

    A call fails if it raises, takes too long, ends its process, or returns anything but a finite number a sample. A
    batched call that fails as a whole is a failure of each of its samples.
    """

    function: str
    """The name of a function in the experiment file, or of one that ships: `exact_match`, `number_match`."""
    is_batched: bool = False
    """The function takes lists and returns a list. Each process is given one slice of the batch."""
    timeout_s: PositiveFloat = 10.0
    """For one call of the function, in seconds; then its process is killed."""
    on_failure: OnFailure = OnFailure.FAIL
    """What becomes of a sample without a score: fail the run, drop the sample's group, or give `failure_score`."""
    failure_score: float = 0.0
    """The score of a failed sample; may differ from 0 only if `on_failure` is `score`."""
    processes: PositiveInt = 1
    """The number of processes that call the function at the same time."""

    def __post_init__(self) -> None:
        if not self.function.isidentifier():
            raise ConfigError(
                "Reward.function",
                self.function,
                "must be the name of a function in the experiment file",
                "import or define the function there and give its bare name",
            )
        if self.failure_score != 0.0 and self.on_failure is not OnFailure.SCORE:
            raise ConfigError(
                "Reward.failure_score",
                self.failure_score,
                f'is not used with on_failure = "{self.on_failure}"',
                'remove it, or set on_failure to "score"',
            )


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to score."""

    id: str
    """The sequence's id, such as `dataset/0/17/3`."""
    prompt: str
    response: str
    row: Row
    """The dataset's row that the prompt came from: what JSON can say."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What came of one sample: either a value or a failure."""

    id: str
    value: float | None
    """Finite."""
    failure: str | None
    """What the function did instead of giving a score: "raised KeyError: 'answer'"."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Scores once the policy has been applied. Every sample is in `values`, or its group in `dropped_groups`."""

    values: dict[str, float]
    """By sample id, in the samples' order."""
    dropped_groups: tuple[str, ...]
    """Ids of groups, in the order of their first failures."""
    failures: tuple[Scored, ...]
    """Every failure, whatever became of it, to be counted and shown."""


def group_of(sample: str) -> str:
    """The group of a sequence: its id up to the last `/`. One without a `/` is a group of its own."""
    return sample.rpartition("/")[0] or sample


def apply_policy(scored: Sequence[Scored], reward: Reward) -> Outcome:
    """Does what `reward.on_failure` says about failures.

    Raises `RewardError` with `OnFailure.FAIL`, if there is any failure.
    """
    failures = tuple(one for one in scored if one.value is None)
    dropped: dict[str, None] = {}  # a set in order
    match reward.on_failure:
        case OnFailure.FAIL if failures:
            more = f" ({len(failures) - 1} more of {len(scored)} samples failed)" if len(failures) > 1 else ""
            raise RewardError(
                f"sample {failures[0].id}: reward function `{reward.function}` {failures[0].failure}{more}. Correct "
                'the function, or set Reward.on_failure to "drop" (such groups) or "score" (give Reward.failure_score).'
            )
        case OnFailure.DROP:
            dropped = dict.fromkeys(group_of(one.id) for one in failures)
    values = {
        one.id: reward.failure_score if one.value is None else one.value
        for one in scored
        if group_of(one.id) not in dropped
    }
    return Outcome(values=values, dropped_groups=tuple(dropped), failures=failures)


def exact_match(prompt: str, response: str, row: Row) -> float:
    """1.0 if the response is `row["answer"]`, white space around both aside; otherwise 0.0.

    Raises `DataError` if the row has no answer.
    """
    return float(response.strip() == _answer(row).strip())


_MARK = "####"
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)]) [-\u2212] )?                            # not the minus of 5-3, (a)-3 or of a hyphen
    [$€£]?
    (?P<digits>
        (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ )      # 1,234 or 1234
        (?: \.[0-9]+ )?
      | (?<!\w) \.[0-9]+                                        # .5, but no decimal in "No.5"
    )
    (?P<exponent> [eE] [-+]?[0-9]{1,3} (?![0-9]) )?
    """,
    re.VERBOSE,
)


def number_match(prompt: str, response: str, row: Row) -> float:
    """1.0 if the response's final number equals that of `row["answer"]`, otherwise (or if it has none) 0.0.

    A text's final number is the first one after its last `####` (as GSM8K marks answers: Cobbe et al. 2021), or without
    a number there, the last one in the text. Numbers are compared by value: `1,234.50`, `$1234.5` and `1234.5.` are
    equal, and so are `50%` and `50`. Fractions are not read.

    Raises `DataError` if the row has no answer, or one without a number.
    """
    expected = _final_number(_answer(row))
    if expected is None:
        raise DataError(
            "row.answer", row["answer"], "has no number to compare with", "correct the row, or use `exact_match`"
        )
    return float(_final_number(response) == expected)


def _final_number(text: str) -> Decimal | None:
    _, mark, behind = text.rpartition(_MARK)
    found = _NUMBER.search(behind) if mark else None
    if found is None:
        found = max(_NUMBER.finditer(text), key=lambda match: match.start(), default=None)
    if found is None:
        return None
    number = Decimal(found["digits"].replace(",", "") + (found["exponent"] or ""))
    return -number if found["sign"] else number


def _answer(row: Row) -> str:
    if not isinstance(row.get("answer"), str | int | float):
        raise DataError(
            "row.answer",
            row.get("answer"),
            f"must be a text or a number; the row has the fields {', '.join(sorted(map(str, row)))}",
            "add the field `answer`, or write a reward function that reads another one",
        )
    return str(row["answer"])


SHIPPED: Mapping[str, Callable[[str, str, Row], float]] = MappingProxyType(
    {"exact_match": exact_match, "number_match": number_match}
)
"""The functions that ship here, by name. All score one sample at a time."""


def resolve_reward(file: Path, name: str) -> Callable[..., Any]:  # Any: one of two signatures, see the module's top
    """Executes the experiment file and finds the reward function: the file's own name first, then one that ships.

    Raises `ConfigError` if there is none, or if the file cannot be read.
    """
    from .experiment_file import read_experiment_file  # late: experiments are made of rewards

    read_experiment_file(file)
    module = sys.modules["trainmaster_experiment"]
    own = vars(module)
    function: Callable[..., Any] | None = own.get(name, SHIPPED.get(name))
    if callable(function):
        return function
    if name in own:
        raise ConfigError(
            "Reward.function",
            name,
            f"{file} assigns this name a value of type {type(own[name]).__name__}, which cannot be called",
            "make it a function `def reward(prompt, response, row)`, or give another name",
        )
    available = [
        other
        for other, value in own.items()
        if callable(value) and not isinstance(value, type) and not other.startswith("_") and other != "prepare"
    ]
    in_file = f"{file} has {', '.join(sorted(available))}" if available else f"{file} has no functions"
    raise ConfigError(
        "Reward.function",
        name,
        f"there is no such function: {in_file}, and {', '.join(sorted(SHIPPED))} ship",
        f"use one of these names, or define `def {name}(prompt, response, row)` in the file",
    )
