"""The control plane for minutes or days: 16 workers, thousands of validated calls a second, a fault every 20 seconds.

    python benchmarks/soak.py --minutes 3 --json

Every call has a number, and is asked until it is answered: again only if its worker was lost, its epoch ended or its
handler raised. Workers count in a shared file how often they executed each number in each epoch, so that not even
SIGKILL hides one. The faults, in random order (`--seed`):

kill      SIGKILL to a worker; another takes its place in the next epoch
stop      SIGSTOP to a worker for two seconds, then SIGCONT: nothing is lost
hold      a handler that holds its interpreter for two seconds: slow, not dead
raise     a handler that raises
cut       its TCP connections are closed under it (`ss -K`, where this process may)
garbage   a stranger sends ten thousand messages that mean nothing

calls_per_s           the median over seconds without a fault or its recovery
calls_lost            numbers that were never answered
answers_repeated      numbers that were answered twice
executions_repeated   numbers that a worker executed twice in one epoch
recovery_s            by fault: seconds until there were three quarters of the usual calls again, the longest
leaked                processes, descriptors, listening ports and files that are left, or more at the end than at first
rss_drift             anonymous memory, last tenth against second tenth: of the master; the most of any worker
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import rpc
import zmq
from trainmaster.api.errors import RunError
from trainmaster.system.rpc.client import Client
from trainmaster.system.rpc.commands import Command, Echo, Echoed, Result
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.failpoints import hold_the_interpreter
from trainmaster.workers.alarm import Alarm
from trainmaster.workers.service import Worker
from trainmaster.workers.tally import Tally

NUM_WORKERS, IN_FLIGHT = 16, 4
"""Calls under way at each worker."""
FAULT_EVERY_S, FAULT_S, SILENCE_S = 20.0, 2.0, 5.0
OWN_DESCRIPTORS, OWN_FILES = 2, 1
"""The file of answers, and multiprocessing's resource tracker."""
MAX_CALLS = 2**26
"""Numbers that a shared file has room for; it has holes where nothing was written."""
FAULTS = ("kill", "stop", "hold", "raise", "cut", "garbage")


Counts = np.ndarray[tuple[int], np.dtype[np.uint8]]


def counts_in(file: Path) -> Counts:
    """By number. In a file, not in memory that a leak could hide behind."""
    return np.memmap(file, np.uint8, mode="w+", shape=(MAX_CALLS,))


# -- workers ----------------------------------------------------------------------------------------------------------


class CountingHandlers:
    """Answers an echo, and counts that it did."""

    def __init__(self, folder: Path, epoch: int) -> None:
        file = folder / f"{os.getpid()}-{epoch}.executed"
        self._counts = counts_in(file)

    def execute(self, command: Command, step: int = 0) -> Result:
        assert isinstance(command, Echo), "nothing else is asked"
        number, _, fault = command.text.partition(" ")
        if fault == "raise":
            raise RuntimeError("as asked")
        if fault == "hold":
            hold_the_interpreter(FAULT_S)
        self._counts[int(number)] += 1
        return Echoed(text=command.text)

    def abandon(self) -> None:
        pass

    close = abandon


def soaked_worker(rank: int, address: str, folder: str) -> None:
    client = Client(address, rpc.register_of(rank), SILENCE_S)
    client.welcome(60)
    stacks = Path(folder) / f"{os.getpid()}.stacks"
    Worker(client, lambda welcome: CountingHandlers(Path(folder), welcome.epoch), Alarm(stacks), Tally(client)).run()  # type: ignore[arg-type,return-value]
    client.close()


# -- the master -------------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """Calls, faults, and what came of them."""

    folder: Path
    server: Server
    draw: random.Random
    processes: list[BaseProcess] = field(default_factory=list)
    num_numbers: int = 0
    answers: Counts = field(init=False)
    """How often each number was answered."""
    start_s: float = field(default_factory=time.perf_counter)
    per_second: list[int] = field(default_factory=list)
    """Answers."""
    faults: list[tuple[float, str]] = field(default_factory=list)
    samples: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    """KiB of memory and open descriptors by process, every second."""
    is_over: bool = False
    are_there: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while every rank has its worker."""

    def __post_init__(self) -> None:
        self.answers = counts_in(self.folder / "answers")

    # -- workers and calls

    def start_worker(self) -> None:
        process = get_context("spawn").Process(target=soaked_worker, args=(0, self.server.address, str(self.folder)))
        process.start()
        self.processes.append(process)

    async def keep_members(self) -> None:
        """Fills the ranks, again after each loss, in a new epoch."""
        while True:
            await rpc.welcome_all(self.server, NUM_WORKERS, self.folder)
            self.are_there.set()
            await asyncio.wait([self.server.lost])
            self.are_there.clear()
            self.bury()
            self.server.next_epoch()
            for _ in range(NUM_WORKERS - len(self.server.registered)):
                self.start_worker()

    def bury(self) -> None:
        for process in [each for each in self.processes if not each.is_alive()]:
            self.processes.remove(process)
            process.close()

    async def keep_calling(self, rank: int) -> None:
        while not self.is_over:
            await self.call(rank)

    async def call(self, rank: int, fault: str = "") -> None:
        """One number, until it is answered. The fault comes with the first attempt only."""
        self.num_numbers += 1
        number = self.num_numbers
        text = f"{number} {fault}"
        while True:
            await self.are_there.wait()
            try:
                await self.server.ask({rank: Echo(text=text)}, name="echo", deadline_s=60)
            except RunError:
                text = f"{number} "
                await asyncio.sleep(0)
            else:
                self.answers[number] += 1
                second = int(time.perf_counter() - self.start_s)
                self.per_second += [0] * (second + 1 - len(self.per_second))
                self.per_second[second] += 1
                return

    # -- faults

    async def keep_failing(self) -> None:
        kinds: list[str] = []
        while not self.is_over:
            await asyncio.sleep(FAULT_EVERY_S)
            kinds = kinds or self.draw.sample(FAULTS, len(FAULTS))
            kind = kinds.pop()
            if kind == "cut" and not can_cut():
                kind = "garbage"
            self.faults.append((time.perf_counter(), kind))
            sys.stderr.write(f"{kind}\n")
            await self.fail(kind)

    async def fail(self, kind: str) -> None:
        victim = self.draw.choice([process for process in self.processes if process.is_alive()])
        assert victim.pid is not None, "it was started"
        match kind:
            case "kill":
                os.kill(victim.pid, signal.SIGKILL)
            case "stop":
                os.kill(victim.pid, signal.SIGSTOP)
                await asyncio.sleep(FAULT_S)
                os.kill(victim.pid, signal.SIGCONT)
            case "hold" | "raise":
                await self.call(self.draw.randrange(NUM_WORKERS), kind)
            case "cut":
                port = self.server.address.rsplit(":", 1)[1]
                await asyncio.to_thread(subprocess.run, ["ss", "-K", "dport", "=", port], capture_output=True)
            case "garbage":
                await asyncio.to_thread(send_garbage, self.server.address, self.draw.randbytes(64))

    # -- what the processes take

    async def keep_looking(self) -> None:
        while True:
            pids = [os.getpid(), *(each.pid for each in self.processes if each.is_alive() and each.pid is not None)]
            looks = {pid: look for pid in pids if (look := usage(pid)) is not None}
            self.samples.append(looks)
            await asyncio.sleep(1)

    def drift(self) -> dict[str, float]:
        """Of the master, and the largest of the workers that were there from the second tenth on."""
        tenth = len(self.samples) // 10
        early, late = self.samples[tenth : 2 * tenth], self.samples[-tenth:]
        pids = set.intersection(*(set(each) for each in (*early, *late)))

        def of(pid: int) -> float:
            before, after = (statistics.median(each[pid][0] for each in part) for part in (early, late))
            return after / before - 1

        workers = [of(pid) for pid in pids if pid != os.getpid()]
        return {"master": of(os.getpid()), "workers": max(workers, default=0.0), "num_workers": len(workers)}

    def more_descriptors(self) -> int:
        """The most that any process has more at the end than at first."""
        tenth = len(self.samples) // 10
        early, late = self.samples[tenth], self.samples[-1]
        return max(late[pid][1] - early[pid][1] for pid in set(early) & set(late))


def usage(pid: int) -> tuple[int, int] | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]), len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, ValueError):
        return None  # it ended just now


def can_cut() -> bool:
    return os.geteuid() == 0 and shutil.which("ss") is not None


def send_garbage(address: str, seed: bytes) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 1000)
        dealer.connect(address)
        draw = random.Random(seed)
        for _ in range(10_000):
            dealer.send_multipart([draw.randbytes(draw.randrange(100)) for _ in range(draw.randrange(1, 5))])


# -- the whole --------------------------------------------------------------------------------------------------------


async def soak(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    before = set(os.listdir("/proc/self/fd"))
    server = Server("tcp://127.0.0.1:*", "bench", 1, NUM_WORKERS, "none", SILENCE_S, folder)
    port = int(server.address.rsplit(":", 1)[1])
    this = Soak(folder, server, random.Random(seed))
    async with server:
        for _ in range(NUM_WORKERS):
            this.start_worker()
        members = asyncio.create_task(this.keep_members())
        await this.are_there.wait()
        this.start_s = time.perf_counter()
        callers = [
            asyncio.create_task(this.keep_calling(rank)) for rank in range(NUM_WORKERS) for _ in range(IN_FLIGHT)
        ]
        others = [asyncio.create_task(this.keep_failing()), asyncio.create_task(this.keep_looking())]
        await asyncio.sleep(seconds)
        this.is_over = True
        others[0].cancel()
        await asyncio.wait_for(asyncio.gather(*callers), 60)
        for task in (members, *others):
            task.cancel()
    return await asyncio.to_thread(report, this, seconds, before, port)


def report(this: Soak, seconds: float, before: set[str], port: int) -> dict[str, Any]:
    """After the end. `before`: descriptors that were open before the beginning."""
    known = {str(pid) for look in this.samples for pid in look}
    files = [path for path in this.folder.iterdir() if path.name.split("-")[0].split(".")[0] not in known]
    for process in this.processes:
        process.join(10)
    left = [process.pid for process in this.processes if process.is_alive()]
    for process in this.processes:
        process.close() if process.pid not in left else None
    descriptors = set(os.listdir("/proc/self/fd")) - before
    answers = this.answers[1 : this.num_numbers + 1]
    return {
        **rates(this, seconds),
        "calls": this.num_numbers,
        "calls_lost": int((answers == 0).sum()),
        "answers_repeated": int((answers > 1).sum()),
        **executions(this.folder, this.num_numbers),
        "faults": dict(Counter(kind for _, kind in this.faults)),
        "leaked": {
            "processes": len(left),
            "descriptors": max(this.more_descriptors(), len(descriptors) - OWN_DESCRIPTORS),
            "listening_ports": int(is_listening(port)),
            "files": len(files) - OWN_FILES,
        },
        "rss_drift": this.drift(),
    }


def executions(folder: Path, num_numbers: int) -> dict[str, int]:
    counts = [np.memmap(path, np.uint8, mode="r")[: num_numbers + 1] for path in folder.glob("*.executed")]
    total = sum(each.astype(np.int64) for each in counts)
    return {
        "executions_repeated": int(sum((each > 1).sum() for each in counts)),
        "never_executed": int((total[1:] == 0).sum()),
    }


def is_listening(port: int) -> bool:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port for line in lines)


def rates(this: Soak, end_s: float) -> dict[str, Any]:
    seconds = np.asarray(this.per_second)[1 : int(end_s)]
    usual = float(np.median(seconds))
    recovery: dict[str, float] = {}
    quiet = np.ones(len(seconds), bool)
    for at_s, kind in this.faults:
        first = int(at_s - this.start_s) - 1
        bad = np.flatnonzero(seconds[first : first + int(FAULT_EVERY_S)] < 0.75 * usual)
        back = first + 1 + int(bad[-1]) if len(bad) else first
        quiet[max(0, first) : back + 1] = False
        recovery[kind] = max(recovery.get(kind, 0.0), float(back - first))
    return {"calls_per_s": float(np.median(seconds[quiet])) if quiet.any() else usual, "recovery_s": recovery}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = asyncio.run(soak(60 * options.minutes, options.seed, Path(name)))
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    result |= {"minutes": options.minutes, "machine": machine}
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
