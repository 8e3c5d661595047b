"""The control plane's round trips, beside a bare ROUTER/DEALER of the same threads and, where installed, other systems.

    python benchmarks/rpc.py --json

`ours`       Server, Client and Worker as in a run: encoded, validated, executed on the compute lane under its deadline.
`bare`       the same sockets and threads, opaque bytes: what ZeroMQ and two queues cost by themselves.
`ray`, `torch_rpc`, `grpc`   actors, torch.distributed.rpc, grpc.aio: echoes of the same bytes (see `rpc_peers.py`).

Each side of each round runs in processes of its own, the sides in turns; the caller is pinned to one core and the
workers to the others. Figures are medians over rounds; ratios are paired by round.

`p50_us`, `p99_us`   of one echo of 200 bytes at a time
`calls_per_s_1`      echoes with 16 in flight, to one worker
`calls_per_s_16`     the same, to 16 workers in turn
`round16_ms`         one echo to each of 16 workers, until all have answered
`mb1_ms`             one echo of 1 MB (2^20 bytes, there and back)

`master_cpu_share_512`: the share of one core that the master needs for 512 workers, simulated in one process, that send
a heartbeat every second, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import queue
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from trainmaster.system.rpc import codec, framing
from trainmaster.system.rpc.client import Client
from trainmaster.system.rpc.commands import Command, Echo, Echoed, Result
from trainmaster.system.rpc.messages import Heartbeat, Register, Welcome
from trainmaster.system.rpc.server import Server
from trainmaster.workers.alarm import Alarm
from trainmaster.workers.service import Worker
from trainmaster.workers.tally import Tally

NUM_WORKERS, IN_FLIGHT, SWARM = 16, 16, 512
SMALL_BYTES, LARGE_BYTES = 200, 2**20
BARS = {"ratio_p50_vs_bare": 1.6, "mb1_ratio_vs_bare": 1.5, "master_cpu_share_512": 0.25}
PEERS = {"ray": "ray", "torch_rpc": "torch", "grpc": "grpc"}
"""Sides of `rpc_peers.py`, and the module that must be there."""
Call = Callable[[int, Any], Awaitable[Any]]
"""Sends a payload to the worker of a rank, and gives it back."""


# -- the measurement --------------------------------------------------------------------------------------------------


async def measure(call: Call, small: Any, large: Any, seconds: float) -> dict[str, float]:
    """With a side's own payloads, of SMALL_BYTES and LARGE_BYTES."""
    for rank in range(NUM_WORKERS):
        await call(rank, small)
    trips = await _repeat(lambda: call(0, small), seconds)
    rounds = await _repeat(lambda: asyncio.gather(*(call(rank, small) for rank in range(NUM_WORKERS))), seconds)
    megabytes = await _repeat(lambda: call(0, large), seconds)
    return {
        "p50_us": 1e6 * statistics.median(trips),
        "p99_us": 1e6 * statistics.quantiles(trips, n=100)[98],
        "calls_per_s_1": await _rate(lambda at: call(0, small), seconds),
        "calls_per_s_16": await _rate(lambda at: call(at % NUM_WORKERS, small), seconds),
        "round16_ms": 1e3 * statistics.median(rounds),
        "mb1_ms": 1e3 * statistics.median(megabytes),
    }


async def _repeat(action: Callable[[], Awaitable[Any]], seconds: float) -> list[float]:
    """Times of one after the other; the first tenth, in which things warm up, is left out."""
    taken, end_s = [], time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        start_s = time.perf_counter()
        await action()
        taken.append(time.perf_counter() - start_s)
    return taken[len(taken) // 10 :]


async def _rate(action: Callable[[int], Awaitable[Any]], seconds: float) -> float:
    start_s, num_calls = time.perf_counter(), 0
    end_s = start_s + seconds

    async def one_of_many() -> None:
        nonlocal num_calls
        while time.perf_counter() < end_s:
            num_calls += 1
            await action(num_calls)

    await asyncio.gather(*(one_of_many() for _ in range(IN_FLIGHT)))
    return num_calls / (time.perf_counter() - start_s)


@contextlib.contextmanager
def children_pinned() -> Iterator[None]:
    """Processes that start inside go to all cores but the first; this one goes to the first."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[1:])
    yield
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[:1])


@contextlib.contextmanager
def worker_processes(target: Callable[..., None], *arguments: object) -> Iterator[None]:
    """`target(rank, *arguments)` in NUM_WORKERS processes."""
    started = [get_context("spawn").Process(target=target, args=(rank, *arguments)) for rank in range(NUM_WORKERS)]
    with children_pinned():
        for process in started:
            process.start()
    try:
        yield
    finally:
        for process in started:
            process.join(timeout=10)
            process.kill()


# -- ours -------------------------------------------------------------------------------------------------------------


class EchoHandlers:
    """What a worker of a run has in `workers.handlers`, without models."""

    def execute(self, command: Command, step: int = 0) -> Result:
        assert isinstance(command, Echo), "nothing else is asked"
        return Echoed(text=command.text, content=command.content)

    def abandon(self) -> None:
        pass

    close = abandon


def register_of(rank: int) -> Register:
    return Register(
        host="here", pid=os.getpid(), incarnation=f"{os.getpid()}-{rank}", address="", versions={}, code_digest="none"
    )


def our_worker(rank: int, address: str, folder: str) -> None:
    client = Client(address, register_of(rank), 5.0)
    client.welcome(60)
    Worker(client, lambda _: EchoHandlers(), Alarm(Path(folder) / f"{rank}.stacks"), Tally(client)).run()  # type: ignore[arg-type]
    client.close()


async def welcome_all(server: Server, num_workers: int, folder: Path) -> None:
    await server.workers(120)
    server.welcome(
        lambda rank: Welcome(
            run="bench",
            epoch=server.epoch,
            rank=rank,
            num_workers=num_workers,
            num_local_workers=num_workers,
            overrides=(),
            experiment_digest="none",
            log_directory=str(folder),
            orphan_s=1,
            silence_s=5,
        )
    )


async def ours(seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server("tcp://127.0.0.1:*", "bench", 1, NUM_WORKERS, "none", 5.0, folder)
        with worker_processes(our_worker, server.address, name):
            async with server:
                await welcome_all(server, NUM_WORKERS, folder)

                def call(rank: int, payload: Echo) -> Awaitable[Any]:
                    return server.ask({rank: payload}, name="echo", deadline_s=60)

                small = Echo(text="x" * SMALL_BYTES)  # as most messages are, text and numbers
                large = Echo(content=(np.zeros(LARGE_BYTES, np.uint8),))
                return await measure(call, small, large, seconds)


# -- bare -------------------------------------------------------------------------------------------------------------


def bare_worker(rank: int, address: str) -> None:
    """An I/O thread and a compute thread; requests go through a queue, replies through a queue and a wake-up."""
    context = zmq.Context()
    waker: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    waker.bind("inproc://wake")
    requests: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
    replies: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()

    def serve() -> None:
        dealer, wake = context.socket(zmq.DEALER), context.socket(zmq.PULL)
        dealer.setsockopt(zmq.ROUTING_ID, f"worker-{rank}".encode())
        dealer.connect(address)
        wake.connect("inproc://wake")
        dealer.send_multipart([b"ready", b""])
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(wake, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(500))
            if wake in ready:
                wake.recv()
                frames = replies.get()
                dealer.send_multipart(frames, copy=len(frames[-1]) < 2**16)
            if dealer in ready:
                frames = [dealer.recv(), dealer.recv(copy=False).buffer]
                requests.put(None if frames[0] == b"stop" else frames)
                if frames[0] == b"stop":
                    dealer.close(linger=0)
                    return

    threading.Thread(target=serve, daemon=True).start()
    while (request := requests.get()) is not None:
        replies.put(request)
        waker.send(b"")


class BareRouter:
    """Futures by number; the loop reads the socket's descriptor."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.bind("tcp://127.0.0.1:*")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._pending: dict[bytes, asyncio.Future[Any]] = {}
        self._num_calls = 0
        self._num_ready = 0
        self.all_ready = asyncio.Event()
        self._loop.add_reader(self._socket.fileno(), self._drain)

    def call(self, rank: int, payload: bytes) -> asyncio.Future[Any]:
        self._num_calls += 1
        number = struct.pack(">Q", self._num_calls)
        future = self._pending[number] = self._loop.create_future()
        self._send([f"worker-{rank}".encode(), number, payload])
        return future

    def close(self) -> None:
        for rank in range(NUM_WORKERS):
            self._send([f"worker-{rank}".encode(), b"stop", b""])
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=1000)

    def _send(self, frames: list[bytes]) -> None:
        self._socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames[-1]) < 2**16)
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                _, number = self._socket.recv(zmq.NOBLOCK), self._socket.recv()
            except zmq.Again:
                return
            body = self._socket.recv(copy=False).buffer
            if number == b"ready":
                self._num_ready += 1
                if self._num_ready == NUM_WORKERS:
                    self.all_ready.set()
            else:
                self._pending.pop(number).set_result(body)


async def bare(seconds: float) -> dict[str, float]:
    router = BareRouter()
    with worker_processes(bare_worker, router.address):
        await asyncio.wait_for(router.all_ready.wait(), 60)
        try:
            return await measure(router.call, bytes(SMALL_BYTES), bytes(LARGE_BYTES), seconds)
        finally:
            router.close()


# -- many workers -----------------------------------------------------------------------------------------------------


def swarm(address: str, seconds: float) -> None:
    """SWARM workers in one process: they register, and then send heartbeats."""
    context = zmq.Context()
    context.setsockopt(zmq.MAX_SOCKETS, SWARM + 16)
    beat = codec.encode(Heartbeat(run="bench", epoch=1), framing.Envelope(epoch=1))
    sockets, poller = [], zmq.Poller()
    for rank in range(SWARM):
        dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, register_of(rank).incarnation.encode())
        dealer.connect(address)
        dealer.send_multipart(codec.encode(register_of(rank), framing.Envelope(epoch=0)))
        poller.register(dealer, zmq.POLLIN)
        sockets.append(dealer)
    end_s, next_s = time.monotonic() + seconds, time.monotonic() + 1
    while time.monotonic() < end_s:
        for dealer, _ in poller.poll(max(0, int(1000 * (next_s - time.monotonic())))):
            dealer.recv_multipart()
        if time.monotonic() >= next_s:
            next_s += 1
            for dealer in sockets:
                dealer.send_multipart(beat)
    context.destroy(linger=0)


async def cpu_share(seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        server = Server("tcp://127.0.0.1:*", "bench", 1, SWARM, "none", 60.0, Path(name))
        process = get_context("spawn").Process(target=swarm, args=(server.address, 4 * seconds + 20))
        process.start()
        async with server:
            await welcome_all(server, SWARM, Path(name))
            await asyncio.sleep(2)
            cpu_s, start_s = time.process_time(), time.perf_counter()
            await asyncio.sleep(4 * seconds)
            share = (time.process_time() - cpu_s) / (time.perf_counter() - start_s)
            assert len(server.registered) == SWARM, "all are there to the end"
        process.kill()
        process.join()
        return {"master_cpu_share_512": share}


# -- sides in turns ---------------------------------------------------------------------------------------------------


def run_side(side: str, seconds: float) -> dict[str, float]:
    """In a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--seconds", str(seconds)], stdout=subprocess.PIPE, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{side}: {figures}\n")
    return figures


def compare(sides: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in [*sides, "cpu_share"]}
    for _ in range(rounds):
        for side, figures in measured.items():
            figures.append(run_side(side, seconds))

    def ratio(side: str, other: str, name: str) -> float:
        return statistics.median(
            mine[name] / theirs[name] for mine, theirs in zip(measured[side], measured[other], strict=True)
        )

    ratios = {
        "ratio_p50_vs_bare": ratio("ours", "bare", "p50_us"),
        "mb1_ratio_vs_bare": ratio("ours", "bare", "mb1_ms"),
    }
    ratios |= {f"calls16_vs_{side}": ratio("ours", side, "calls_per_s_16") for side in sides if side != "ours"}
    medians = {
        side: {name: statistics.median(each[name] for each in figures) for name in figures[0]}
        for side, figures in measured.items()
    }
    share = medians.pop("cpu_share")
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {**ratios, **share, "sides": medians, "rounds": rounds, "machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    parser.add_argument("--sides", nargs="*", help="by default all that are installed")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(run_one(options.side, options.seconds)))
        return
    installed = [side for side, module in PEERS.items() if importlib.util.find_spec(module) is not None]
    sides = ["ours", "bare", *(installed if options.sides is None else options.sides)]
    result = compare(sides, options.rounds, options.seconds)
    if options.json:
        print(json.dumps(result))
        return
    for name, bar in BARS.items():
        print(f"{name:24} {result[name]:.3f} (bar {bar})")
    for side, figures in result["sides"].items():
        print(f"{side:10}", "  ".join(f"{name} {value:,.1f}" for name, value in figures.items()))


def run_one(side: str, seconds: float) -> dict[str, float]:
    if side in PEERS:
        import rpc_peers

        return rpc_peers.run(side, seconds)
    own = {"ours": ours, "bare": bare, "cpu_share": cpu_share}
    return asyncio.run(own[side](seconds))


if __name__ == "__main__":
    main()
