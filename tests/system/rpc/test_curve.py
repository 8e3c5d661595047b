"""Server and client with keys: who gets in, what each key is good for, and what those are told who do not get in."""

import asyncio
import contextlib
import logging
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from trainmaster.api.errors import ConfigError, RunError, WorkerLost
from trainmaster.system.rpc import outgoing as outgoing_module
from trainmaster.system.rpc import server as server_module
from trainmaster.system.rpc import zap
from trainmaster.system.rpc.commands import Done, HostStore
from trainmaster.system.rpc.inquiries import Inquire, Order, Refuse, RunStatus
from trainmaster.system.rpc.messages import Heartbeat, Message, Ping, Register, Reply, Request, Success, Welcome
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.claims import claim
from trainmaster.system.service.inquiry import ask, way_to
from trainmaster.system.service.keys import (
    ClientKeys,
    load_master_keys,
    load_operator_keys,
    load_worker_keys,
    make_keys,
    revoke,
)
from trainmaster.system.service.lifecycle import Life
from wire import Wire, head, welcome

RUN, EPOCH, DIGEST = "first", 3, "digest"
NOT_HEARD_S = 0.3
"""Of silence, after which nobody answers any more: answers take milliseconds."""
STATUS = RunStatus(
    run=RUN,
    state="running",
    state_s=1.0,
    up_s=1.0,
    epoch=EPOCH,
    host="here",
    pid=1,
    num_workers=1,
    workers=(),
    step=1,
    num_steps=2,
    values={},
)


@pytest.fixture(autouse=True)
def _quick_heart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(outgoing_module, "RECONNECT_S", 0.1)
    monkeypatch.setattr(server_module, "_SHUTDOWN_S", 0.05)
    monkeypatch.setattr(zap, "REREAD_S", 0.05)
    monkeypatch.setattr(zap, "HANDSHAKE_S", 0.5)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", 2)
    return tmp_path / "keys"


def worker_keys(keys: Path, number: int) -> ClientKeys:
    return load_worker_keys(keys / f"worker-{number}.key")


class Caller:
    """A socket with a key, or none."""

    def __init__(self, context: zmq.asyncio.Context, address: str, keys: ClientKeys | None, epoch: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        if keys is not None:
            keys.secure(self.socket)
        self.wire = Wire(epoch)
        self._delivered: deque[Message] = deque()
        self.socket.connect(address)

    async def send(self, message: Message) -> None:
        with contextlib.suppress(zmq.Again):  # refused already: there is nobody to send to
            await self.socket.send_multipart(self.wire.pack(message), zmq.NOBLOCK)

    async def receive(self) -> Message:
        """The next message that is not a ping."""
        while True:
            while self._delivered:
                if not isinstance(message := self._delivered.popleft(), Ping):
                    return message
            self._delivered += self.wire.unpack(await self.socket.recv_multipart())

    async def refusal(self) -> str:
        message = await self.receive()
        assert isinstance(message, Refuse), message
        return message.reason

    async def is_heard(self) -> bool:
        """Whether anything comes back."""
        return bool(await self.socket.poll(round(1000 * NOT_HEARD_S)))


def register(incarnation: str = "i", pid: int = 7) -> Register:
    return Register(host="here", pid=pid, incarnation=incarnation, address="127.0.0.1", versions={}, code_digest=DIGEST)


Connect = Callable[[ClientKeys | None], Caller]


def with_server(
    keys: Path | None, folder: Path, scenario: Callable[[Server, Connect], Awaitable[None]], num_workers: int = 1
) -> None:
    """Runs a scenario inside a server's life, in ten seconds at most."""

    async def main() -> None:
        context = zmq.asyncio.Context()
        server = Server(
            f"ipc://{folder}/s",
            RUN,
            EPOCH,
            num_workers,
            DIGEST,
            10.0,
            folder,
            None if keys is None else load_master_keys(keys),
        )
        server.on_inquiry = lambda _: STATUS
        callers: list[Caller] = []

        def connect(own: ClientKeys | None) -> Caller:
            callers.append(Caller(context, server.address, own, EPOCH))
            return callers[-1]

        try:
            async with asyncio.timeout(10), server:
                await scenario(server, connect)
        finally:
            context.destroy(linger=0)

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "zap"]


async def welcomed(server: Server, connect: Connect, own: ClientKeys) -> Caller:
    """The run's one worker."""
    worker = connect(own)
    await worker.send(register())
    await server.workers(5)
    server.welcome(welcome)
    assert isinstance(await worker.receive(), Welcome)
    return worker


async def works(server: Server, worker: Caller) -> None:
    """Has it answer a request."""
    asked = server.ask({0: HostStore()}, name="store", deadline_s=5.0)
    request = await worker.receive()
    assert isinstance(request, Request)
    outcome = Success(result=Done())
    await worker.send(Reply(run=RUN, epoch=EPOCH, id=request.id, outcome=outcome, seconds={}))
    assert (await asked)[0].success == outcome


# -- who gets in ------------------------------------------------------------------------------------------------------


def test_a_worker_with_its_key_is_served_and_leaves_when_it_likes(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect, worker_keys(keys, 0))
        await works(server, worker)
        worker.socket.close(linger=0)
        with pytest.raises(WorkerLost, match="closed its connection"):
            await server.lost
        assert server.num_refused == 0

    with_server(keys, tmp_path, scenario)


def test_strangers_are_not_heard_and_are_counted(keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_keys(tmp_path / "other", 1)
    theirs = load_worker_keys(tmp_path / "other" / "worker-0.key")
    mixed = ClientKeys(theirs.file, theirs.name, theirs.pair, worker_keys(keys, 0).master)

    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect, worker_keys(keys, 0))
        for own in (None, theirs, mixed):  # no key; another run's; a key of their own, and this master's public key
            before = server.num_refused
            stranger = connect(own)
            await stranger.send(register("stranger"))
            assert not await stranger.is_heard()
            stranger.socket.close(linger=0)
            await works(server, worker)
            assert server.num_refused > before

    with caplog.at_level(logging.WARNING):
        with_server(keys, tmp_path, scenario)
    lines = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("dropped a message: a stranger's handshake: it ")


def test_a_key_that_is_not_allowed_is_named_in_the_log(keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    theirs = worker_keys(keys, 1)
    revoke(keys, "worker-1")

    async def scenario(server: Server, connect: Connect) -> None:
        stranger = connect(theirs)
        await stranger.send(register())
        assert not await stranger.is_heard()
        assert server.num_refused == 1
        assert server.registered == []

    with_server(keys, tmp_path, scenario)
    assert f"its key is not allowed ({theirs.pair.public} from " in caplog.text
    assert theirs.pair.secret.decode() not in caplog.text


def test_nobody_gets_in_when_the_handler_breaks_and_who_is_inside_stays(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect, worker_keys(keys, 0))
        monkeypatch.setattr(zap.Gate, "_answer", None)
        for _ in range(2):  # by the first it breaks; the second finds it broken
            late = connect(worker_keys(keys, 1))
            await late.send(register("late"))
            assert not await late.is_heard()
        while server.num_refused < 2:  # they do not even get as far as to be ignored
            await works(server, worker)
        assert not [thread for thread in threading.enumerate() if thread.name == "zap"]
        await works(server, worker)

    with_server(keys, tmp_path, scenario)
    assert "the thread that checks keys broke down: nobody else gets in as long as this master lives" in caplog.text


# -- what a key is good for -------------------------------------------------------------------------------------------


def test_a_key_is_for_one_worker_at_a_time(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        first = connect(worker_keys(keys, 0))
        await first.send(register("first"))
        await first.socket.poll()
        second = connect(worker_keys(keys, 0))
        await second.send(register("second", pid=8))
        refusal = await second.receive()
        assert refusal == Refuse(reason="the key worker-0 is in use by a worker (pid 7 on here)", again=True)
        assert [each.incarnation for each in server.registered] == ["first"]
        first.socket.close(linger=0)
        with pytest.raises(WorkerLost):
            await server.lost
        await second.send(register("second", pid=8))  # in place of the one that was lost
        while not server.registered:
            await second.socket.recv_multipart()
        assert [each.incarnation for each in server.registered] == ["second"]

    with_server(keys, tmp_path, scenario, num_workers=2)


def test_a_worker_cannot_pass_for_another(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect, worker_keys(keys, 0))
        thief = connect(worker_keys(keys, 1))
        await thief.send(register())  # the same incarnation, as if on a new connection
        refusal = await thief.refusal()
        assert refusal == "the key worker-1 is not that of worker 0 (pid 7 on here), for which it wants to pass"
        asked = server.ask({0: HostStore()}, name="store", deadline_s=5.0)
        request = await worker.receive()
        assert isinstance(request, Request), "it went to its worker"
        forged = Reply(run=RUN, epoch=EPOCH, id=request.id, outcome=Success(result=Done()), seconds={})
        await thief.send(forged)
        await thief.send(Heartbeat(run=RUN, epoch=EPOCH))
        await thief.send(register())
        await thief.refusal()
        assert not asked.done(), "what another says in its name does not count"
        await worker.send(forged)
        await asked

    with_server(keys, tmp_path, scenario)


def test_a_worker_comes_back_on_another_connection_with_the_same_key(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect, worker_keys(keys, 0))
        again = connect(worker_keys(keys, 0))
        again.wire = worker.wire
        await again.send(register())
        assert isinstance(await again.receive(), Welcome)
        await works(server, again)
        assert not server.lost.done()

    with_server(keys, tmp_path, scenario)


def test_only_an_operator_inquires_and_an_operator_does_nothing_else(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        asked: list[Inquire] = []

        def on_inquiry(inquire: Inquire) -> RunStatus:
            asked.append(inquire)
            return STATUS

        server.on_inquiry = on_inquiry
        worker, operator = connect(worker_keys(keys, 0)), connect(load_operator_keys(keys))
        await worker.send(Inquire(order=Order.STOP_NOW))
        assert await worker.refusal() == "the key worker-0 is not good for the message inquire"
        await operator.send(register())
        assert await operator.refusal() == "the key operator is not good for the message register"
        assert server.registered == []
        assert asked == []
        assert await asyncio.to_thread(ask, server.address, Order.STOP, 5.0, load_operator_keys(keys)) == STATUS
        assert asked == [Inquire(order=Order.STOP)]

    with_server(keys, tmp_path, scenario)


# -- keys that change while the run goes on ---------------------------------------------------------------------------


def test_a_worker_whose_key_is_revoked_is_lost_and_not_heard_any_more(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect, worker_keys(keys, 0))
        asked = server.ask({0: HostStore()}, name="store", deadline_s=5.0)
        request = await worker.receive()
        assert isinstance(request, Request)
        revoke(keys, "worker-0")
        with pytest.raises(WorkerLost, match=r"^worker 0 \(pid 7 on here\) had its key revoked during store$") as lost:
            await asked
        assert lost.value.likely.startswith("somebody ran `trainmaster keys --revoke`")
        assert await worker.refusal() == "it was given up as lost"
        await worker.send(Reply(run=RUN, epoch=EPOCH, id=request.id, outcome=Success(result=Done()), seconds={}))
        await worker.send(register("another"))
        await worker.send(Inquire(order=Order.STATUS))
        assert not await worker.is_heard()
        assert server.registered == []

    with_server(keys, tmp_path, scenario)


def test_a_key_that_is_made_anew_gets_in(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        (keys / "worker-0.key").unlink()
        revoke(keys, "worker-0")
        make_keys(keys, 1)
        while True:  # until the master has looked: a refused socket is given up, as a client does
            worker = connect(worker_keys(keys, 0))
            await worker.send(register())
            if await worker.is_heard():
                break
            worker.socket.close(linger=0)
        assert len(await server.workers(5)) == 1

    with_server(keys, tmp_path, scenario)


def test_a_list_that_cannot_be_read_changes_nothing(keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect, worker_keys(keys, 0))
        (keys / "allowed").write_text("half a li")
        while "is not a whole file" not in caplog.text:
            await works(server, worker)
        await works(server, worker)

    with_server(keys, tmp_path, scenario)
    assert "allowed': is not a whole file of Trainmaster's keys. Copy it again, or make new. Until then" in caplog.text


# -- what those are told who do not get in ----------------------------------------------------------------------------

CLIENT = """
import sys
from pathlib import Path
from trainmaster.api.errors import TrainmasterError
from trainmaster.system.rpc import client as module
from trainmaster.system.rpc.messages import Register
from trainmaster.system.service.keys import load_worker_keys

module.HEARTBEAT_S = 0.05
address, file, deadline_s, incarnation = sys.argv[1:]
client = module.Client(address, Register(
    host="here", pid=7, incarnation=incarnation, address="127.0.0.1", versions={}, code_digest="digest"
), 5.0, load_worker_keys(Path(file)) if file else None)
try:
    print("rank", client.welcome(float(deadline_s)).rank, flush=True)
    client.next_request("compute")
except TrainmasterError as error:
    print(type(error).__name__, error)
"""


async def start_client(
    server: Server, file: Path | str, deadline_s: float, incarnation: str = "i"
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CLIENT,
        server.address,
        str(file),
        str(deadline_s),
        incarnation,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def said(server: Server, file: Path | str, deadline_s: float) -> str:
    """By a client that does not get in."""
    process = await start_client(server, file, deadline_s)
    out, err = await process.communicate()
    assert not err, err
    return out.decode()


def test_a_client_is_told_that_its_key_is_not_allowed(keys: Path, tmp_path: Path):
    revoke(keys, "worker-1")

    async def scenario(server: Server, connect: Connect) -> None:
        file = keys / "worker-1.key"
        assert (await said(server, file, 60.0)).startswith(
            f"ConfigError --keys = '{file}': the master at {server.address} does not accept this key (worker-1)"
        )

    with_server(keys, tmp_path, scenario)


def test_a_client_with_keys_of_another_run_is_told_of_the_likely_cause(keys: Path, tmp_path: Path):
    make_keys(tmp_path / "other", 1)

    async def scenario(server: Server, connect: Connect) -> None:
        file = tmp_path / "other" / "worker-0.key"
        told = await said(server, file, 0.5)
        assert told.startswith(f"RunError no master answered at {server.address} within 0.5 s")
        assert f"connections to it ended in the handshake: {file} is likely of another run, or this" in told
        assert "has no keys (--keys RUN/keys/worker-N.key)" in told

    with_server(keys, tmp_path, scenario)


def test_a_client_without_keys_is_told_that_the_master_asks_for_them(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        told = await said(server, "", 0.5)
        assert told.startswith(f"RunError no master answered at {server.address} within 0.5 s")
        assert "ended in the handshake: it likely asks for keys, and none were given (--keys RUN" in told

    with_server(keys, tmp_path, scenario)


def test_a_client_with_keys_does_not_speak_to_a_master_without(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        told = await said(server, keys / "worker-0.key", 0.5)
        assert "or this master has no keys" in told
        assert server.registered == []

    with_server(None, tmp_path, scenario)


def test_a_client_whose_key_is_revoked_ends(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        process = await start_client(server, keys / "worker-0.key", 5.0)
        await server.workers(5)
        server.welcome(welcome)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"rank 0\n"
        revoke(keys, "worker-0")
        with pytest.raises(WorkerLost, match="had its key revoked"):
            await server.lost
        _, err = await process.communicate()
        assert process.returncode == 3
        assert b"the master refuses this worker: it was given up as lost: this worker ends" in err

    with_server(keys, tmp_path, scenario)


def test_a_worker_that_comes_back_before_its_predecessor_is_known_to_be_dead_gets_in(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        first = await welcomed(server, connect, worker_keys(keys, 0))
        second = await start_client(server, keys / "worker-0.key", 9.0, "second")
        assert second.stderr is not None
        told = await second.stderr.readline()  # at once, and once
        assert told.startswith(b"not let in yet: the key worker-0 is in use by worker 0 (pid 7 on here). It is asked")
        first.socket.close(linger=0)
        with pytest.raises(WorkerLost):
            await server.lost
        server.next_epoch()
        assert [each.incarnation for each in await server.workers(5)] == ["second"]
        server.welcome(lambda rank: welcome(rank, epoch=server.epoch))
        assert second.stdout is not None
        assert await second.stdout.readline() == b"rank 0\n"
        second.kill()
        assert (await second.communicate())[1] == b""

    with_server(keys, tmp_path, scenario)


def test_a_second_worker_with_the_same_key_is_refused_when_its_time_is_over(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        first = await welcomed(server, connect, worker_keys(keys, 0))
        second = await start_client(server, keys / "worker-0.key", 0.5, "second")
        out, err = await second.communicate()
        assert out.decode() == (
            f"ConfigError --master = '{server.address}': the master refused this worker: the key worker-0 is in use by "
            "worker 0 (pid 7 on here). See there.\n"
        )
        assert len(err.splitlines()) == 1, err
        await works(server, first)

    with_server(keys, tmp_path, scenario)


def test_who_inquires_without_the_right_key_is_told_so_at_once(keys: Path, tmp_path: Path):
    make_keys(tmp_path / "other", 1)
    revoked = load_operator_keys(keys)
    (keys / "operator.key").unlink()
    revoke(keys, "operator")
    make_keys(keys, 1)

    async def scenario(server: Server, connect: Connect) -> None:
        for own, rule in (
            (
                None,
                r"--keys = None: the master at .* breaks off every handshake: it likely asks for keys, and none were "
                r"given\. Give the run's own, --keys RUN/keys/operator\.key",
            ),
            (load_operator_keys(tmp_path / "other"), r"off every handshake: .*operator\.key is likely of another run"),
            (revoked, r"operator\.key': the master at .* does not accept this key \(operator\)"),
        ):
            with pytest.raises(ConfigError, match=rule):
                await asyncio.to_thread(ask, server.address, Order.STATUS, 5.0, own)

    with_server(keys, tmp_path, scenario)


def test_to_inquire_with_a_key_at_a_master_without_is_refused(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        with pytest.raises(ConfigError, match=r"operator\.key is likely of another run, or this master has no keys"):
            await asyncio.to_thread(ask, server.address, Order.STATUS, 5.0, load_operator_keys(keys))
        assert await asyncio.to_thread(ask, server.address, Order.STATUS, 5.0) == STATUS

    with_server(None, tmp_path, scenario)


def test_to_inquire_where_nobody_is_takes_as_long_as_it_is_given(tmp_path: Path):
    with pytest.raises(RunError, match=r"no master answered at ipc://.* within 0\.05 s"):
        ask(f"ipc://{tmp_path}/nobody", Order.STATUS, 0.05)


def test_an_operators_key_is_found_in_the_runs_directory(tmp_path: Path):
    (tmp_path / "plain").mkdir()
    Life(tmp_path / "plain", RUN, "ipc:///nowhere")
    with claim(tmp_path / "plain"):
        assert way_to("plain", tmp_path) == ("ipc:///nowhere", None)
        assert way_to("tcp://127.0.0.1:5555", tmp_path) == ("tcp://127.0.0.1:5555", None)
        make_keys(tmp_path / "plain" / "keys", 1)
        own = load_operator_keys(tmp_path / "plain" / "keys")
        assert way_to("plain", tmp_path) == ("ipc:///nowhere", own)
        assert way_to("tcp://127.0.0.1:5555", tmp_path, tmp_path / "plain" / "keys") == ("tcp://127.0.0.1:5555", own)
        (tmp_path / "plain" / "keys" / "operator.key").unlink()
        with pytest.raises(ConfigError, match=r"operator\.key': there is no such file"):
            way_to("plain", tmp_path)


def test_an_address_that_cannot_be_had_leaves_nothing_open(keys: Path):
    with pytest.raises(ConfigError, match=r"--bind = 'tcp://192\.0\.2\.1:5555': cannot bind"):
        Server("tcp://192.0.2.1:5555", RUN, EPOCH, 1, DIGEST, 10.0, Path(), load_master_keys(keys))


def test_frames_that_are_too_many_are_dropped_with_keys_too(keys: Path, tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = connect(worker_keys(keys, 0))
        await worker.socket.send_multipart([head()] * 200)
        await worker.send(register())
        assert len(await server.workers(5)) == 1

    with_server(keys, tmp_path, scenario)
