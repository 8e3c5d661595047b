import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest
from trainmaster.workers.functions.process import frame, pack, score_batch, score_one, unpack

ITEMS = [("p0", "r0", {"n": 0}), ("p1", "r1", {"n": 1})]


def returning(result: object) -> Callable[..., Any]:
    return lambda *arguments: result


# ------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize(
    "value",
    [
        [],
        [1.5, None, True, "text", b"bytes", {"a": {"b": [1, 2]}}],
        {"big": 2**200, "low": -(2**200), "edge": 2**64 - 1, "nested": [2**64]},
        "a lone surrogate \ud800",
        {1: "a key that is no text"},
        float("inf"),
    ],
)
def test_pack_round_trips(value: object):
    assert unpack(pack(value)) == value


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j])
def test_what_json_cannot_say_is_not_packed(value: object):
    with pytest.raises(TypeError, match=f"a {type(value).__name__} is not what JSON can say"):
        pack({"field": value})


def test_a_frame_is_a_length_and_its_parts():
    assert frame(b"ab", b"c") == b"\x00\x00\x00\x03abc"


# ------------------------------------------------------------------------------------------------ one sample


@pytest.mark.parametrize(
    ("result", "value"),
    [
        (0.25, 0.25),
        (3, 3.0),
        (True, 1.0),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(2), 2.0),
        (numpy.bool_(True), 1.0),
        (Decimal("0.5"), 0.5),
    ],
)
def test_numbers_of_all_kinds(result: object, value: float):
    scored, failure = score_one(returning(result), "p", "r", {})
    assert (scored, failure) == (value, None)
    assert type(scored) is float


@pytest.mark.parametrize(
    ("result", "failure"),
    [
        (float("nan"), "returned nan, not a finite number"),
        (float("-inf"), "returned -inf, not a finite number"),
        (None, "returned None (of type NoneType), not a number"),
        ("1.0", "returned '1.0' (of type str), not a number"),
        ([1.0], "returned [1.0] (of type list), not a number"),
        (1j, "returned 1j (of type complex), not a number"),
        (10**400, "not a number: raised OverflowError: int too large to convert to float"),
        (numpy.zeros(2), "(of type ndarray), not a number: raised TypeError: only"),
    ],
)
def test_what_is_no_score(result: object, failure: str):
    value, told = score_one(returning(result), "p", "r", {})
    assert value is None
    assert failure in (told or "")


def test_arguments_come_in_order():
    seen: list[object] = []
    score_one(lambda *arguments: seen.extend(arguments) or 0.0, *ITEMS[1])
    assert seen == ["p1", "r1", {"n": 1}]


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*arguments: object) -> float:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no"), "raised ValueError: no ("),
        (KeyError("answer"), "raised KeyError: 'answer' ("),
        (SystemExit(3), "raised SystemExit: 3 ("),
        (ValueError("\ud800"), "raised ValueError: \\ud800 ("),
    ],
)
def test_an_exception_is_told_with_its_place(error: BaseException, told: str):
    value, failure = score_one(raises(error), "p", "r", {})
    assert value is None
    assert failure is not None
    assert failure.startswith(told)
    assert "(test_process.py, line " in failure


def test_a_long_message_is_cut():
    _, failure = score_one(raises(ValueError("x" * 10**6)), "p", "r", {})
    assert failure is not None
    assert len(failure) < 2100


# ------------------------------------------------------------------------------------------------ batches


def test_a_batch_is_three_lists():
    def function(prompts: list[str], responses: list[str], rows: list[dict[str, int]]) -> list[float]:
        assert (prompts, responses) == (["p0", "p1"], ["r0", "r1"])
        return [row["n"] + 0.5 for row in rows]

    assert score_batch(function, ITEMS) == [(0.5, None), (1.5, None)]


@pytest.mark.parametrize("results", [(1, 2), numpy.array([1, 2])])
def test_any_sequence_of_numbers_will_do(results: object):
    assert score_batch(returning(results), ITEMS) == [(1.0, None), (2.0, None)]


def test_one_bad_number_of_a_batch_fails_alone():
    assert score_batch(returning([float("nan"), 1.0]), ITEMS) == [
        (None, "returned nan, not a finite number"),
        (1.0, None),
    ]


@pytest.mark.parametrize(
    ("result", "failure"),
    [
        ([1.0], "returned 1 results for 2 samples"),
        ([], "returned 0 results for 2 samples"),
        (1.0, "returned 1.0 (of type float), not a list of numbers"),
        (None, "returned None (of type NoneType), not a list of numbers"),
        ("ab", "returned 'ab' (of type str), not a list of numbers"),
        (b"ab", "returned b'ab' (of type bytes), not a list of numbers"),
        ({"a": 1.0, "b": 2.0}, "(of type dict), not a list of numbers"),
        ({1.0, 2.0}, "(of type set), not a list of numbers"),
    ],
)
def test_a_wrong_result_fails_the_whole_batch(result: object, failure: str):
    verdicts = score_batch(returning(result), ITEMS)
    assert [value for value, _ in verdicts] == [None, None]
    assert all(failure in (told or "") for _, told in verdicts)


def test_an_exception_fails_the_whole_batch():
    verdicts = score_batch(raises(RuntimeError("down")), ITEMS)
    assert len(verdicts) == 2
    assert all((told or "").startswith("raised RuntimeError: down (") for _, told in verdicts)


# ------------------------------------------------------------------------------------------------ the process

FILE = """
import os, sys

class Experiment:
    def compile(self): ...

experiment = Experiment()
print("imported")

def reward(prompt, response, row):
    print("called", repr(sys.stdin.read()))
    os.write(1, b"raw\\n")
    if response == "fork" and os.fork() == 0:
        return 9.0
    return float(response == "good")
"""


def run(tmp_path: Path, *arguments: str, requests: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    file = tmp_path / "experiment.py"
    file.write_text(FILE)
    command = [sys.executable, "-m", "trainmaster.workers.functions.process", str(file), *arguments]
    return subprocess.run(command, input=requests, capture_output=True, timeout=30, check=False)


def test_the_protocol_has_standard_output_to_itself_and_ends_with_standard_input(tmp_path: Path):
    requests = frame(pack([["p", "good", {}]])) + frame(pack([["p", "fork", {}]])) + frame(pack([["p", "good", {}]]))
    done = run(tmp_path, "reward", requests=requests)
    replies = [[], [[1.0, None]], [[0.0, None]], [[1.0, None]]]
    assert done.stdout == b"".join(frame(pack(reply)) for reply in replies)
    assert done.returncode == 0
    assert b"imported" in done.stderr
    assert b"called ''" in done.stderr
    assert b"raw" in done.stderr


def test_a_function_that_cannot_be_had_is_refused(tmp_path: Path):
    done = run(tmp_path, "rewrad")
    field, value, rule, cure = unpack(done.stdout[4:])
    assert (field, value) == ("Reward.function", "rewrad")
    assert "there is no such function" in rule
    assert "use one of these names" in cure
    assert done.returncode == 2


def test_a_shipped_function_is_not_batched(tmp_path: Path):
    done = run(tmp_path, "number_match", "--batched")
    assert unpack(done.stdout[4:])[:2] == ["Reward.is_batched", "True"]


@pytest.mark.parametrize("by_thread", [False, True])
def test_it_dies_with_its_lifeline(tmp_path: Path, by_thread: bool):
    """By the kernel's hand, or where it cannot, by a thread's."""
    file = tmp_path / "experiment.py"
    file.write_text(FILE + "\nprint('up', flush=True)\nos.read(os.pipe()[0], 1)\n")
    script = "import fcntl, sys\n"
    script += "del fcntl.F_SETSIG\n" if by_thread else ""
    script += "from trainmaster.workers.functions.process import main\nmain(sys.argv[1:])"
    held, lifeline = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(file), "reward", "--lifeline", str(held)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(held,),
        start_new_session=True,
    )
    os.close(held)
    with process:
        assert process.stderr is not None
        assert b"up\n" in iter(process.stderr.readline, b"")
        os.close(lifeline)
        assert process.wait(10) == -9
