"""What the processes of a `Stage` run: a server that does what it is told by lines, or a worker that answers echoes.

Each line that a server hears is a command, answered by one line of JSON. This file is run by its path.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
from trainmaster.api.errors import DeadlineExceeded, WorkerLost
from trainmaster.system.rpc.client import Client
from trainmaster.system.rpc.commands import Echo, Echoed
from trainmaster.system.rpc.messages import Lane, Reply, Success
from trainmaster.system.rpc.peer import Answer
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.keys import load_master_keys, load_worker_keys
from trainmaster.system.service.logs import log_to_file, log_to_stderr
from wire import DIGEST, RUN, register, welcome

NUM_ECHOES = 200


class ServingActor:
    """A server of one worker."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._held: asyncio.Future[Answer] | None = None

    async def obey(self, command: str) -> dict[str, object]:
        """What to answer."""
        match command:
            case "workers":
                return {"workers": await self._welcome()}
            case "hold":  # a lane whose requests our worker answers when it is told to
                self._held = self._server.ask({0: Echo()}, name="held", deadline_s=600, lane=Lane.FUNCTION)
                return {"held": True}
            case "echo":
                return {"echo_s": await self._echo()}
            case "echoes":
                took_s = sorted([await self._echo() for _ in range(NUM_ECHOES)])
                return {"p50_s": took_s[NUM_ECHOES // 2], "worst_s": took_s[-1]}
            case "next":
                return {"lost": await self._next_epoch()}
            case "break":
                self._server._port._gate._answer = None
                return {"broken": True}
            case "hang":
                self._server._port._gate._answer = lambda question: threading.Event().wait()
                return {"hung": True}
            case "threads":
                return {"threads": [thread.name for thread in threading.enumerate()]}
            case "state":
                return self._state()
            case _:
                raise ValueError(f"{command!r} is no command")

    async def _welcome(self) -> list[int]:
        await self._server.workers(30)
        told = {"run": self._server.run, "epoch": self._server.epoch, "log_directory": str(self._folder)}
        self._server.welcome(lambda rank: welcome(rank, **told, orphan_s=20.0))
        return self._pids()

    async def _echo(self) -> float:
        """How long it took, in seconds."""
        content = (np.arange(25),)
        start_s = time.monotonic()
        answers = await self._server.ask({0: Echo(content=content)}, name="echo", deadline_s=60)
        took_s = time.monotonic() - start_s
        assert (answers[0].success.result.content[0] == content[0]).all()
        return took_s

    async def _next_epoch(self) -> str:
        """Begins once a worker was lost. Returns how."""
        try:
            await self._server.lost
        except (WorkerLost, DeadlineExceeded) as error:
            self._server.next_epoch()
            return str(error)
        raise AssertionError("this future has no result")

    def _state(self) -> dict[str, object]:
        lost = self._server.lost
        return {
            "workers": self._pids(),
            "settled": self._held is not None and self._held.done(),
            "refused": self._server.num_refused,
            "lost": str(lost.exception()) if lost.done() else "",
        }

    def _pids(self) -> list[int]:
        return [each.pid for each in self._server.registered]


async def serve(address: str, epoch: str, silence_s: str, folder: str, log_level: str, keys: str = "") -> None:
    """Until standard input ends."""
    log_to_file(Path(folder) / f"server-{epoch}.log", RUN, as_json=False)
    logging.getLogger().setLevel(log_level)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    loaded = load_master_keys(Path(keys)) if keys else None
    async with Server(address, RUN, int(epoch), 1, DIGEST, float(silence_s), Path(folder), loaded) as server:
        print(json.dumps({"address": server.address}), flush=True)
        actor = ServingActor(server, Path(folder))
        async for line in commands:
            print(json.dumps(await actor.obey(line.decode().strip())), flush=True)


def work(address: str, incarnation: str, manner: str, key: str = "") -> None:
    """Until the run is over. In the manner `talks` it says what comes, by lane and id."""
    log_to_stderr()
    keys = load_worker_keys(Path(key)) if key else None
    client = Client(address, register(pid=os.getpid(), incarnation=incarnation), 5.0, keys)
    client.welcome(30)

    def serve_lane(lane: Lane) -> None:
        while (asked := client.next_request(lane)) is not None:
            request, _ = asked
            if manner == "talks":
                print(lane, request.id, flush=True)
            if lane is Lane.FUNCTION:
                sys.stdin.readline()
            outcome = Success(result=Echoed(content=request.command.content))
            client.reply(Reply(run=request.run, epoch=request.epoch, id=request.id, outcome=outcome, seconds={}))

    for lane in (Lane.TRANSFER, Lane.FUNCTION):
        threading.Thread(target=serve_lane, args=(lane,), daemon=True).start()
    serve_lane(Lane.COMPUTE)
    client.close()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        asyncio.run(serve(*sys.argv[2:]))
    else:
        work(*sys.argv[2:])
