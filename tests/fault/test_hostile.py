"""Strangers, garbage and workers of another life, against real processes: dropped, while who belongs is served.

Each test prints what it measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from fuzz import Fuzzer, corpus, long_frame, rss_bytes, shaken_hands
from trainmaster.api.errors import ProtocolError, WorkerLost
from trainmaster.api.experiment_file import LoadedExperiment, read_experiment_file
from trainmaster.system.control import Control
from trainmaster.system.dispatch import first_cause
from trainmaster.system.master import run_epoch
from trainmaster.system.monitoring.metrics import MetricsLog
from trainmaster.system.monitoring.progress import ProgressLine
from trainmaster.system.rpc import codec
from trainmaster.system.rpc.client import EXIT_MASTER_LOST
from trainmaster.system.rpc.commands import Echo
from trainmaster.system.rpc.link import WINDOW
from trainmaster.system.rpc.messages import (
    PROTOCOL_VERSION,
    Lane,
    Message,
    Refuse,
    Register,
    Reply,
    Request,
    Shutdown,
    Welcome,
)
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.lifecycle import Life
from wire import Wire
from workbench import Workbench

RUN, EPOCH, DIGEST = "first", 3, "digest"
MAX_GROWTH_BYTES = 64 * 2**20
MAX_LOG_BYTES = 2**20
SERVED_S = 1.0
"""For a worker that belongs to be served, whatever strangers do."""
LAST_VERSION = 0xBEEF
"""Of a message that is refused in words: when they come, all before it has been read."""
LAYOUT = ("--model.layout.pp", "2", "--run.steps", "40")

SERVER = """
import asyncio, json, logging, os, sys, time
from pathlib import Path
import numpy as np
from trainmaster.system.rpc.commands import Echo
from trainmaster.system.rpc.messages import Lane, Welcome
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.lifecycle import Life
from trainmaster.system.service.logs import log_to_file

async def main(address, epoch, silence_s, folder):
    log_to_file(Path(folder) / f"server-{epoch}.log", "first", as_json=False)
    loop, commands = asyncio.get_running_loop(), asyncio.Queue()
    loop.add_reader(0, lambda: [commands.put_nowait(c) for c in os.read(0, 4096).decode().split()])
    say = lambda **facts: print(json.dumps(facts), flush=True)
    async with Server(address, "first", int(epoch), 1, "digest", float(silence_s), Path(folder)) as server:
        say(address=server.address)
        held = None
        while (command := await commands.get()) != "quit":
            if command == "workers":
                await server.workers(30)
                server.welcome(lambda rank: Welcome(
                    run=server.run, epoch=server.epoch, rank=rank, num_workers=1, num_local_workers=1, overrides=(),
                    experiment_digest="", log_directory=folder, orphan_s=20.0, silence_s=5.0,
                ))
                say(workers=[each.pid for each in server.registered])
            elif command == "hold":  # a lane whose requests our worker answers when it is told to
                held = server.submit(0, Echo(), name="held", deadline_s=600, lane=Lane.FUNCTION)
                say(held=True)
            elif command == "echo":
                start_s = time.monotonic()
                content = (np.arange(10),)
                answer = await server.submit(0, Echo(content=content), name="echo", deadline_s=60)
                assert (answer.success.result.content[0] == content[0]).all()
                say(echo_s=time.monotonic() - start_s)
            elif command == "next":
                try:
                    await server.lost
                except Exception as error:
                    server.next_epoch()
                    say(lost=str(error))
            else:
                say(
                    workers=[each.pid for each in server.registered],
                    settled=held is not None and held.done(),
                    lost=str(server.lost.exception()) if server.lost.done() else "",
                )

logging.getLogger().setLevel(logging.INFO if sys.argv[5:] else logging.WARNING)
asyncio.run(main(*sys.argv[1:5]))
"""

WORKER = """
import os, sys, threading
from trainmaster.system.rpc.client import Client
from trainmaster.system.rpc.commands import Echoed
from trainmaster.system.rpc.messages import Lane, Register, Reply, Success
from trainmaster.system.service.logs import log_to_stderr

log_to_stderr()
address, incarnation = sys.argv[1:]
client = Client(address, Register(
    host="here", pid=os.getpid(), incarnation=incarnation, address="127.0.0.1", versions={}, code_digest="digest"
), 5.0)
client.welcome(30)
def serve(lane):
    while (asked := client.next_request(lane)) is not None:
        request, _ = asked
        print(lane, request.id, flush=True)
        if lane is Lane.FUNCTION:
            sys.stdin.readline()
        outcome = Success(result=Echoed(content=request.command.content))
        client.reply(Reply(run=request.run, epoch=request.epoch, id=request.id, outcome=outcome, seconds={}))
for lane in (Lane.TRANSFER, Lane.FUNCTION):
    threading.Thread(target=serve, args=(lane,), daemon=True).start()
serve(Lane.COMPUTE)
client.close()
"""


@dataclass
class Actor:
    """A process of one of the scripts above. What it says comes by lines; its standard error goes to a file."""

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
    """The processes of one test."""

    folder: Path
    actors: list[Actor] = field(default_factory=list)
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    sockets: list[zmq.Socket[bytes]] = field(default_factory=list)

    def server(self, address: str, epoch: int = EPOCH, silence_s: float = 10.0) -> tuple[Actor, str]:
        """One for a single worker, and where it is bound."""
        server = self._start(SERVER, address, str(epoch), str(silence_s), str(self.folder))
        return server, json.loads(server.hear())["address"]

    def worker(self, address: str, incarnation: str = "legal") -> Actor:
        return self._start(WORKER, address, incarnation)

    def served(self) -> tuple[Actor, Actor, str]:
        """A server on a TCP port that works with its worker."""
        server, address = self.server(f"tcp://127.0.0.1:{free_port()}")
        worker = self.worker(address)
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

    def _start(self, script: str, *arguments: str) -> Actor:
        log = self.folder / f"actor-{len(self.actors)}.err"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
            )
        self.actors.append(Actor(process, log))
        return self.actors[-1]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    for actor in made.actors:
        actor.process.kill()
        actor.process.communicate()
    for each in made.sockets:
        each.close(linger=0)
    made.context.term()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


# -- fuzzed messages --------------------------------------------------------------------------------------------------

AMOUNTS = [10_000, pytest.param(500_000, marks=[pytest.mark.fault, pytest.mark.timeout(900)])]
"""Of messages that each of the two ends is sent. The large one makes 10^6 together, and more frames."""


@pytest.mark.parametrize("num_messages", AMOUNTS)
def test_a_master_drops_fuzzed_messages_and_serves_its_worker(stage: Stage, num_messages: int) -> None:
    """They forge the run, its epoch and the ids of requests, but do not know the digest of the experiment's code."""
    server, address = stage.server(f"ipc://{stage.folder}/s")
    hostile = stage.socket(zmq.DEALER)
    hostile.connect(address)
    fuzzer = Fuzzer(0, corpus(RUN, EPOCH, "another digest", range(3)), EPOCH)
    before_bytes, start_s = rss_bytes(server.pid), time.monotonic()
    num_frames = flood(hostile, fuzzer, num_messages // 10)
    assert server.ask("state")["workers"] == [], "nobody has registered yet"
    worker = stage.worker(address)
    assert server.ask("workers") == {"workers": [worker.pid]}
    server.ask("hold")
    assert worker.hear() == "function 1"
    num_frames += flood(hostile, fuzzer, num_messages - num_messages // 10)
    took_s = time.monotonic() - start_s
    growth_bytes = rss_bytes(server.pid, "VmHWM") - before_bytes
    assert server.ask("state") == {"workers": [worker.pid], "settled": False, "lost": ""}
    echo_s = server.ask("echo")["echo_s"]
    print(
        f"master: {num_messages:,} fuzzed messages, {num_frames:,} frames, {num_frames / took_s:,.0f} frames/s, RSS "
        f"{mebibytes(growth_bytes)} more at its peak, log of {mebibytes(stage.server_log().stat().st_size)}, "
        f"then an echo in {1000 * echo_s:.1f} ms"
    )
    assert echo_s < SERVED_S
    assert growth_bytes < MAX_GROWTH_BYTES
    for log in (server.log, stage.server_log()):
        assert "Traceback" not in log.read_text(errors="replace"), "no message was the cause of an unforeseen error"
    assert worker.process.poll() is None


def flood(hostile: zmq.Socket[bytes], fuzzer: Fuzzer, num_messages: int) -> int:
    """Sends them to a master, and waits until it has read the last. Returns the number of frames."""
    num_frames = 0
    for number in range(num_messages):
        frames = fuzzer.message()
        num_frames += len(frames)
        hostile.send_multipart(frames)
        if number % 64 == 0:
            while hostile.poll(0):
                hostile.recv_multipart()
    hostile.send_multipart([codec.Envelope(epoch=0, version=LAST_VERSION).encode(), b""])
    while codec.Envelope.decode(hostile.recv_multipart()).version != LAST_VERSION:
        pass
    return num_frames


def welcome(epoch: int = EPOCH, run: str = RUN) -> Welcome:
    return Welcome(
        run=run,
        epoch=epoch,
        rank=0,
        num_workers=1,
        num_local_workers=1,
        overrides=(),
        experiment_digest="",
        log_directory="",
        orphan_s=60.0,
        silence_s=5.0,
    )


class HostileMaster:
    """A ROUTER socket that a worker believes to be its master, and which can be that too."""

    def __init__(self, stage: Stage) -> None:
        self.router = stage.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send then waits for room
        self.wire = Wire(EPOCH)
        self.router.bind(f"ipc://{stage.folder}/m")
        self.worker = stage.worker(f"ipc://{stage.folder}/m")
        self.route, *frames = self.router.recv_multipart()
        assert isinstance(self.wire.unpack(frames)[0], Register)
        self.send(self.wire.pack(welcome()))

    def send(self, frames: codec.Body) -> None:
        self.router.send_multipart([self.route, *frames])

    def echo(self, identity: int) -> float:
        """Has the worker execute a request. Returns how long that took, in seconds."""
        start_s = time.monotonic()
        self.send(self.wire.pack(request(identity)))
        assert self.worker.hear(10.0) == f"compute {identity}", "the first that was executed since the last"
        while not any(isinstance(message, Reply) and message.id == identity for message in self.receive()):
            pass
        return time.monotonic() - start_s

    def receive(self) -> list[Message]:
        return self.wire.unpack(self.router.recv_multipart()[1:])


def request(identity: int) -> Request:
    return Request(
        run=RUN, epoch=EPOCH, id=identity, lane=Lane.COMPUTE, deadline_s=60.0, submitted_s=0.0, command=Echo()
    )


@pytest.mark.parametrize("num_messages", AMOUNTS)
def test_a_worker_executes_nothing_of_fuzzed_messages(stage: Stage, num_messages: int) -> None:
    """But what a master may say is obeyed, also where it came about by chance: such messages are left out."""
    master = HostileMaster(stage)
    master.echo(1000)
    messages = [*corpus(RUN, EPOCH - 1, DIGEST, range(3)), *corpus("other", EPOCH, DIGEST, range(3))]
    fuzzer = Fuzzer(1, messages, EPOCH)
    num_frames = num_readable = num_left_out = 0
    before_bytes, start_s = rss_bytes(master.worker.pid), time.monotonic()
    for number in range(num_messages):
        while (verdict := judged(frames := fuzzer.message())) == "allowed":
            num_left_out += 1
        num_readable += verdict == "readable"
        num_frames += len(frames)
        master.send(list(frames))
        if number % 64 == 0:
            while master.router.poll(0):
                master.receive()
    echo_s = master.echo(1001)
    took_s = time.monotonic() - start_s
    growth_bytes = rss_bytes(master.worker.pid, "VmHWM") - before_bytes
    print(
        f"worker: {num_messages:,} fuzzed messages ({num_readable:,} of them readable; {num_left_out:,} left out), "
        f"{num_frames:,} frames, {num_frames / took_s:,.0f} frames/s, RSS {mebibytes(growth_bytes)} more at its peak, "
        f"log of {mebibytes(master.worker.log.stat().st_size)}, an echo behind them in {echo_s:.2f} s"
    )
    assert growth_bytes < MAX_GROWTH_BYTES
    assert "Traceback" not in master.worker.log.read_text(errors="replace")
    master.send(master.wire.pack(Shutdown(is_done=True, reason="the run is over")))
    assert master.worker.process.wait(10) == 0


def judged(frames: list[bytes]) -> str:
    """`allowed` for what the master of this run and epoch may say; of the rest, whether it can be read."""
    try:
        envelope, message = codec.decode(frames)
    except ProtocolError:
        message = None
        try:
            envelope = codec.Envelope.decode(frames)
        except ProtocolError:
            return "unreadable"
        if envelope.version != PROTOCOL_VERSION:
            return "unreadable"
    if envelope.epoch == EPOCH and 0 < envelope.order <= 2 * WINDOW:
        return "allowed"  # it takes its turn in the link, whatever it is
    if envelope.order == 0 and isinstance(message, Welcome | Refuse):
        return "allowed"
    return "unreadable" if message is None else "readable"


@pytest.mark.fault
def test_a_worker_does_not_go_back_to_an_epoch_that_is_over(stage: Stage) -> None:
    """A welcome may come late, after that of the next epoch."""
    master = HostileMaster(stage)
    master.echo(1000)
    stale = Wire(EPOCH - 1)
    master.send(stale.pack(welcome(EPOCH - 1)))
    master.echo(1001)


# -- one message that costs much --------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """Tuples in tuples, of 2^20 items each by their heads; and as many bytes."""
    return b"\xdd\x00\x10\x00\x00" * depth + b"\x01" * 2**20


COSTLY: dict[str, Callable[[], bytes]] = {
    "errors": lambda: msgpack.packb({"type": "heartbeat", "run": RUN, "epoch": EPOCH, "executing": [1] * 2**20}),
    "type": lambda: msgpack.packb({"type": "A" * (60 * 2**20)}),
    "nested": lambda: nested(500),
    "map": lambda: b"\x81\xa4type\xdf\x00\x10\x00\x00" + b"".join(msgpack.packb(str(at)) * 2 for at in range(2**20)),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", COSTLY)
def test_one_message_of_a_stranger_is_dropped_at_little_cost(stage: Stage, name: str) -> None:
    server, _, address = stage.served()
    hostile = stage.socket(zmq.DEALER)
    hostile.connect(address)
    body, before_bytes = COSTLY[name](), rss_bytes(server.pid)
    start_s = time.monotonic()
    hostile.send_multipart([codec.Envelope(epoch=EPOCH).encode(), body])
    hostile.send_multipart([codec.Envelope(epoch=0, version=LAST_VERSION).encode(), b""])
    hostile.recv_multipart()
    took_s = time.monotonic() - start_s
    server.ask("echo")
    growth_bytes = rss_bytes(server.pid, "VmHWM") - before_bytes
    log_bytes = stage.server_log().stat().st_size
    print(
        f"{name}: {mebibytes(len(body))} dropped in {took_s:.2f} s, RSS {mebibytes(growth_bytes)} more at its peak, "
        f"log of {mebibytes(log_bytes)}"
    )
    assert took_s < SERVED_S
    assert growth_bytes < MAX_GROWTH_BYTES + 2 * len(body)
    assert log_bytes < MAX_LOG_BYTES


@pytest.mark.fault
def test_a_flood_of_garbage_keeps_nobody_waiting_and_does_not_fill_the_log(stage: Stage) -> None:
    server, _, address = stage.served()
    hostile = stage.socket(zmq.DEALER)
    hostile.connect(address)
    fuzzer = Fuzzer(2, corpus(RUN, EPOCH, "another digest", range(3)), EPOCH)
    messages = [fuzzer.message() for _ in range(2_000)]
    assert server.process.stdout is not None
    start_s = took_s = 0.0
    for number in range(20):
        for frames in messages:
            hostile.send_multipart(frames)
            while hostile.poll(0):
                hostile.recv_multipart()
        if number == 0:
            start_s = time.monotonic()
            server.say("echo")
        elif not took_s and select.select([server.process.stdout], [], [], 0)[0]:
            took_s = time.monotonic() - start_s
    server.hear()
    took_s, log_bytes = took_s or time.monotonic() - start_s, stage.server_log().stat().st_size
    print(f"flood: an echo took {took_s:.2f} s, during {20 * len(messages):,} messages; log of {mebibytes(log_bytes)}")
    assert took_s < SERVED_S
    assert log_bytes < MAX_LOG_BYTES


# -- other protocols --------------------------------------------------------------------------------------------------


def closed_after_s(connection: socket.socket, deadline_s: float) -> float | None:
    """How long until the other end closes; None if it does not in time."""
    start_s = time.monotonic()
    while (left_s := start_s + deadline_s - time.monotonic()) > 0:
        connection.settimeout(left_s)
        try:
            if not connection.recv(4096):
                return time.monotonic() - start_s
        except TimeoutError:
            return None
        except ConnectionError:
            return time.monotonic() - start_s
    return None


def test_a_frame_of_a_gibibyte_is_not_waited_for(stage: Stage) -> None:
    server, worker, address = stage.served()
    before_bytes = rss_bytes(server.pid)
    with shaken_hands(address) as connection:
        connection.sendall(long_frame(2**30) + bytes(1024))
        closed_s = closed_after_s(connection, 5.0)
    growth_bytes = rss_bytes(server.pid, "VmHWM") - before_bytes
    echo_s = server.ask("echo")["echo_s"]
    assert closed_s is not None, "the connection stays open"
    print(f"1 GiB: closed after {1000 * closed_s:.1f} ms, RSS {mebibytes(growth_bytes)} more, echo {echo_s:.3f} s")
    assert closed_s < 1.0
    assert growth_bytes < MAX_GROWTH_BYTES
    assert echo_s < SERVED_S
    assert server.ask("state") == {"workers": [worker.pid], "settled": False, "lost": ""}


GREETINGS = {
    "short": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "long": b"GET /metrics HTTP/1.1\r\nHost: localhost:5555\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n" * 4,
}


def test_an_http_request_is_dropped(stage: Stage) -> None:
    server, worker, address = stage.served()
    before_bytes = rss_bytes(server.pid)
    for name, text in GREETINGS.items():
        with http_request(address, text) as connection:
            closed_s = closed_after_s(connection, 0.5)
            said = "stays open" if closed_s is None else f"closed after {1000 * closed_s:.1f} ms"
        echo_s = server.ask("echo")["echo_s"]
        print(f"HTTP, {name}: {said}, echo {1000 * echo_s:.1f} ms")
        assert echo_s < SERVED_S
    assert rss_bytes(server.pid, "VmHWM") - before_bytes < MAX_GROWTH_BYTES
    assert server.ask("state") == {"workers": [worker.pid], "settled": False, "lost": ""}
    assert len(stage.server_log().read_text().splitlines()) <= 2 * len(GREETINGS)


def http_request(address: str, text: bytes) -> socket.socket:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(text)
    return connection


@pytest.mark.fault
def test_an_http_request_to_a_training_master_changes_nothing(workbench: Workbench) -> None:
    done = workbench.run("--run.name", "undisturbed", *LAYOUT)
    assert done.returncode == 0, done.stderr
    address = f"tcp://127.0.0.1:{free_port()}"
    master = workbench.start("master", str(workbench.file), "--bind", address, *LAYOUT)
    workers = [workbench.start("worker", str(workbench.file), "--master", address) for _ in range(2)]
    assert master.stdout is not None
    next(line for line in master.stdout if line.startswith("step 2/"))
    for text in GREETINGS.values():
        with http_request(address, text):
            next(line for line in master.stdout if line.startswith("step "))
    _, err = master.communicate(timeout=60)
    assert master.returncode == 0, err
    for worker in workers:
        worker.communicate(timeout=30)
        assert worker.returncode == 0
    log = (workbench.folder / "runs" / "test" / "logs" / "master.log").read_text()
    num_lines = len(re.findall("dropped a message|refused a worker", log))
    print(f"HTTP to a training master: {len(GREETINGS)} requests, {num_lines} lines in its log")
    assert num_lines <= 2 * len(GREETINGS)
    assert workbench.series("train/loss") == workbench.series("train/loss", "undisturbed")
    assert workbench.wait_until_gone(5.0) == []


# -- workers of another life ------------------------------------------------------------------------------------------


def ended_s(worker: Actor, start_s: float) -> float:
    """Since `start_s`, until the worker ended itself."""
    assert worker.process.wait(20) == EXIT_MASTER_LOST, worker.log.read_text()
    return time.monotonic() - start_s


@pytest.mark.fault
def test_a_worker_that_was_stopped_and_given_up_is_refused_when_it_goes_on(stage: Stage) -> None:
    server, address = stage.server(f"tcp://127.0.0.1:{free_port()}", silence_s=2.0)
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
    assert server.ask("state") == {"workers": [fresh.pid], "settled": False, "lost": ""}
    fresh.say("reply")
    assert server.ask("echo")["echo_s"] < SERVED_S
    assert server.ask("state")["settled"]


@pytest.mark.fault
def test_a_late_reply_to_a_killed_master_changes_nothing_for_the_next(stage: Stage) -> None:
    first, address = stage.server(f"tcp://127.0.0.1:{free_port()}", epoch=EPOCH)
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
    assert second.ask("state") == {"workers": [worker.pid], "settled": False, "lost": ""}
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
    done = workbench.run("--run.name", "undisturbed", *overrides)
    assert done.returncode == 0, done.stderr
    loaded = read_experiment_file(workbench.file).resolve(overrides)
    directory = workbench.folder / "runs" / "test"
    directory.mkdir()
    asyncio.run(asyncio.wait_for(_outlived(workbench, loaded, directory), 60))
    assert workbench.series("train/loss") == workbench.series("train/loss", "undisturbed")
    assert workbench.wait_until_gone(5.0) == []


async def _outlived(workbench: Workbench, loaded: LoadedExperiment, directory: Path) -> None:
    compiled = loaded.compiled
    server = Server(
        f"ipc://{workbench.folder}/master",
        run=compiled.run.name,
        epoch=1,
        num_workers=compiled.num_workers,
        code_digest=loaded.code_digest,
        silence_s=2.0,
        log_directory=directory / "logs",
    )
    with ProgressLine() as progress:
        async with server:
            control = Control(Life(directory, compiled.run.name, server.address), server, 4, lambda: None)
            arguments = ("worker", str(workbench.file), "--master", server.address)
            stay = {workbench.start(*arguments).pid for _ in range(compiled.num_workers - 1)}
            stale = workbench.start(*arguments, TRAINMASTER_FAILPOINT="worker.train_step=stop")
            lost = MetricsLog(workbench.folder / "lost")
            with pytest.raises(ExceptionGroup) as caught:
                await run_epoch(loaded, server, directory, lost, progress, control)
            lost.close()
            assert isinstance(first_cause(caught.value), WorkerLost), caught.value
            server.next_epoch()
            comes = workbench.start(*arguments)
            metrics = MetricsLog(directory)
            going_on = asyncio.create_task(_go_on(stale, directory))
            await run_epoch(loaded, server, directory, metrics, progress, control)
            metrics.close()
            took_s = await going_on
            print(f"stopped in a step: ended {took_s:.2f} s after it went on, in the next epoch")
            assert {worker.pid for worker in server.registered} == stay | {comes.pid}
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
    done = workbench.run("--run.name", "undisturbed", *LAYOUT)
    assert done.returncode == 0, done.stderr
    addresses = [f"ipc://{workbench.folder}/{name}" for name in ("m1", "m2")]
    first = workbench.start("master", str(workbench.file), "--bind", addresses[0], *LAYOUT)
    for _ in range(2):
        workbench.start("worker", str(workbench.file), "--master", addresses[0])
    assert first.stdout is not None
    next(line for line in first.stdout if line.startswith("step 2/"))
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
