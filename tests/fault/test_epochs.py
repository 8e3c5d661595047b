"""One of four workers dies in the middle of a step; the others and a new one go on, in the groups of a new epoch."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from epochs import own_epochs
from trainmaster.api.errors import WorkerLost, first_cause
from workbench import Workbench

LAYOUT = ("--model.layout.dp", "2", "--model.layout.pp", "2", "--run.steps", "3")


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["worker.train_step", "worker.inference"])
def test_survivors_form_the_next_epochs_groups(workbench: Workbench, fault: str) -> None:
    workbench.run_undisturbed(*LAYOUT)
    pids = asyncio.run(asyncio.wait_for(_run(workbench, fault), 120))
    assert workbench.series("train/loss") == workbench.series("train/loss", "undisturbed")
    assert len(pids) == 3, "three of the four lived on"
    assert workbench.wait_until_gone(5.0) == []


async def _run(workbench: Workbench, fault: str) -> set[int]:
    """Returns the pids of workers that were in both epochs."""
    async with own_epochs(workbench, LAYOUT) as epochs:
        first = {epochs.start_worker().pid for _ in range(3)}
        doomed = epochs.start_worker(TRAINMASTER_FAILPOINT=fault).pid
        with pytest.raises(ExceptionGroup) as caught:
            await epochs.run(workbench.folder / "lost")
        cause = first_cause(caught.value)
        assert isinstance(cause, WorkerLost)
        assert re.search(rf"\(pid {doomed} on .*\) closed its connection during call", str(cause))
        start_s = time.monotonic()
        epochs.server.next_epoch()
        second = first | {epochs.start_worker().pid}
        await epochs.run(epochs.directory)
        print(f"{fault}: the next epoch ended {time.monotonic() - start_s:.1f} s after the loss")
        there = {worker.pid for worker in epochs.server.registered}
        assert there == second
    return there & first
