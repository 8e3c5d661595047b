"""Workers and masters that outlived their time: refused, while the run they belonged to goes on without them.

Each test prints what it measured.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from epochs import own_epochs
from stage import SERVED_S, Actor, Stage, state
from trainmaster.api.errors import WorkerLost, first_cause
from trainmaster.system.rpc.client import EXIT_MASTER_LOST
from wire import EPOCH, free_address
from workbench import Workbench, wait_for_step

LAYOUT = ("--model.layout.pp", "2", "--run.steps", "40")

# -- workers of another life ------------------------------------------------------------------------------------------


def ended_s(worker: Actor, start_s: float) -> float:
    """Since `start_s`, until the worker ended itself."""
    assert worker.process.wait(20) == EXIT_MASTER_LOST, worker.log.read_text()
    return time.monotonic() - start_s


@pytest.mark.fault
def test_a_worker_that_was_stopped_and_given_up_is_refused_when_it_goes_on(stage: Stage) -> None:
    server, address = stage.server(free_address(), silence_s=2.0)
    stale = stage.worker(address, "stale")
    assert server.ask("workers") == {"workers": [stale.pid]}
    server.ask("hold")
    assert stale.hear() == "function 1"
    os.kill(stale.pid, signal.SIGSTOP)
    start_s = time.monotonic()
    assert "during held" in server.ask("next")["lost"]
    lost_s = time.monotonic() - start_s
    fresh = stage.worker(address, "fresh")
    assert server.ask("workers") == {"workers": [fresh.pid]}
    server.ask("hold")
    assert fresh.hear() == "function 2"
    stale.say("now reply")
    os.kill(stale.pid, signal.SIGCONT)
    gone_s = ended_s(stale, time.monotonic())
    print(f"stopped worker: lost after {lost_s:.2f} s, ended {gone_s:.2f} s after it went on")
    assert "the master refuses this worker: it was given up as lost" in stale.log.read_text()
    assert server.ask("state") == state(fresh)
    fresh.say("reply")
    assert server.ask("echo")["echo_s"] < SERVED_S
    assert server.ask("state")["settled"]


@pytest.mark.fault
def test_a_late_reply_to_a_killed_master_changes_nothing_for_the_next(stage: Stage) -> None:
    first, address = stage.server(free_address(), epoch=EPOCH)
    worker = stage.worker(address)
    assert first.ask("workers") == {"workers": [worker.pid]}
    first.ask("hold")
    assert worker.hear() == "function 1"
    first.process.kill()
    first.process.wait()
    start_s = time.monotonic()
    second, _ = stage.server(address, epoch=EPOCH + 1)
    assert second.ask("workers") == {"workers": [worker.pid]}
    print(f"killed master: the next one has its worker after {time.monotonic() - start_s:.2f} s")
    second.ask("hold")  # under the same id as the old one
    worker.say("reply to the first")
    assert second.ask("echo")["echo_s"] < SERVED_S
    assert worker.hear() in ("function 1", "compute 2")
    assert second.ask("state") == state(worker)
    worker.say("reply to the second")
    second.ask("echo")
    assert second.ask("state")["settled"]


@pytest.mark.fault
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_training_worker_of_an_older_epoch_changes_nothing_in_the_next(
    workbench: Workbench, num_workers: int
) -> None:
    """It stops in the middle of a step, is replaced, and goes on when the others are in the next epoch's steps.

    Of two workers, the other waits for it in a collective operation meanwhile.
    """
    overrides = ("--model.layout.dp", str(num_workers), "--run.steps", "30")
    workbench.run_undisturbed(*overrides)
    asyncio.run(asyncio.wait_for(_outlived(workbench, overrides, num_workers), 60))
    assert workbench.series("train/loss") == workbench.series("train/loss", "undisturbed")
    assert workbench.wait_until_gone(5.0) == []


async def _outlived(workbench: Workbench, overrides: tuple[str, ...], num_workers: int) -> None:
    async with own_epochs(workbench, overrides, silence_s=2.0) as epochs:
        stay = {epochs.start_worker().pid for _ in range(num_workers - 1)}
        stale = epochs.start_worker(TRAINMASTER_FAILPOINT="worker.train_step=stop")
        with pytest.raises(ExceptionGroup) as caught:
            await epochs.run(workbench.folder / "lost")
        assert isinstance(first_cause(caught.value), WorkerLost), caught.value
        epochs.server.next_epoch()
        comes = epochs.start_worker()
        going_on = asyncio.create_task(_go_on(stale, epochs.directory))
        await epochs.run(epochs.directory)
        took_s = await going_on
        print(f"stopped in a step: ended {took_s:.2f} s after it went on, in the next epoch")
        assert {worker.pid for worker in epochs.server.registered} == stay | {comes.pid}
    assert stale.stderr is not None
    assert "the master refuses this worker: it was given up as lost" in stale.stderr.read()


async def _go_on(stale: subprocess.Popen[str], directory: Path) -> float:
    """Continues a stopped worker once a step has been taken without it. Returns seconds until it ended."""
    await asyncio.to_thread(_wait_for_a_step, directory / "metrics.jsonl")
    os.kill(stale.pid, signal.SIGCONT)
    start_s = time.monotonic()
    assert await asyncio.to_thread(stale.wait, 20) == EXIT_MASTER_LOST
    return time.monotonic() - start_s


def _wait_for_a_step(metrics: Path) -> None:
    end_s = time.monotonic() + 60
    while not (metrics.exists() and '"train/loss"' in metrics.read_text()):
        assert time.monotonic() < end_s, "no step was taken"
        time.sleep(0.02)


# -- two masters ------------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_second_master_on_a_run_directory_is_refused_and_the_first_goes_on(workbench: Workbench) -> None:
    workbench.run_undisturbed(*LAYOUT)
    addresses = [f"ipc://{workbench.folder}/{name}" for name in ("m1", "m2")]
    first = workbench.start("master", str(workbench.file), "--bind", addresses[0], *LAYOUT)
    for _ in range(2):
        workbench.start("worker", str(workbench.file), "--master", addresses[0])
    wait_for_step(first, 2)
    directory = workbench.folder / "runs" / "test"
    before = inodes(directory)
    start_s = time.monotonic()
    second = workbench.start("master", str(workbench.file), "--bind", addresses[1], *LAYOUT)
    _, err = second.communicate(timeout=30)
    took_s = time.monotonic() - start_s
    was_running = first.poll() is None
    assert before.items() <= inodes(directory).items(), "no file of the first is touched"
    print(f"second master: refused after {took_s:.2f} s: {err.strip()}")
    assert second.returncode == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert f"this run is going on in {directory} (pid {first.pid} on " in errors[0]
    assert "remove the directory" not in err
    assert "Traceback" not in err
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert was_running, "the first was still at work when the second came"
    assert workbench.series("train/loss") == workbench.series("train/loss", "undisturbed")
    assert workbench.wait_until_gone(5.0) == []


def inodes(directory: Path) -> dict[str, int]:
    """Of the files that a run has only one of."""
    return {
        str(path): path.stat().st_ino for path in directory.rglob("*") if path.suffix in (".log", ".jsonl", ".stacks")
    }
