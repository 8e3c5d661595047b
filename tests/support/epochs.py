"""A master inside the test's own process, whose epochs the test begins itself; its workers are processes."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from trainmaster.api.experiment_file import LoadedExperiment, read_experiment_file
from trainmaster.system.control import Control
from trainmaster.system.master import run_epoch
from trainmaster.system.monitoring.metrics import MetricsLog
from trainmaster.system.monitoring.progress import ProgressLine
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.lifecycle import Life
from workbench import Workbench


@dataclass(frozen=True, slots=True)
class Epochs:
    """Of one run."""

    workbench: Workbench
    loaded: LoadedExperiment
    directory: Path
    server: Server
    progress: ProgressLine
    control: Control

    def start_worker(self, **environment: str) -> subprocess.Popen[str]:
        arguments = ("worker", str(self.workbench.file), "--master", self.server.address)
        return self.workbench.start(*arguments, **environment)

    async def run(self, metrics_folder: Path) -> None:
        """One epoch, to the end of the run or the loss of a worker, which it raises."""
        with contextlib.closing(MetricsLog(metrics_folder)) as metrics:
            await run_epoch(self.loaded, self.server, self.directory, metrics, self.progress, self.control)


@contextlib.asynccontextmanager
async def own_epochs(
    workbench: Workbench, overrides: tuple[str, ...], silence_s: float | None = None
) -> AsyncIterator[Epochs]:
    """Serves a run. `silence_s`: instead of the run's own."""
    loaded = read_experiment_file(workbench.file).resolve(overrides)
    compiled, directory = loaded.compiled, workbench.folder / "runs" / "test"
    directory.mkdir()
    server = Server(
        f"ipc://{workbench.folder}/master",
        run=compiled.run.name,
        epoch=1,
        num_workers=compiled.num_workers,
        code_digest=loaded.code_digest,
        silence_s=compiled.run.deadlines.silence_s if silence_s is None else silence_s,
        log_directory=directory / "logs",
    )
    with ProgressLine() as progress:
        async with server:
            control = Control(Life(directory, compiled.run.name, server.address), server, 4, lambda: None)
            yield Epochs(workbench, loaded, directory, server, progress, control)
