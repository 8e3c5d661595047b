"""Workers that hang, spin, stall or stop, in every phase of a run: found in time, by name, with their stacks.

Each test prints how long after the fault the master knew.
"""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from workbench import Workbench, logged_s, wait_for_step

SETUP_S, CALL_S, SILENCE_S = 12, 3, 5
DEADLINES = ("--run.deadlines.setup_s", str(SETUP_S), "--run.deadlines.call_s", str(CALL_S))
LAYOUT = ("--model.layout.pp", "2", "--run.steps", "2")
MARGIN_S = 1.0
"""On top of a deadline."""
QUICK = {("worker.train_step@1", "spin")}
"""The others run in `make faults` only."""
PHASES = ("worker.open_dataset@0", "worker.load_model@1", "worker.inference@0", "worker.train_step@1", "worker.save@0")


def detection_s(workbench: Workbench) -> float:
    """From the fault, which it says itself, to the first error in the master's log."""
    logs = workbench.folder / "runs" / "test" / "logs"
    (fault_s,) = [
        float(found[1])
        for path in logs.glob("worker-process-*.out")
        for found in re.finditer(r"^failpoint \S+ reached at ([\d.]+)", path.read_text(), re.MULTILINE)
    ]
    seen_s = logged_s(logs / "master.log", " ERROR ")
    assert seen_s is not None, "the master logged no error"
    return seen_s - fault_s


def cases() -> list[object]:
    return [
        pytest.param(phase, fault, marks=() if (phase, fault) in QUICK else pytest.mark.fault)
        for phase in PHASES
        for fault in ("hang", "spin")
    ]


@pytest.mark.parametrize(("phase", "fault"), cases())
def test_a_worker_that_hangs_ends_itself_at_its_deadline(workbench: Workbench, phase: str, fault: str) -> None:
    rank = phase[-1]
    deadline_s = SETUP_S if phase.startswith(("worker.open", "worker.load")) else CALL_S
    done = workbench.run(*LAYOUT, *DEADLINES, TRAINMASTER_FAILPOINT=f"{phase}={fault}")
    took_s = detection_s(workbench)
    print(f"{phase} {fault}: known {took_s - deadline_s:+.2f} s after its deadline of {deadline_s} s")
    assert done.returncode == 1
    assert f"on worker {rank} (pid " in done.stderr
    assert f"took longer than its {deadline_s} s (run.deadlines)" in done.stderr
    assert "in failpoint" in done.stderr, "its stacks are in the error"
    assert "ended itself at a call's deadline" in done.stderr
    assert re.search(r"^in: (set-up|step \d of 2|evaluation after step \d) of run test$", done.stderr, re.MULTILINE)
    assert "likely: a hang (the stacks tell where)" in done.stderr
    assert "logs: " in done.stderr
    assert took_s < deadline_s + MARGIN_S
    assert workbench.wait_until_gone(1.0) == []


@pytest.mark.fault
def test_a_stopped_worker_is_known_within_the_silence(workbench: Workbench) -> None:
    done = workbench.run(*LAYOUT, TRAINMASTER_FAILPOINT="worker.train_step@1=stop")
    took_s = detection_s(workbench)
    print(f"SIGSTOP: known after {took_s:.2f} s")
    assert done.returncode == 1
    assert re.search(r"worker 1 \(pid .*\) sent no sign of life for \d s \(run\.deadlines\.silence_s\)", done.stderr)
    assert took_s < SILENCE_S
    assert workbench.wait_until_gone(1.0) == []


def test_a_killed_worker_is_known_within_a_second(workbench: Workbench) -> None:
    done = workbench.run(*LAYOUT, TRAINMASTER_FAILPOINT="worker.train_step@1")
    took_s = detection_s(workbench)
    print(f"SIGKILL: known after {took_s:.2f} s")
    assert done.returncode == 1
    assert "worker 1" in done.stderr
    assert "in: step 1 of 2 of run test" in done.stderr
    assert "likely: its process was killed" in done.stderr
    assert took_s < 1.0


@pytest.mark.fault
def test_a_worker_that_holds_its_interpreter_for_ten_seconds_is_slow_not_dead(workbench: Workbench) -> None:
    start_s = time.monotonic()
    done = workbench.run(*LAYOUT, TRAINMASTER_FAILPOINT="worker.train_step@1=stall")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start_s > 10
    log = (workbench.folder / "runs" / "test" / "logs" / "master.log").read_text()
    assert re.search(r"worker 1 \(pid .*\) is unresponsive", log)
    assert re.search(r"worker 1 \(pid .*\) answers again after \d+ s", log)
    assert len(workbench.series("train/loss")) == 2


@pytest.mark.fault
def test_workers_of_a_stopped_master_end(workbench: Workbench) -> None:
    process = workbench.start("run", str(workbench.file), *LAYOUT[:2], "--run.steps", "100000")
    wait_for_step(process, 3)
    (master,) = workbench.pids_of("master")
    os.kill(master, signal.SIGSTOP)
    start_s = time.monotonic()
    while workbench.pids_of("worker"):
        assert time.monotonic() - start_s < SILENCE_S + MARGIN_S
        time.sleep(0.05)
    print(f"master SIGSTOP: workers gone after {time.monotonic() - start_s:.2f} s")
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert workbench.wait_until_gone(1.0) == []
