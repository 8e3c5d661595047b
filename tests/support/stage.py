"""A server, workers and strangers, each a process or socket of its own, that a test directs line by line.

    test --"echo"--> server <----> worker <--"now reply"-- test
                        ^
         test --garbage-+   (a socket of the test's)

What the processes do is in `actors`.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import actors
import zmq
from wire import EPOCH, free_address

MAX_GROWTH_BYTES = 64 * 2**20
"""Of a process's memory, whatever strangers send."""
SERVED_S = 1.0
"""For a worker that belongs to be served, whatever strangers do."""


@dataclass
class Actor:
    """A process. What it says comes by lines; its standard error goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, word: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")

    def hear(self, deadline_s: float = 30.0) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], deadline_s)
        assert ready, f"nothing was said within {deadline_s:g} s: {self.log.read_text()[-2000:]}"
        line = self.process.stdout.readline().decode()
        assert line, f"it ended: {self.log.read_text()[-2000:]}"
        return line.strip()

    def ask(self, word: str, deadline_s: float = 90.0) -> dict[str, Any]:  # Any: JSON
        self.say(word)
        return json.loads(self.hear(deadline_s))


@dataclass
class Stage:
    """The processes and sockets of one test. A context manager, which ends them."""

    folder: Path
    popen: type[subprocess.Popen[Any]]
    """Starts the processes: see `preloaded`."""
    log_level: str = "WARNING"
    """From which on servers log."""
    actors: list[Actor] = field(default_factory=list)
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    sockets: list[zmq.Socket[bytes]] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self.actors:
            actor.process.kill()
            actor.process.communicate()
        for each in self.sockets:
            each.close(linger=0)
        self.context.term()

    def server(
        self, address: str, epoch: int = EPOCH, silence_s: float = 10.0, keys: Path | None = None
    ) -> tuple[Actor, str]:
        """One for a single worker, and where it is bound."""
        options = (str(epoch), str(silence_s), str(self.folder), self.log_level, *_optional(keys))
        server = self._start("server", address, *options)
        return server, json.loads(server.hear())["address"]

    def worker(self, address: str, incarnation: str = "legal", key: Path | None = None, talks: bool = True) -> Actor:
        """`talks`: whether it says which requests come, of which it takes those of lane `function` when told to."""
        return self._start("worker", address, incarnation, "talks" if talks else "works", *_optional(key))

    def served(self, keys: Path | None = None) -> tuple[Actor, Actor, str]:
        """A server on a TCP port that works with its worker, which does not talk."""
        address = free_address()
        server, bound = self.server(address, keys=keys)
        assert bound == address
        worker = self.worker(address, key=None if keys is None else keys / "worker-0.key", talks=False)
        assert server.ask("workers") == {"workers": [worker.pid]}
        assert server.ask("echo")["echo_s"] < SERVED_S
        return server, worker, address

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        made = self.context.socket(kind)
        made.setsockopt(zmq.SNDTIMEO, 30_000)
        made.setsockopt(zmq.RCVTIMEO, 60_000)
        self.sockets.append(made)
        return made

    def server_log(self, epoch: int = EPOCH) -> Path:
        return self.folder / f"server-{epoch}.log"

    def _start(self, *arguments: str) -> Actor:
        log = self.folder / f"actor-{len(self.actors)}.err"
        with log.open("wb") as sink:
            process = self.popen(
                [sys.executable, actors.__file__, *arguments],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
            )
        self.actors.append(Actor(process, log))
        return self.actors[-1]


def state(worker: Actor, *, is_settled: bool = False, num_refused: int = 0) -> dict[str, object]:
    """What a server says of itself that has this worker and lost none."""
    return {"workers": [worker.pid], "settled": is_settled, "refused": num_refused, "lost": ""}


def _optional(path: Path | None) -> tuple[str, ...]:
    return () if path is None else (str(path),)
