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
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
        with tempfile.TemporaryDirectory(prefix="trainmaster-") as folder:
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
        return await _start("master", ["master", str(self.file), "--bind", address, *self.overrides], None)

    async def _start_worker(self, index: int, address: str) -> Child:
        output = self.run_directory / "logs" / f"worker-process-{index}.out"
        return await _start(f"worker process {index}", ["worker", str(self.file), "--master", address], output)

    async def _wait(self, children: list[Child], stop: asyncio.Event) -> int:
        master, workers = children[0], children[1:]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopping, *(child.ended for child in children)], return_when=asyncio.FIRST_COMPLETED)
            if not master.ended.done():
                if stopping.done():
                    master.process.terminate()
                await asyncio.wait([master.ended], timeout=_MASTER_GRACE_S)
            dead = [child for child in workers if child.ended.done() and child.ended.result() != 0]
            if stopping.done() or not dead:
                return master.ended.result() if master.ended.done() else 1
            code = master.ended.result() if master.ended.done() else 1
            if code != 2:  # a user's mistake is told by the master alone
                for child in dead:
                    sys.stderr.write(_obituary(child))
            return code or 1
        finally:
            stopping.cancel()


async def _start(name: str, arguments: list[str], output: Path | None) -> Child:
    with contextlib.ExitStack() as stack:
        sink = None
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            sink = stack.enter_context(output.open("wb"))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "trainmaster",
            *arguments,
            CHILD_FLAG,
            stdin=asyncio.subprocess.PIPE,  # never written: its end tells the child that we are gone
            stdout=sink,
            stderr=sink,
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


def _obituary(child: Child) -> str:
    code = child.ended.result()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    text = f"error: {child.name} (pid {child.process.pid}) {how}; its output is in {child.output}\n"
    if child.output is not None:
        last = child.output.read_text(errors="replace").splitlines()[-15:]
        text += "".join(f"  | {line}\n" for line in last)
    return text
