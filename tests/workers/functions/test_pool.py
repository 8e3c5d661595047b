"""Real processes with user functions that misbehave in every way that we know of."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from trainmaster.api.errors import ConfigError, DeadlineExceeded, RewardError
from trainmaster.api.rewards import Item, OnFailure, Reward, Scored, apply_policy
from trainmaster.workers.functions import pool as pool_module
from trainmaster.workers.functions.pool import RewardPool

FILE = """
import contextlib, ctypes, fcntl, os, re, subprocess, sys, threading, time

class Experiment:
    def compile(self): ...

experiment = Experiment()


def reward(prompt, response, row):
    match response:
        case "good":
            return row["n"] / 10
        case "raise":
            raise ValueError(f"no {prompt}")
        case "spin":
            while True:
                pass
        case "sleep":
            time.sleep(1000)
        case "backtrack":  # holds the interpreter lock all the time
            re.match(r"(a+)+$", "a" * 64 + "b")
        case "nan":
            return float("nan")
        case "text":
            return "1.0"
        case "exit":
            os._exit(7)
        case "crash":
            ctypes.string_at(0)
        case "print":
            print("x" * 100_000, flush=True)
            os.write(1, b"\\x00\\x00\\x00\\x01\\x90")
            return row["n"] / 10
        case "spawn":
            child = subprocess.Popen(["sleep", "1000"])
            with open(prompt, "w") as pids:
                pids.write(f"{os.getpid()} {child.pid}")
            re.match(r"(a+)+$", "a" * 64 + "b")
        case "die later":
            threading.Timer(0.1, lambda: os._exit(7)).start()
            return row["n"] / 10
        case "deafen":  # closes what requests come by
            for pipe in range(3, 256):
                with contextlib.suppress(OSError):
                    if fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                        os.close(pipe)
            return row["n"] / 10
        case "daemonise":  # as a daemon does
            os.closerange(3, 256)
            time.sleep(1000)


def batched(prompts, responses, rows):
    if "short" in responses:
        return [1.0]
    if "size" in responses:
        return [len(rows)] * len(rows)
    return [reward(*sample) for sample in zip(prompts, responses, rows)]
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """An experiment file. No process that has it on its command line outlives the test."""
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    yield path
    left = living(path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@dataclass(frozen=True)
class Shared:
    """A pool that several tests use: what one of them does to it must not trouble the next."""

    file: Path
    reward: Reward
    pool: RewardPool


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    path = tmp_path_factory.mktemp("shared") / "experiment.py"
    path.write_text(FILE)
    reward = Reward(function="reward", processes=2, timeout_s=0.5, on_failure=OnFailure.DROP)
    with RewardPool(path, reward) as pool:
        yield Shared(path, reward, pool)
    assert living(path) == []


def living(file: Path) -> list[int]:
    """The processes with this file on their command line."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(file).encode() in command:
                pids.append(int(entry.name))
    return pids


def has_ended(pid: int) -> bool:
    """Within five seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 5)[0])
    finally:
        os.close(descriptor)


def items(*responses: str, prompt: str = "p") -> list[Item]:
    return [Item(f"d/0/{n}/0", prompt, response, {"n": n}) for n, response in enumerate(responses)]


def test_scores_come_in_order(shared: Shared):
    assert shared.pool.score([]) == []
    for _ in range(2):
        expected = [Scored(f"d/0/{n}/0", n / 10, None) for n in range(40)]
        assert shared.pool.score(items(*["good"] * 40)) == expected
    assert len(living(shared.file)) == 2


def test_every_misbehaviour_is_a_failure_of_its_own_item(shared: Shared):
    bad = {
        "raise": "raised ValueError: no p (experiment.py, line 15)",
        "nan": "returned nan, not a finite number",
        "text": "returned '1.0' (of type str), not a number",
        "exit": "did not return: its process ended with exit code 7",
        "crash": "did not return: its process was killed by SIGSEGV",
        "daemonise": "did not return: its process was killed by SIGKILL",
    }
    responses = ["good", *(response for name in bad for response in (name, "good", "print"))]
    scored = shared.pool.score(items(*responses))
    for n, (response, one) in enumerate(zip(responses, scored, strict=True)):
        assert one.id == f"d/0/{n}/0"
        if response in bad:
            assert (one.value, one.failure) == (None, bad[response])
        else:
            assert (one.value, one.failure) == (n / 10, None)


def test_what_hangs_is_killed_in_time_and_the_others_go_on(shared: Shared):
    start = time.monotonic()
    scored = shared.pool.score(items("good", "spin", "good", "backtrack", "good", "sleep", "good"))
    assert time.monotonic() - start < 5
    assert [one.value for one in scored] == [0.0, None, 0.2, None, 0.4, None, 0.6]
    assert {one.failure for one in scored[1::2]} == {"took longer than timeout_s = 0.5, and was killed"}
    assert apply_policy(scored, shared.reward).dropped_groups == ("d/0/1", "d/0/3", "d/0/5")


def test_one_that_hangs_takes_little_longer_than_it_may(shared: Shared):
    shared.pool.score(items("good"))
    start = time.monotonic()
    assert shared.pool.score(items("spin"))[0].value is None
    assert 0.5 <= time.monotonic() - start < 3  # with the start of a process, if none was ready


def test_what_the_function_started_dies_with_it(shared: Shared, tmp_path: Path):
    pids = tmp_path / "pids"
    assert shared.pool.score(items("spawn", prompt=str(pids)))[0].value is None
    child, grandchild = map(int, pids.read_text().split())
    assert child not in living(shared.file)
    assert has_ended(grandchild)


def test_a_row_that_cannot_be_sent_harms_no_other(shared: Shared):
    given = [
        Item("a/0", "p", "good", {"n": 10**30, "x": "\ud800", "big": "x" * 10**6}),
        Item("b/0", "p", "good", {"n": 1, "x": object()}),
        Item("c/0", "p", "good", {"n": 1}),
    ]
    scored = shared.pool.score(given)
    assert [one.value for one in scored] == [1e29, None, 0.1]
    assert scored[1].failure == "was not called, because its row cannot be sent: a object is not what JSON can say"


def test_a_process_that_died_between_two_calls_is_replaced(file: Path):
    with RewardPool(file, Reward(function="reward")) as pool:
        assert pool.score(items("die later"))[0].value == 0.0
        assert has_ended(living(file)[0])
        assert pool.score(items("good", "good"))[1].value == 0.1


def test_an_item_that_no_process_took_is_asked_again(file: Path):
    with RewardPool(file, Reward(function="reward")) as pool:
        scored = pool.score(items("deafen", "good"))
    assert [(one.value, one.failure) for one in scored] == [(0.0, None), (0.1, None)]


def test_batches(file: Path):
    """They are sliced over the processes; one that fails as a whole fails each of its items, and no other."""
    late = "took longer than timeout_s = 0.5, and was killed"
    with RewardPool(file, Reward(function="batched", is_batched=True, processes=2, timeout_s=0.5)) as pool:
        assert [one.value for one in pool.score(items(*["size"] * 5))] == [2.0, 2.0, 3.0, 3.0, 3.0]
        assert [one.value for one in pool.score(items("size"))] == [1.0]
        scored = pool.score(items("raise", "good", "good", "nan"))
        assert [one.value for one in scored] == [None, None, 0.2, None]
        assert [(one.failure or "")[:24] for one in scored[:2]] == ["raised ValueError: no p "] * 2
        scored = pool.score(items("good", "short", "good", "spin"))
        assert [one.failure for one in scored] == ["returned 1 results for 2 samples"] * 2 + [late] * 2


def test_a_wrong_name_shows_at_the_first_score(file: Path):
    pool = RewardPool(file, Reward(function="rewrad"))
    with pytest.raises(
        ConfigError, match=r"Reward\.function = 'rewrad': there is no such function: .* has batched, rew"
    ):
        pool.score(items("good"))
    assert living(file) == []


def test_a_file_that_ends_its_process_is_told(file: Path):
    file.write_text("import os\nos._exit(3)\n")
    with (
        RewardPool(file, Reward(function="reward")) as pool,
        pytest.raises(RewardError, match=r"`reward` ended with exit code 3 before it could be called\. Its output"),
    ):
        pool.score(items("good"))


def test_a_file_that_hangs_is_told(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_module, "_START_S", 0.3)
    file.write_text("import time\ntime.sleep(1000)\n")
    with (
        RewardPool(file, Reward(function="reward")) as pool,
        pytest.raises(
            DeadlineExceeded, match=r"`reward` did not execute the experiment file within 0\.3 s\. Look what"
        ),
    ):
        pool.score(items("good"))


def test_an_interrupted_score_leaves_nothing(file: Path):
    def interrupt(number: int, at: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        pool = RewardPool(file, Reward(function="reward"))
        pool.score(items("good"))
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.score(items("spin"))
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert living(file) == []


def test_closing_twice_is_closing_once(file: Path):
    pool = RewardPool(file, Reward(function="reward"))
    pool.close()
    pool.close()


def test_nothing_is_left_if_this_process_dies(file: Path, tmp_path: Path):
    """The function holds the interpreter lock, and has started a process of its own."""
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from trainmaster.workers.functions.pool import Item, Reward, RewardPool\n"
        "pool = RewardPool(Path(sys.argv[1]), Reward(function='reward', timeout_s=1000.0))\n"
        "pool.score([Item('a/0', sys.argv[2], 'spawn', {})])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(file), str(pids)])
    child, grandchild = map(int, pids.read_text().split())
    parent.kill()
    parent.wait()
    assert has_ended(child)
    assert has_ended(grandchild)
