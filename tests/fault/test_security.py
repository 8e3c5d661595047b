"""Attacks on a master with keys, in processes of their own: refused, counted, logged once, while its worker is served.

Each test prints what it measured.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq
from fuzz import HTTP_REQUESTS, closed_after_s, long_frame, mebibytes, plain_connection, rss_bytes
from stage import MAX_GROWTH_BYTES, SERVED_S, Actor, Stage, state
from trainmaster.system.rpc import codec, framing
from trainmaster.system.rpc.client import EXIT_MASTER_LOST
from trainmaster.system.rpc.inquiries import Inquire, Order, Refuse
from trainmaster.system.rpc.messages import Message, Register
from trainmaster.system.rpc.zap import HANDSHAKE_S, REREAD_S
from trainmaster.system.service.keys import ClientKeys, load_operator_keys, load_worker_keys, make_keys, revoke
from wire import EPOCH, register

SETTLED_S = 2.0
"""For what has been sent to take effect."""
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""ZeroMQ's, as of a client that is about to use CURVE."""


@dataclass
class SecureStage(Stage):
    """A master with its worker, and the sockets of those who attack it."""

    keys: Path = field(kw_only=True)

    def worker_keys(self, number: int) -> ClientKeys:
        return load_worker_keys(self.keys / f"worker-{number}.key")

    def secured(self, is_secure: bool = True) -> tuple[Actor, Actor, str]:
        """Like `served`, with keys, and quick from its first echo to its 200th."""
        server, worker, address = self.served(self.keys if is_secure else None)
        assert server.ask("echoes")["worst_s"] < SERVED_S
        return server, worker, address

    def caller(self, address: str, keys: ClientKeys | None, *messages: Message) -> zmq.Socket[bytes]:
        """A socket that has sent these."""
        made = self.context.socket(zmq.DEALER)
        self.sockets.append(made)
        if keys is not None:
            keys.secure(made)
        made.connect(address)
        for message in messages:
            with contextlib.suppress(zmq.Again):  # refused already: there is nobody to send to
                made.send_multipart(codec.encode(message, framing.Envelope(epoch=EPOCH)), zmq.NOBLOCK)
        return made

    def log(self) -> str:
        return self.server_log().read_text()


@pytest.fixture
def stage(tmp_path: Path, popen: type[subprocess.Popen[Any]]) -> Iterator[SecureStage]:
    make_keys(tmp_path / "keys", 2)
    with SecureStage(tmp_path, popen, "INFO", keys=tmp_path / "keys") as made:
        yield made


def stranger(incarnation: str = "stranger") -> Register:
    return register(host="there", pid=1, incarnation=incarnation)


def is_undisturbed(server: Actor, worker: Actor, num_refused: int) -> str:
    """Asserts that the worker is served and that strangers are counted. Returns figures to print."""
    echoes = server.ask("echoes")
    assert echoes["worst_s"] < SERVED_S
    end_s = time.monotonic() + SETTLED_S
    while (told := server.ask("state"))["refused"] < num_refused:
        assert time.monotonic() < end_s, told
    assert told == state(worker, num_refused=told["refused"])
    assert worker.process.poll() is None
    return (
        f"{told['refused']} connections refused, echo p50 {1e6 * echoes['p50_s']:.0f} us, "
        f"worst {1e3 * echoes['worst_s']:.1f} ms"
    )


def num_lines(stage: SecureStage) -> int:
    return stage.log().count("dropped a message")


# -- who does not get in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wrong key", "wrong master", "no key"])
def test_a_caller_without_a_good_key_is_not_heard(stage: SecureStage, kind: str) -> None:
    server, worker, address = stage.secured()
    make_keys(stage.folder / "other", 1)
    theirs = load_worker_keys(stage.folder / "other" / "worker-0.key")
    keys = {
        "wrong key": ClientKeys(theirs.file, theirs.name, theirs.pair, stage.worker_keys(0).master),
        "wrong master": theirs,
        "no key": None,
    }
    caller = stage.caller(address, keys[kind], stranger(), Inquire(order=Order.STOP_NOW))
    assert not caller.poll(500), "it is told nothing"
    caller.close(linger=0)
    print(f"{kind}: {is_undisturbed(server, worker, 1)}, {num_lines(stage)} line in the log")
    assert num_lines(stage) == 1


HELLOS = {
    **{f"HTTP, {name}": text for name, text in HTTP_REQUESTS.items()},
    "plaintext": GREETING.replace(b"CURVE", b"NULL\0") + b"\x04\x26\x05READY",
    "1 GiB": GREETING + long_frame(2**30) + bytes(4096),
    "garbage": bytes(range(256)) * 64,
}


def test_whoever_speaks_something_else_is_cut_off(stage: SecureStage) -> None:
    server, worker, address = stage.secured()
    before_bytes = rss_bytes(server.pid)
    for at, (name, text) in enumerate(HELLOS.items(), 1):
        with plain_connection(address, text) as connection:
            closed_s = closed_after_s(connection, HANDSHAKE_S + SETTLED_S)
        assert closed_s is not None, name
        print(f"{name}: closed after {1e3 * closed_s:.1f} ms; {is_undisturbed(server, worker, at)}")
    assert num_lines(stage) == 1
    assert rss_bytes(server.pid, "VmHWM") - before_bytes < MAX_GROWTH_BYTES


@pytest.mark.fault
def test_three_hundred_idle_strangers_cost_a_legal_worker_nothing(stage: SecureStage) -> None:
    server, worker, address = stage.secured()
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
    assert None not in waits_s
    said = is_undisturbed(server, worker, 300)
    print(
        f"300 idle strangers: echo p50 {1e6 * alone['p50_s']:.0f} us before, {1e6 * beside['p50_s']:.0f} us beside "
        f"them (worst {1e3 * beside['worst_s']:.1f} ms); all cut off after {cut_s:.1f} s; {said}; RSS "
        f"{mebibytes(rss_bytes(server.pid, 'VmHWM') - before_bytes)} more; {num_lines(stage)} line in the log"
    )
    assert beside["worst_s"] < SERVED_S
    assert cut_s < HANDSHAKE_S + SETTLED_S
    assert num_lines(stage) == 1


@pytest.mark.fault
def test_a_storm_of_wrong_keys_keeps_nobody_waiting(stage: SecureStage) -> None:
    """Each costs the master's I/O thread some arithmetic, and the handler a look."""
    server, worker, address = stage.secured()
    theirs, master = load_operator_keys(stage.keys), stage.worker_keys(0).master
    start_s, num_sent, worst_s = time.monotonic(), 0, 0.0
    for _ in range(10):
        for _ in range(20):
            public, secret = zmq.curve_keypair()
            pair = type(theirs.pair)(public.decode(), secret)
            stage.caller(address, ClientKeys(theirs.file, "nobody", pair, master), stranger())
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
def test_without_its_handler_a_master_lets_nobody_in_and_serves_who_is_inside(stage: SecureStage, how: str) -> None:
    server, worker, address = stage.secured()
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
    _, message = codec.decode(framing.receive(caller))
    assert isinstance(message, Refuse)
    return message.reason


def test_a_good_key_is_good_for_its_holder_alone(stage: SecureStage) -> None:
    server, worker, address = stage.secured()
    for keys, message, reason in (
        (stage.worker_keys(1), stranger("legal"), "the key worker-1 is not that of worker 0"),
        (stage.worker_keys(0), stranger("second"), "the key worker-0 is in use by worker 0"),
        (stage.worker_keys(1), Inquire(order=Order.STOP_NOW), "the key worker-1 is not good for the message inquire"),
        (load_operator_keys(stage.keys), stranger(), "the key operator is not good for the message register"),
    ):
        said = refusal(stage.caller(address, keys, message))
        assert said.startswith(reason)
        print(f"{said}: {is_undisturbed(server, worker, 0)}")
    assert num_lines(stage) == 1


def test_a_worker_whose_key_is_revoked_is_out_within_seconds(stage: SecureStage) -> None:
    server, worker, address = stage.secured()
    keys = stage.worker_keys(0)
    revoke(stage.keys, "worker-0")
    start_s = time.monotonic()
    while not (told := server.ask("state"))["lost"]:
        assert time.monotonic() < start_s + REREAD_S + SETTLED_S
    lost_s = time.monotonic() - start_s
    assert worker.process.wait(5) == EXIT_MASTER_LOST
    ended_s = time.monotonic() - start_s
    assert "had its key revoked" in told["lost"]
    assert told["workers"] == []
    again = stage.caller(address, keys, stranger("again"))
    assert not again.poll(500)
    print(f"revoked: lost after {lost_s:.2f} s, ended after {ended_s:.2f} s, not let in again")
    assert server.ask("state")["workers"] == []


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_no_secret_is_in_arguments_environments_and_logs(stage: SecureStage) -> None:
    server, worker, address = stage.secured()
    stage.caller(address, stage.worker_keys(1), stranger("legal")).poll(1000)
    clients = [stage.worker_keys(0), stage.worker_keys(1), load_operator_keys(stage.keys)]
    secrets = [keys.pair.secret for keys in clients]
    secrets += [line.split()[1] for line in (stage.keys / "master.key").read_bytes().splitlines() if b"secret" in line]
    assert len(secrets) == 4
    processes = [Path(f"/proc/{each.pid}") for each in (server, worker)]
    texts = [(process / what).read_bytes() for process in processes for what in ("cmdline", "environ")]
    logs = [path.read_bytes() for path in stage.folder.iterdir() if path.is_file()]
    assert all(texts)
    assert any(b"the key worker-1" in log for log in logs)
    for text in (*texts, *logs):
        assert not [secret for secret in secrets if secret in text]
    for path in (processes[1] / "fd").iterdir():
        assert not os.readlink(path).startswith(str(stage.keys)), "the file of a key is not left open"


@pytest.mark.fault
def test_what_encryption_costs(stage: SecureStage) -> None:
    figures = {}
    for is_secure in (False, True, False, True):
        server, *_ = stage.secured(is_secure)
        best = min((server.ask("echoes") for _ in range(5)), key=lambda echoes: echoes["p50_s"])
        figures[is_secure] = min(best["p50_s"], figures.get(is_secure, best["p50_s"]))
    print(f"echo of 200 bytes, p50: {1e6 * figures[False]:.0f} us plain, {1e6 * figures[True]:.0f} us with keys")
    assert figures[True] < SERVED_S
