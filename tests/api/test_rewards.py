import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainmaster.api.errors import ConfigError, DataError, RewardError, RunError
from trainmaster.api.rewards import (
    OnFailure,
    Reward,
    Scored,
    apply_policy,
    exact_match,
    group_of,
    number_match,
    resolve_reward,
)

FILE = """
from pathlib import Path
from trainmaster.api.rewards import OnFailure
from os.path import join

class Experiment:
    def compile(self): ...

experiment = Experiment()
THRESHOLD = 3

def prepare(experiment): ...

def reward(prompt, response, row):
    return 0.25

def exact_match(prompt, response, row):
    return 0.5

def _hidden(prompt, response, row): ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """An experiment file; what it leaves behind in this process is cleared."""
    before = list(sys.path)
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    yield path
    sys.path[:] = before
    sys.modules.pop("trainmaster_experiment", None)


def test_defaults():
    reward = Reward(function="reward")
    assert (reward.is_batched, reward.timeout_s, reward.processes) == (False, 10.0, 1)
    assert (reward.on_failure, reward.failure_score) == (OnFailure.FAIL, 0.0)


@pytest.mark.parametrize("field", ["timeout_s", "processes"])
def test_what_must_be_positive(field: str):
    with pytest.raises(ConfigError, match=rf"Reward\.{field} = 0: input should be greater than 0"):
        Reward(function="reward", **{field: 0})


def test_a_failure_score_needs_its_policy():
    assert Reward(function="reward", on_failure=OnFailure.SCORE, failure_score=-1.0).failure_score == -1.0
    for policy in (OnFailure.FAIL, OnFailure.DROP):
        with pytest.raises(
            ConfigError, match=rf'failure_score = -1\.0: is not used with on_failure = "{policy}"\. Rem'
        ):
            Reward(function="reward", on_failure=policy, failure_score=-1.0)


@pytest.mark.parametrize("name", ["", "rewards.score", "my reward"])
def test_a_function_is_a_bare_name(name: str):
    with pytest.raises(ConfigError, match=rf"Reward\.function = '{name}': must be the name of a function in the exp"):
        Reward(function=name)


# ------------------------------------------------------------------------------------------------ names


def test_the_files_own_name_comes_first(file: Path):
    assert resolve_reward(file, "reward")("", "", {}) == 0.25
    assert resolve_reward(file, "exact_match")("", "", {}) == 0.5


def test_a_shipped_function_is_found(file: Path):
    assert resolve_reward(file, "number_match") is number_match


def test_an_unknown_name_says_which_there_are(file: Path):
    message = (
        r"Reward\.function = 'rewrad': there is no such function: .*experiment\.py has exact_match, join, reward, and "
        r"exact_match, number_match ship\. Use one of these names, or define `def rewrad\(prompt, response, row\)` in"
    )
    with pytest.raises(ConfigError, match=message):
        resolve_reward(file, "rewrad")


def test_a_file_without_functions_says_so(file: Path):
    file.write_text("class Experiment:\n    def compile(self): ...\n\nexperiment = Experiment()\n")
    with pytest.raises(ConfigError, match=r"there is no such function: .*experiment\.py has no functions, and exact_m"):
        resolve_reward(file, "reward")


def test_a_name_that_cannot_be_called_is_refused(file: Path):
    with pytest.raises(
        ConfigError, match=r"Reward\.function = 'THRESHOLD': .* assigns this name a value of type int, which"
    ):
        resolve_reward(file, "THRESHOLD")


def test_a_file_that_fails_is_named(file: Path):
    file.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"FILE = '.*experiment\.py:1': the file raised ZeroDivisionError"):
        resolve_reward(file, "exact_match")


# ------------------------------------------------------------------------------------------------ policy

SCORED = [
    Scored("d/0/1/0", 1.0, None),
    Scored("d/0/1/1", None, "raised KeyError: 'answer'"),
    Scored("d/0/2/0", 0.5, None),
    Scored("d/0/10/0", 0.0, None),
]


def test_without_failures_all_policies_are_alike():
    good = [one for one in SCORED if one.failure is None]
    for policy in OnFailure:
        outcome = apply_policy(good, Reward(function="reward", on_failure=policy))
        assert outcome.values == {"d/0/1/0": 1.0, "d/0/2/0": 0.5, "d/0/10/0": 0.0}
        assert (outcome.dropped_groups, outcome.failures) == ((), ())


def test_fail_names_the_sample_the_function_the_reason_and_the_cure():
    message = (
        r"^sample d/0/1/1: reward function `reward` raised KeyError: 'answer'\. Correct the function, or set "
        r'Reward\.on_failure to "drop"'
    )
    with pytest.raises(RewardError, match=message):
        apply_policy(SCORED, Reward(function="reward"))
    with pytest.raises(RunError, match=r"'answer' \(1 more of 5 samples failed\)\. Correct"):
        apply_policy([*SCORED, Scored("d/0/3/0", None, "hung")], Reward(function="reward"))


def test_drop_takes_the_whole_group_and_no_other():
    outcome = apply_policy(SCORED, Reward(function="reward", on_failure=OnFailure.DROP))
    assert outcome.dropped_groups == ("d/0/1",)
    assert outcome.values == {"d/0/2/0": 0.5, "d/0/10/0": 0.0}
    assert [one.id for one in outcome.failures] == ["d/0/1/1"]


def test_score_gives_the_failure_score_and_still_tells():
    outcome = apply_policy(SCORED, Reward(function="reward", on_failure=OnFailure.SCORE, failure_score=-1.0))
    assert outcome.values == {"d/0/1/0": 1.0, "d/0/1/1": -1.0, "d/0/2/0": 0.5, "d/0/10/0": 0.0}
    assert outcome.dropped_groups == ()
    assert [one.failure for one in outcome.failures] == ["raised KeyError: 'answer'"]


def test_a_group_is_the_id_up_to_its_last_slash():
    assert group_of("dataset/0/17/3") == "dataset/0/17"
    assert group_of("lonely") == "lonely"


# ------------------------------------------------------------------------------------------------ shipped


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [("Paris", "Paris", 1.0), (" Paris\n", "Paris ", 1.0), ("paris", "Paris", 0.0), ("42", 42, 1.0), ("", "", 1.0)],
)
def test_exact_match(response: str, answer: object, score: float):
    assert exact_match("", response, {"answer": answer}) == score


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("She sells 9 eggs, so 9 * 2 = 18", "16 - 3 - 4 = 9, 9 * 2 = <<9*2=18>>18\n#### 18"),
        ("The answer is 18.", "18"),
        ("It costs $1,234,567.50.", "1234567.5"),
        ("1234567", "#### 1,234,567"),
        ("50%", "50"),
        ("-3", "#### -3"),
        ("x=-3", "-3.0"),
        ("The balance is -$5", "$-5"),
        ("\u22127", "-7"),
        ("10-3", "3"),
        ("f(2)-3", "3"),
        ("3-4 weeks", "4"),
        ("COVID-19", "19"),
        (".5", "0.50"),
        ("No.5", "5"),
        ("007", "7"),
        ("1, 2, 3", "3"),
        ("1,2345", "2345"),
        ("12,34", "34"),
        ("1.5e3", "1500"),
        ("\\boxed{72}", "72"),
        ("**72**", "72"),
        ("#### 72\nThat is 100% right", "72"),
        ("#### 1\n#### 72", "72"),
        ("72 ####", "72"),
        ("72", 72),
        ("0.5", 0.5),
        ("-0", "0"),
        ("18", "18 of 20 #### 18 (of 20)"),
        ("100000000000000000000000000000000000000001", "100,000,000,000,000,000,000,000,000,000,000,000,000,001"),
    ],
)
def test_number_match_sees_equal_numbers(response: str, answer: object):
    assert number_match("", response, {"answer": answer}) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "18"),
        ("no idea", "18"),
        ("18 or 19", "18"),
        ("-18", "18"),
        ("18", "#### -18"),
        ("1.8", "18"),
        ("18", "18.01"),
        ("180", "18"),
        ("1,8", "18"),
        ("#### 19, no: 18", "18"),
        ("1e999", "5"),
        ("100000000000000000000000000000000000000000", "100000000000000000000000000000000000000001"),
    ],
)
def test_number_match_sees_other_numbers(response: str, answer: str):
    assert number_match("", response, {"answer": answer}) == 0.0


def test_a_row_that_cannot_be_compared_with_is_an_error():
    with pytest.raises(DataError, match=r"row\.answer = None: must be .*; the row has the fields question\. Add the"):
        exact_match("", "1", {"question": "1"})
    with pytest.raises(DataError, match=r"row\.answer = \['1'\]: must be a text or a number"):
        number_match("", "1", {"answer": ["1"]})
    with pytest.raises(DataError, match=r"row\.answer = 'many': has no number to compare with\. Correct the row"):
        number_match("", "1", {"answer": "many"})
