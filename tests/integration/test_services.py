"""Master and workers as separate services, in any order; signals; refusals."""

from __future__ import annotations

import signal
import socket
import time

import pytest
from workbench import Workbench

FRESH = {"TRAINMASTER_TEST_FRESH": "1"}
"""New interpreters: see `preloaded`."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_services_started_apart_equal_one_command(workbench: Workbench) -> None:
    done = workbench.run("--run.name", "together", "--model.layout.pp", "2")
    assert done.returncode == 0, done.stderr
    address = f"tcp://127.0.0.1:{free_port()}"
    early = workbench.start("worker", str(workbench.file), "--master", address, **FRESH)  # before there is a master
    overrides = ("--run.name", "apart", "--model.layout.pp", "2")
    master = workbench.start("master", str(workbench.file), "--bind", address, *overrides, **FRESH)
    other = workbench.folder / "other.py"
    other.write_text(workbench.file.read_text() + "\n# edited\n")
    stranger = workbench.start("worker", str(other), "--master", address)
    _, refused = stranger.communicate(timeout=60)
    assert stranger.returncode == 2
    assert "differs from the master's" in refused
    late = workbench.start("worker", str(workbench.file), "--master", address, **FRESH)
    for process in (master, early, late):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert workbench.series("train/loss", "apart") == workbench.series("train/loss", "together")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(number: signal.Signals, workbench: Workbench) -> None:
    process = workbench.start("run", str(workbench.file), "--run.steps", "100000", "--model.layout.dp", "2")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    start_s = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert workbench.wait_until_gone(1.0) == []
    assert time.monotonic() - start_s < 10


def test_children_end_with_a_killed_launcher(workbench: Workbench) -> None:
    process = workbench.start("run", str(workbench.file), "--run.steps", "100000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    assert len(workbench.survivors()) == 3
    process.kill()
    assert workbench.wait_until_gone(10.0) == []


def test_a_missing_worker_is_named(workbench: Workbench) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    master = workbench.start(
        "master", str(workbench.file), "--bind", address, "--run.deadlines.register_s", "1", "--model.layout.pp", "2"
    )
    _, err = master.communicate(timeout=30)
    assert master.returncode == 1
    assert "only 0 of 2 workers registered" in err


def test_a_worker_without_a_master_gives_up(workbench: Workbench) -> None:
    workbench.file.write_text(
        workbench.file.read_text()
        .replace("threads=1", "threads=1, deadlines=Deadlines(register_s=1)")
        .replace("import SFT", "import SFT, Deadlines")
    )
    worker = workbench.start("worker", str(workbench.file), "--master", f"tcp://127.0.0.1:{free_port()}")
    _, err = worker.communicate(timeout=60)
    assert worker.returncode == 1
    assert "no master answered" in err
