"""Each in a process of its own: an alarm that goes off ends it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, threading, time
from pathlib import Path
from trainmaster.system.service.failpoints import failpoint
from trainmaster.workers.alarm import Alarm

alarm = Alarm(Path(sys.argv[1]) / "logs" / "worker-0.stacks")

def the_culprit():
    {body}

the_culprit()
print("over")
"""


def run(folder: Path, body: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, what it printed, and the stacks that it left."""
    script = SCRIPT.format(body=body.strip().replace("\n", "\n    "))
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment | {"PATH": "", "PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    assert not done.stderr or done.returncode, done.stderr
    return done.returncode, done.stdout, (folder / "logs" / "worker-0.stacks").read_text()


@pytest.mark.parametrize("fault", ["hang", "spin"])
def test_at_the_deadline_the_process_ends_and_leaves_its_stacks(tmp_path: Path, fault: str):
    body = "with alarm.within(0.2):\n    failpoint('here')"
    code, out, stacks = run(tmp_path, body, TRAINMASTER_FAILPOINT=f"here={fault}")
    assert (code, out) == (-signal.SIGALRM, "")
    assert "in the_culprit" in stacks
    assert "most recent call first" in stacks


def test_a_lock_in_another_thread_shows_in_the_stacks(tmp_path: Path):
    body = """
lock = threading.Lock()
def holds_on():
    with alarm.within(0.2):
        lock.acquire()
lock.acquire()
thread = threading.Thread(target=holds_on)
thread.start()
thread.join()"""
    code, _, stacks = run(tmp_path, body)
    assert code == -signal.SIGALRM
    assert "in holds_on" in stacks
    assert "in the_culprit" in stacks


def test_a_block_left_in_time_disarms_it(tmp_path: Path):
    body = """
for _ in range(3):
    with alarm.within(0.1):
        pass
try:
    with alarm.within(0.1):
        raise ValueError
except ValueError:
    time.sleep(0.2)"""
    assert run(tmp_path, body) == (0, "over\n", "")


def test_blocks_of_many_threads_leave_the_timer_off(tmp_path: Path):
    body = """
import random, signal
def works(seed):
    draw = random.Random(seed)
    for _ in range(500):
        with alarm.within(draw.uniform(10.0, 60.0)), alarm.within(draw.uniform(10.0, 60.0)):
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
threads = [threading.Thread(target=works, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)"""
    assert run(tmp_path, body) == (0, "over\n", "")


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-12])
def test_a_deadline_that_has_passed_ends_it_at_once(tmp_path: Path, seconds: float):
    code, _, stacks = run(tmp_path, f"with alarm.within({seconds}):\n    time.sleep(1)")
    assert (code, bool(stacks)) == (-signal.SIGALRM, True)


def test_the_earliest_of_several_counts(tmp_path: Path):
    inner_ends_it = "with alarm.within(60.0):\n    with alarm.within(0.1):\n        time.sleep(1)"
    outer_ends_it = "with alarm.within(0.2):\n    with alarm.within(60.0):\n        time.sleep(1)"
    after_the_inner = "with alarm.within(0.3):\n    with alarm.within(0.2):\n        pass\n    time.sleep(1)"
    for body in (inner_ends_it, outer_ends_it, after_the_inner):
        code, _, stacks = run(tmp_path, body)
        assert (code, bool(stacks)) == (-signal.SIGALRM, True), body
