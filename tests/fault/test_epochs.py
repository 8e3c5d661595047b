"""One of four workers dies in the middle of a step; the others and a new one go on, in the groups of a new epoch."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest
from trainmaster.api.errors import WorkerLost
from trainmaster.api.experiment_file import LoadedExperiment, read_experiment_file
from trainmaster.system.control import Control
from trainmaster.system.dispatch import first_cause
from trainmaster.system.master import run_epoch
from trainmaster.system.monitoring.metrics import MetricsLog
from trainmaster.system.monitoring.progress import ProgressLine
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.lifecycle import Life
from workbench import Workbench

LAYOUT = ("--model.layout.dp", "2", "--model.layout.pp", "2", "--run.steps", "3")


def start_worker(workbench: Workbench, address: str, **environment: str) -> int:
    return workbench.start("worker", str(workbench.file), "--master", address, **environment).pid


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["worker.train_step", "worker.inference"])
def test_survivors_form_the_next_epochs_groups(workbench: Workbench, fault: str) -> None:
    done = workbench.run("--run.name", "undisturbed", *LAYOUT)
    assert done.returncode == 0, done.stderr
    loaded = read_experiment_file(workbench.file).resolve(LAYOUT)
    directory = workbench.folder / "runs" / "test"
    directory.mkdir()
    pids = asyncio.run(asyncio.wait_for(_run(workbench, loaded, directory, fault), 120))
    assert workbench.series("train/loss") == workbench.series("train/loss", "undisturbed")
    assert len(pids) == 3, "three of the four lived on"
    assert workbench.wait_until_gone(5.0) == []


async def _run(workbench: Workbench, loaded: LoadedExperiment, directory: Path, fault: str) -> set[int]:
    """Returns the pids of workers that were in both epochs."""
    compiled = loaded.compiled
    server = Server(
        f"ipc://{workbench.folder}/master",
        run=compiled.run.name,
        epoch=1,
        num_workers=compiled.num_workers,
        code_digest=loaded.code_digest,
        silence_s=compiled.run.deadlines.silence_s,
        log_directory=directory / "logs",
    )
    with ProgressLine() as progress:
        async with server:
            control = Control(Life(directory, compiled.run.name, server.address), server, 4, lambda: None)
            first = {start_worker(workbench, server.address) for _ in range(3)}
            doomed = start_worker(workbench, server.address, TRAINMASTER_FAILPOINT=fault)
            lost = MetricsLog(workbench.folder / "lost")
            with pytest.raises(ExceptionGroup) as caught:
                await run_epoch(loaded, server, directory, lost, progress, control)
            cause = first_cause(caught.value)
            assert isinstance(cause, WorkerLost)
            assert re.search(rf"\(pid {doomed} on .*\) closed its connection during call", str(cause))
            lost.close()
            start_s = time.monotonic()
            server.next_epoch()
            second = first | {start_worker(workbench, server.address)}
            metrics = MetricsLog(directory)
            await run_epoch(loaded, server, directory, metrics, progress, control)
            metrics.close()
            print(f"{fault}: the next epoch ended {time.monotonic() - start_s:.1f} s after the loss")
            there = {worker.pid for worker in server.registered}
            assert there == second
    return there & first
