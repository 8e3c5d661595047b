"""`trainmaster run`: one master and its workers as child services of this process, on this machine.

    this process --starts, follows--> master  (ipc socket in a private folder)
                 --starts, follows--> worker 0 ... n-1

Guarantees: when this process ends, by whatever cause, no child is left: children end when their standard input closes.
A child that dies is reported by name, signal and last words; the master gets a moment to say more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...api.errors import ConfigError
from ..rpc.client import EXIT_RUN_FAILED
from ..service.keys import DIRECTORY, has_keys
from ..service.notify import environment_of_children

logger = logging.getLogger(__name__)

CHILD_FLAG = "--child"
_MASTER_GRACE_S = 6.0
"""For the master to end by itself after a worker died, or after a signal."""
_WORKER_GRACE_S = 6.0
"""For workers to end by themselves after the master did."""
_KILL_GRACE_S = 1.0


@dataclass(slots=True)
class Child:
    """One service."""

    name: str
    process: asyncio.subprocess.Process
    ended: asyncio.Task[int]
    output: Path | None
    """Where its standard output and error go; None for ours."""


@dataclass(frozen=True, slots=True)
class LocalRun:
    """What to start. The run directory exists and is ours."""

    file: Path
    overrides: Sequence[str]
    num_workers: int
    run_directory: Path
    master_flags: Sequence[str] = ()

    async def follow(self) -> int:
        """Starts everything, waits for the end, leaves nothing behind. Returns an exit code."""
        stop = asyncio.Event()
        received: list[signal.Signals] = []

        def on_signal(number: signal.Signals) -> None:
            received.append(number)
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        children: list[Child] = []
        with tempfile.TemporaryDirectory(prefix="trainmaster-", dir=_short_folder()) as folder:
            address = f"ipc://{folder}/master"
            try:
                children.append(await self._start_master(address))
                for index in range(self.num_workers):
                    children.append(await self._start_worker(index, address))
                code = await self._wait(children, stop)
            finally:
                await _end(children)
        return 128 + received[0] if received else code

    async def _start_master(self, address: str) -> Child:
        return await _start(
            "master", ["master", str(self.file), "--bind", address, *self.master_flags, *self.overrides], None
        )

    async def _start_worker(self, index: int, address: str) -> Child:
        output = self.run_directory / "logs" / f"worker-process-{index}.out"
        arguments, keys = ["worker", str(self.file), "--master", address], self.run_directory / DIRECTORY
        if has_keys(keys):
            arguments += ["--keys", str(keys / f"worker-{index}.key")]
        return await _start(f"worker process {index}", arguments, output)

    async def _wait(self, children: list[Child], stop: asyncio.Event) -> int:
        """Until the master ends, a worker dies, or we are told to stop. Returns an exit code."""
        master, workers = children[0], children[1:]
        stopping = asyncio.create_task(stop.wait())
        try:
            waiting: set[asyncio.Task[Any]] = {stopping, *(child.ended for child in children)}  # Any: nobody reads them
            while waiting and not stopping.done() and not master.ended.done() and not _dead(workers):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            dead = _dead(workers)  # now: those that end after the master were told to
            if stopping.done() and not master.ended.done():
                master.process.terminate()
            await asyncio.wait([master.ended], timeout=_MASTER_GRACE_S)
            code = master.ended.result() if master.ended.done() else 1
            if code < 0:
                dead, code = [*dead, master], 1
            if not stopping.done() and code != ConfigError.exit_code:  # a user's mistake is told by the master alone
                for child in dead:
                    sys.stderr.write(_obituary(child))
            return (code or 1) if dead else code
        finally:
            stopping.cancel()


def _dead(children: list[Child]) -> list[Child]:
    """Those that ended by themselves, rather than because the master told them to."""
    return [child for child in children if child.ended.done() and child.ended.result() not in (0, EXIT_RUN_FAILED)]


async def _start(name: str, arguments: list[str], output: Path | None) -> Child:
    with contextlib.ExitStack() as stack:
        sink = None
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            sink = stack.enter_context(output.open("wb"))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the current folder's modules are not ours to import
            "-m",
            "trainmaster",
            *arguments,
            CHILD_FLAG,
            stdin=asyncio.subprocess.PIPE,  # never written: its end tells the child that we are gone
            stdout=sink,
            stderr=sink,
            env=environment_of_children(),
            start_new_session=True,  # a Ctrl-C at the terminal comes to us alone
        )
    return Child(name, process, asyncio.create_task(process.wait(), name=name), output)


async def _end(children: list[Child]) -> None:
    """Waits for children that are about to end, then ends the others."""
    running = [child for child in children if not child.ended.done()]
    if running:
        await asyncio.wait([child.ended for child in running], timeout=_WORKER_GRACE_S if _is_over(children) else 0)
    for kill in (False, True):
        running = [child for child in children if not child.ended.done()]
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                child.process.kill() if kill else child.process.terminate()
        if running:
            await asyncio.wait([child.ended for child in running], timeout=_KILL_GRACE_S)


def _is_over(children: list[Child]) -> bool:
    """Whether the master ended well, so that the workers are on their way out too."""
    return children[0].ended.done() and children[0].ended.result() == 0


def _short_folder() -> str | None:
    """A socket's path has room for about 100 characters: a long TMPDIR will not do."""
    return "/tmp" if len(tempfile.gettempdir()) > 60 and os.path.isdir("/tmp") else None


def _obituary(child: Child) -> str:
    code = child.ended.result()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    if code == -signal.SIGALRM:
        how = "ended itself at a call's deadline"
    where = "its logs are in the run directory" if child.output is None else f"its output is in {child.output}"
    text = f"error: {child.name} (pid {child.process.pid}) {how}; {where}\n"
    if child.output is not None:
        last = child.output.read_text(errors="replace").splitlines()[-15:]
        text += "".join(f"  | {line}\n" for line in last)
    return text
