"""Strangers and garbage against real processes: dropped, while who belongs is served.

Each test prints what it measured.
"""

from __future__ import annotations

import re
import select
import time
from collections.abc import Callable

import msgpack
import pytest
import zmq
from fuzz import (
    HTTP_REQUESTS,
    Fuzzer,
    closed_after_s,
    corpus,
    long_frame,
    mebibytes,
    plain_connection,
    rss_bytes,
    shaken_hands,
)
from stage import MAX_GROWTH_BYTES, SERVED_S, Stage, state
from trainmaster.api.errors import ProtocolError
from trainmaster.system.rpc import codec, framing
from trainmaster.system.rpc.commands import Echo
from trainmaster.system.rpc.framing import PROTOCOL_VERSION
from trainmaster.system.rpc.inquiries import Refuse
from trainmaster.system.rpc.link import WINDOW
from trainmaster.system.rpc.messages import Lane, Message, Ping, Register, Reply, Request, Shutdown, Welcome
from wire import DIGEST, EPOCH, RUN, Wire, free_address, head, welcome
from workbench import Workbench, wait_for_step

MAX_LOG_BYTES = 2**20
LAST_VERSION = 0xBEEF
"""Of a message that is refused in words: when they come, all before it has been read."""
LAYOUT = ("--model.layout.pp", "2", "--run.steps", "40")

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
    assert server.ask("state") == state(worker)
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
    hostile.send(head(LAST_VERSION))
    while framing.opened(hostile.recv_multipart())[0].version != LAST_VERSION:
        pass
    return num_frames


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
        self.send(self.wire.pack(welcome(orphan_s=60.0)))

    def send(self, frames: framing.Body) -> None:
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
            envelope, _ = framing.opened(frames)
        except ProtocolError:
            return "unreadable"
        if envelope.version != PROTOCOL_VERSION:
            return "unreadable"
    if envelope.epoch == EPOCH and 0 < envelope.order <= 2 * WINDOW:
        return "allowed"  # it takes its turn in the link, whatever it is
    if envelope.order == 0 and isinstance(message, Welcome | Refuse):
        return "allowed"
    if envelope.epoch == EPOCH and isinstance(message, Ping):
        return "allowed"  # it says what the master's clock shows
    return "unreadable" if message is None else "readable"


@pytest.mark.fault
def test_a_worker_does_not_go_back_to_an_epoch_that_is_over(stage: Stage) -> None:
    """A welcome may come late, after that of the next epoch."""
    master = HostileMaster(stage)
    master.echo(1000)
    stale = Wire(EPOCH - 1)
    master.send(stale.pack(welcome(epoch=EPOCH - 1, orphan_s=60.0)))
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
    hostile.send(head() + body)
    hostile.send(head(LAST_VERSION))
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
    assert server.ask("state") == state(worker)


def test_an_http_request_is_dropped(stage: Stage) -> None:
    server, worker, address = stage.served()
    before_bytes = rss_bytes(server.pid)
    for name, text in HTTP_REQUESTS.items():
        with plain_connection(address, text) as connection:
            closed_s = closed_after_s(connection, 0.5)
            said = "stays open" if closed_s is None else f"closed after {1000 * closed_s:.1f} ms"
        echo_s = server.ask("echo")["echo_s"]
        print(f"HTTP, {name}: {said}, echo {1000 * echo_s:.1f} ms")
        assert echo_s < SERVED_S
    assert rss_bytes(server.pid, "VmHWM") - before_bytes < MAX_GROWTH_BYTES
    assert server.ask("state") == state(worker)
    assert len(stage.server_log().read_text().splitlines()) <= 2 * len(HTTP_REQUESTS)


@pytest.mark.fault
def test_an_http_request_to_a_training_master_changes_nothing(workbench: Workbench) -> None:
    workbench.run_undisturbed(*LAYOUT)
    address = free_address()
    master = workbench.start("master", str(workbench.file), "--bind", address, *LAYOUT)
    workers = [workbench.start("worker", str(workbench.file), "--master", address) for _ in range(2)]
    wait_for_step(master, 2)
    assert master.stdout is not None
    for text in HTTP_REQUESTS.values():
        with plain_connection(address, text):
            next(line for line in master.stdout if line.startswith("step "))
    _, err = master.communicate(timeout=60)
    assert master.returncode == 0, err
    for worker in workers:
        worker.communicate(timeout=30)
        assert worker.returncode == 0
    log = (workbench.folder / "runs" / "test" / "logs" / "master.log").read_text()
    num_lines = len(re.findall("dropped a message|refused a worker", log))
    print(f"HTTP to a training master: {len(HTTP_REQUESTS)} requests, {num_lines} lines in its log")
    assert num_lines <= 2 * len(HTTP_REQUESTS)
    assert workbench.series("train/loss") == workbench.series("train/loss", "undisturbed")
    assert workbench.wait_until_gone(5.0) == []
