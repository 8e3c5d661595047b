"""Attacks on a master with keys, in processes of their own: refused, counted, logged once, while its worker is served.

Each test prints what it measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq
from fuzz import long_frame, rss_bytes
from trainmaster.system.rpc import codec
from trainmaster.system.rpc.client import EXIT_MASTER_LOST
from trainmaster.system.rpc.messages import Inquire, Message, Order, Refuse, Register
from trainmaster.system.rpc.zap import HANDSHAKE_S, REREAD_S
from trainmaster.system.service.keys import ClientKeys, load_operator_keys, load_worker_keys, make_keys, revoke

SERVED_S = 1.0
"""For a worker that belongs to be served, whatever strangers do."""
SETTLED_S = 2.0
"""For what has been sent to take effect."""
MAX_GROWTH_BYTES = 64 * 2**20
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""ZeroMQ's, as of a client that is about to use CURVE."""

SERVER = """
import asyncio, json, logging, os, sys, threading, time
from pathlib import Path
import numpy as np
from trainmaster.system.rpc.commands import Echo
from trainmaster.system.rpc.messages import Welcome
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.keys import load_master_keys

async def main(address, keys, folder):
    logging.basicConfig(filename=Path(folder) / "server.log", level=logging.INFO)
    loop, commands = asyncio.get_running_loop(), asyncio.Queue()
    loop.add_reader(0, lambda: [commands.put_nowait(c) for c in os.read(0, 4096).decode().split()])
    say = lambda **facts: print(json.dumps(facts), flush=True)
    loaded = load_master_keys(Path(keys)) if keys else None
    async with Server(address, "first", 3, 1, "digest", 10.0, Path(folder), loaded) as server:
        say(address=server.address)
        while (command := await commands.get()) != "quit":
            if command == "workers":
                await server.workers(30)
                server.welcome(lambda rank: Welcome(
                    run=server.run, epoch=server.epoch, rank=rank, num_workers=1, num_local_workers=1, overrides=(),
                    experiment_digest="", log_directory=folder, orphan_s=20.0, silence_s=5.0,
                ))
                say(workers=[each.pid for each in server.registered])
            elif command == "echoes":
                content, took_s = (np.arange(25),), []
                for _ in range(200):
                    start_s = time.monotonic()
                    await server.submit(0, Echo(content=content), name="echo", deadline_s=60)
                    took_s.append(time.monotonic() - start_s)
                took_s.sort()
                say(p50_s=took_s[100], worst_s=took_s[-1])
            elif command == "break":
                server._port._gate._answer = None
                say(broken=True)
            elif command == "hang":
                server._port._gate._answer = lambda question: threading.Event().wait()
                say(hung=True)
            elif command == "threads":
                say(threads=[thread.name for thread in threading.enumerate()])
            else:
                say(
                    workers=[each.pid for each in server.registered],
                    refused=server.num_refused,
                    lost=str(server.lost.exception()) if server.lost.done() else "",
                )

asyncio.run(main(*sys.argv[1:]))
"""

WORKER = """
import logging, os, sys
from pathlib import Path
from trainmaster.system.rpc.client import Client
from trainmaster.system.rpc.commands import Echoed
from trainmaster.system.rpc.messages import Lane, Register, Reply, Success
from trainmaster.system.service.keys import load_worker_keys

logging.basicConfig(level=logging.INFO)
address, file = sys.argv[1:]
client = Client(address, Register(
    host="here", pid=os.getpid(), incarnation="legal", address="127.0.0.1", versions={}, code_digest="digest"
), 5.0, load_worker_keys(Path(file)) if file else None)
client.welcome(30)
while (asked := client.next_request(Lane.COMPUTE)) is not None:
    request, _ = asked
    outcome = Success(result=Echoed(content=request.command.content))
    client.reply(Reply(run=request.run, epoch=request.epoch, id=request.id, outcome=outcome, seconds={}))
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

    def hear(self, deadline_s: float = 30.0) -> dict[str, Any]:  # Any: JSON
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], deadline_s)
        assert ready, f"nothing was said within {deadline_s:g} s: {self.log.read_text()[-2000:]}"
        line = self.process.stdout.readline().decode()
        assert line, f"it ended: {self.log.read_text()[-2000:]}"
        return json.loads(line)

    def ask(self, word: str) -> dict[str, Any]:  # Any: JSON
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")
        return self.hear()


@dataclass
class Stage:
    """A master with its worker, and the sockets of those who attack it."""

    folder: Path
    keys: Path
    actors: list[Actor] = field(default_factory=list)
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    sockets: list[zmq.Socket[bytes]] = field(default_factory=list)

    def worker_keys(self, number: int) -> ClientKeys:
        return load_worker_keys(self.keys / f"worker-{number}.key")

    def served(self, is_secure: bool = True) -> tuple[Actor, Actor, str]:
        """A server on a TCP port that works with its worker."""
        address = f"tcp://127.0.0.1:{free_port()}"
        server = self._start(SERVER, address, str(self.keys) if is_secure else "", str(self.folder))
        assert server.hear()["address"] == address
        worker = self._start(WORKER, address, str(self.keys / "worker-0.key") if is_secure else "")
        assert server.ask("workers") == {"workers": [worker.pid]}
        assert server.ask("echoes")["worst_s"] < SERVED_S
        return server, worker, address

    def caller(self, address: str, keys: ClientKeys | None, *messages: Message) -> zmq.Socket[bytes]:
        """A socket that has sent these."""
        made: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        self.sockets.append(made)
        if keys is not None:
            keys.secure(made)
        made.connect(address)
        for message in messages:
            with contextlib.suppress(zmq.Again):  # refused already: there is nobody to send to
                made.send_multipart(codec.encode(message, codec.Envelope(epoch=3)), zmq.NOBLOCK)
        return made

    def log(self) -> str:
        return (self.folder / "server.log").read_text()

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
    make_keys(tmp_path / "keys", 2)
    made = Stage(tmp_path, tmp_path / "keys")
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


def plain_connection(address: str) -> socket.socket:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def closed_after_s(connection: socket.socket, deadline_s: float) -> float:
    """How long until the other end closes, which it does in time."""
    start_s = time.monotonic()
    connection.settimeout(deadline_s)
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return time.monotonic() - start_s


def register(incarnation: str = "stranger") -> Register:
    return Register(
        host="there", pid=1, incarnation=incarnation, address="127.0.0.1", versions={}, code_digest="digest"
    )


def is_undisturbed(server: Actor, worker: Actor, num_refused: int) -> str:
    """Asserts that the worker is served and that strangers are counted. Returns figures to print."""
    echoes = server.ask("echoes")
    assert echoes["worst_s"] < SERVED_S
    end_s = time.monotonic() + SETTLED_S
    while (state := server.ask("state"))["refused"] < num_refused:
        assert time.monotonic() < end_s, state
    assert state == {"workers": [worker.pid], "refused": state["refused"], "lost": ""}
    assert worker.process.poll() is None
    return (
        f"{state['refused']} connections refused, echo p50 {1e6 * echoes['p50_s']:.0f} us, "
        f"worst {1e3 * echoes['worst_s']:.1f} ms"
    )


def num_lines(stage: Stage) -> int:
    return stage.log().count("dropped a message")


# -- who does not get in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wrong key", "wrong master", "no key"])
def test_a_caller_without_a_good_key_is_not_heard(stage: Stage, kind: str) -> None:
    server, worker, address = stage.served()
    make_keys(stage.folder / "other", 1)
    theirs = load_worker_keys(stage.folder / "other" / "worker-0.key")
    keys = {
        "wrong key": ClientKeys(theirs.file, theirs.name, theirs.pair, stage.worker_keys(0).master),
        "wrong master": theirs,
        "no key": None,
    }
    caller = stage.caller(address, keys[kind], register(), Inquire(order=Order.STOP_NOW))
    assert not caller.poll(500), "it is told nothing"
    caller.close(linger=0)
    print(f"{kind}: {is_undisturbed(server, worker, 1)}, {num_lines(stage)} line in the log")
    assert num_lines(stage) == 1


HELLOS = {
    "HTTP, short": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP, long": b"GET /metrics HTTP/1.1\r\nHost: localhost:5555\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n" * 4,
    "plaintext": GREETING.replace(b"CURVE", b"NULL\0") + b"\x04\x26\x05READY",
    "1 GiB": GREETING + long_frame(2**30) + bytes(4096),
    "garbage": bytes(range(256)) * 64,
}


def test_whoever_speaks_something_else_is_cut_off(stage: Stage) -> None:
    server, worker, address = stage.served()
    before_bytes = rss_bytes(server.pid)
    for at, (name, text) in enumerate(HELLOS.items(), 1):
        with plain_connection(address) as connection:
            connection.sendall(text)
            closed_s = closed_after_s(connection, HANDSHAKE_S + SETTLED_S)
        print(f"{name}: closed after {1e3 * closed_s:.1f} ms; {is_undisturbed(server, worker, at)}")
    assert num_lines(stage) == 1
    assert rss_bytes(server.pid, "VmHWM") - before_bytes < MAX_GROWTH_BYTES


@pytest.mark.fault
def test_three_hundred_idle_strangers_cost_a_legal_worker_nothing(stage: Stage) -> None:
    server, worker, address = stage.served()
    alone, before_bytes = server.ask("echoes"), rss_bytes(server.pid)
    with contextlib.ExitStack() as stack:
        start_s, strangers = time.monotonic(), []
        for at in range(300):
            strangers.append(stack.enter_context(plain_connection(address)))
            if at % 2:
                strangers[-1].sendall(GREETING)
        beside = server.ask("echoes")
        waits_s = [closed_after_s(each, HANDSHAKE_S + SETTLED_S) for each in strangers]
        cut_s = time.monotonic() - start_s
    assert len(waits_s) == 300
    said = is_undisturbed(server, worker, 300)
    print(
        f"300 idle strangers: echo p50 {1e6 * alone['p50_s']:.0f} us before, {1e6 * beside['p50_s']:.0f} us beside "
        f"them (worst {1e3 * beside['worst_s']:.1f} ms); all cut off after {cut_s:.1f} s; {said}; RSS "
        f"{(rss_bytes(server.pid, 'VmHWM') - before_bytes) / 2**20:.1f} MiB more; {num_lines(stage)} line in the log"
    )
    assert beside["worst_s"] < SERVED_S
    assert cut_s < HANDSHAKE_S + SETTLED_S
    assert num_lines(stage) == 1


@pytest.mark.fault
def test_a_storm_of_wrong_keys_keeps_nobody_waiting(stage: Stage) -> None:
    """Each costs the master's I/O thread some arithmetic, and the handler a look."""
    server, worker, address = stage.served()
    theirs, master = load_operator_keys(stage.keys), stage.worker_keys(0).master
    start_s, num_sent, worst_s = time.monotonic(), 0, 0.0
    for _ in range(10):
        for _ in range(20):
            public, secret = zmq.curve_keypair()
            pair = type(theirs.pair)(public.decode(), secret)
            stage.caller(address, ClientKeys(theirs.file, "nobody", pair, master), register())
            num_sent += 1
        worst_s = max(worst_s, server.ask("echoes")["worst_s"])
    took_s = time.monotonic() - start_s
    print(
        f"{num_sent} wrong keys in {took_s:.1f} s: worst echo {1e3 * worst_s:.1f} ms; "
        f"{is_undisturbed(server, worker, num_sent)}; {num_lines(stage)} lines in the log"
    )
    assert worst_s < SERVED_S
    assert num_lines(stage) <= 1 + took_s / 10


# -- a handler that does not answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["break", pytest.param("hang", marks=pytest.mark.fault)])
def test_without_its_handler_a_master_lets_nobody_in_and_serves_who_is_inside(stage: Stage, how: str) -> None:
    server, worker, address = stage.served()
    server.ask(how)
    for _ in range(2):  # the first has it break
        caller = stage.caller(address, load_operator_keys(stage.keys), Inquire(order=Order.STATUS))
        assert not caller.poll(1000 * (HANDSHAKE_S + 1) if how == "hang" else 1000)
        caller.close(linger=0)
    assert ("zap" in server.ask("threads")["threads"]) == (how == "hang")
    print(f"handler: {how}: a good key is not let in; {is_undisturbed(server, worker, 1)}")
    if how == "break":
        assert stage.log().count("the thread that checks keys broke down: nobody else gets in") == 1


# -- holders of good keys who want more -------------------------------------------------------------------------------


def refusal(caller: zmq.Socket[bytes]) -> str:
    assert caller.poll(5000), "it is told why"
    _, message = codec.decode(codec.receive(caller))
    assert isinstance(message, Refuse)
    return message.reason


def test_a_good_key_is_good_for_its_holder_alone(stage: Stage) -> None:
    server, worker, address = stage.served()
    for keys, message, reason in (
        (stage.worker_keys(1), register("legal"), "worker-1's key is not that of worker 0"),
        (stage.worker_keys(0), register("second"), "worker-0's key is in use by worker 0"),
        (stage.worker_keys(1), Inquire(order=Order.STOP_NOW), "worker-1's key is not good for the message inquire"),
        (load_operator_keys(stage.keys), register(), "operator's key is not good for the message register"),
    ):
        said = refusal(stage.caller(address, keys, message))
        assert said.startswith(reason)
        print(f"{said}: {is_undisturbed(server, worker, 0)}")
    assert num_lines(stage) == 1


def test_a_worker_whose_key_is_revoked_is_out_within_seconds(stage: Stage) -> None:
    server, worker, address = stage.served()
    keys = stage.worker_keys(0)
    revoke(stage.keys, "worker-0")
    start_s = time.monotonic()
    while not (state := server.ask("state"))["lost"]:
        assert time.monotonic() < start_s + REREAD_S + SETTLED_S
    lost_s = time.monotonic() - start_s
    assert worker.process.wait(5) == EXIT_MASTER_LOST
    ended_s = time.monotonic() - start_s
    assert "had its key revoked" in state["lost"]
    assert state["workers"] == []
    again = stage.caller(address, keys, register("again"))
    assert not again.poll(500)
    print(f"revoked: lost after {lost_s:.2f} s, ended after {ended_s:.2f} s, not let in again")
    assert server.ask("state")["workers"] == []


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_no_secret_is_in_arguments_environments_and_logs(stage: Stage) -> None:
    server, worker, address = stage.served()
    stage.caller(address, stage.worker_keys(1), register("legal")).poll(1000)
    clients = [stage.worker_keys(0), stage.worker_keys(1), load_operator_keys(stage.keys)]
    secrets = [keys.pair.secret for keys in clients]
    secrets += [line.split()[1] for line in (stage.keys / "master.key").read_bytes().splitlines() if b"secret" in line]
    assert len(secrets) == 4
    processes = [Path(f"/proc/{each.pid}") for each in (server, worker)]
    texts = [(process / what).read_bytes() for process in processes for what in ("cmdline", "environ")]
    logs = [path.read_bytes() for path in stage.folder.iterdir() if path.is_file()]
    assert all(texts)
    assert any(b"worker-1's key" in log for log in logs)
    for text in (*texts, *logs):
        assert not [secret for secret in secrets if secret in text]
    for path in (processes[1] / "fd").iterdir():
        assert not os.readlink(path).startswith(str(stage.keys)), "the file of a key is not left open"


@pytest.mark.fault
def test_what_encryption_costs(stage: Stage) -> None:
    figures = {}
    for is_secure in (False, True, False, True):
        server, *_ = stage.served(is_secure)
        best = min((server.ask("echoes") for _ in range(5)), key=lambda echoes: echoes["p50_s"])
        figures[is_secure] = min(best["p50_s"], figures.get(is_secure, best["p50_s"]))
    print(f"echo of 200 bytes, p50: {1e6 * figures[False]:.0f} us plain, {1e6 * figures[True]:.0f} us with keys")
    assert figures[True] < SERVED_S
