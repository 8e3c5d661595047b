"""The server against bare DEALER sockets that speak the codec, over ipc."""

import asyncio
import signal
import socket
import sys
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from trainmaster.api.errors import (
    ConfigError,
    DataError,
    DeadlineExceeded,
    ModelError,
    RemoteError,
    RunError,
    TrainmasterError,
    WorkerLost,
)
from trainmaster.system.rpc import codec, framing
from trainmaster.system.rpc import messages as messages_module
from trainmaster.system.rpc import outgoing as outgoing_module
from trainmaster.system.rpc import server as server_module
from trainmaster.system.rpc.commands import Done, HostStore, ModelLoaded, Release, Save, ShardFile
from trainmaster.system.rpc.framing import PROTOCOL_VERSION
from trainmaster.system.rpc.inquiries import Refuse
from trainmaster.system.rpc.link import ACKNOWLEDGED
from trainmaster.system.rpc.messages import (
    Cancel,
    Failure,
    Heartbeat,
    Lane,
    Message,
    Ping,
    Register,
    Reply,
    Request,
    Shutdown,
    Success,
    Welcome,
)
from trainmaster.system.rpc.peer import Answer, Asked
from trainmaster.system.rpc.server import Server
from wire import DIGEST, EPOCH, RUN, Wire, free_address, head, register, welcome

ALMOST_NO_TIME_S = 0.02
OURS = head()


@pytest.fixture(autouse=True)
def _quick_heart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "HEARTBEAT_S", ALMOST_NO_TIME_S)
    monkeypatch.setattr(server_module, "_LATE_GRACE_S", ALMOST_NO_TIME_S)
    monkeypatch.setattr(outgoing_module, "RECONNECT_S", 0.1)


class FakeWorker:
    """A worker's socket."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._context, self._address = context, address
        self._incarnation = uuid.uuid4().hex
        self.wire = Wire(EPOCH)
        self._delivered: deque[Message] = deque()
        self.connect()

    def connect(self) -> None:
        """A new connection of the same worker."""
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(self._address)

    async def send(self, message: Message) -> None:
        if isinstance(message, Register):
            message = replace(message, incarnation=self._incarnation)
        await self.socket.send_multipart(self.wire.pack(message))

    async def ping(self) -> None:
        """Waits for a ping, which comes to registered workers."""
        assert self.wire.unpack(await self.socket.recv_multipart()) == [Ping()]

    async def receive(self) -> Message:
        """The next message that is not a ping."""
        while True:
            while self._delivered:
                if not isinstance(message := self._delivered.popleft(), Ping):
                    return message
            self._delivered += self.wire.unpack(await self.socket.recv_multipart())

    async def answer(self, request: Message, outcome: Success | Failure, **changes: object) -> None:
        assert isinstance(request, Request)
        fields = {"run": RUN, "epoch": EPOCH, "id": request.id, "seconds": {"release": 0.5}, **changes}
        await self.send(Reply(outcome=outcome, **fields))


Connect = Callable[[], FakeWorker]


def with_server(
    folder: Path,
    scenario: Callable[[Server, Connect], Awaitable[None]],
    num_workers: int = 1,
    silence_s: float = 10.0,
) -> None:
    """Runs a scenario inside a server's life, in five seconds at most."""

    async def main() -> None:
        context = zmq.asyncio.Context()
        server = Server(f"ipc://{folder}/s", RUN, EPOCH, num_workers, DIGEST, silence_s, folder)
        workers: list[FakeWorker] = []

        def connect() -> FakeWorker:
            workers.append(FakeWorker(context, server.address))
            return workers[-1]

        try:
            async with asyncio.timeout(5), server:
                await scenario(server, connect)
        finally:
            context.destroy(linger=0)

    asyncio.run(main())


async def welcomed(server: Server, connect: Connect) -> FakeWorker:
    """The one worker of a run, after its welcome."""
    worker = connect()
    await worker.send(register())
    await server.workers(5)
    server.welcome(welcome)
    assert isinstance(await worker.receive(), Welcome)
    return worker


async def all_welcomed(server: Server, connect: Connect, num_workers: int) -> list[FakeWorker]:
    """By rank, after their welcome."""
    workers = [connect() for _ in range(num_workers)]
    for worker in workers:
        await worker.send(register())
        await worker.ping()  # it is registered: ranks go by that order
    await server.workers(5)
    server.welcome(welcome)
    for worker in workers:
        assert isinstance(await worker.receive(), Welcome)
    return workers


def ask(server: Server, num_workers: int, deadline_s: float = 5.0) -> Asked:
    command = Release(ids=("a",))
    return server.ask(dict.fromkeys(range(num_workers), command), name="release of a", deadline_s=deadline_s)


def submit(server: Server, rank: int = 0, deadline_s: float = 5.0, lane: Lane = Lane.COMPUTE) -> Asked:
    return server.ask({rank: Release(ids=("a",))}, name="release of a", deadline_s=deadline_s, lane=lane)


# -- registration -----------------------------------------------------------------------------------------------------


def test_ranks_go_by_order_of_registration_with_hosts_side_by_side(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        workers = []
        for pid, host in enumerate(["left", "right", "left"]):
            workers.append(connect())
            await workers[-1].send(register(host=host, pid=pid))
            await workers[-1].ping()  # else registrations of several sockets arrive in any order
        registered = await server.workers(5)
        assert [(each.host, each.pid) for each in registered] == [("left", 0), ("left", 2), ("right", 1)]
        server.welcome(welcome)
        ranks = [(await worker.receive()).rank for worker in workers]
        assert ranks == [0, 2, 1]

    with_server(tmp_path, scenario, num_workers=3)


def test_a_worker_with_another_file_is_refused(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = connect()
        await worker.send(register(code_digest="other"))
        answer = await worker.receive()
        assert isinstance(answer, Refuse)
        assert answer.reason.startswith("the worker's experiment file differs from the master's: copy the same file")
        await welcomed(server, connect)

    with_server(tmp_path, scenario)


def test_a_worker_of_another_version_is_refused_in_its_own(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = connect()
        await worker.socket.send(head(version=99) + b"a registration that only they can read")
        envelope, body = framing.opened(await worker.socket.recv_multipart())
        assert envelope.version == 99
        reason = f"the worker speaks protocol 99, the master {PROTOCOL_VERSION}: install the same"
        assert codec.decode_body(body) == Refuse(reason=reason)
        await welcomed(server, connect)

    with_server(tmp_path, scenario)


def test_one_worker_too_many_is_refused_and_the_run_goes_on(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker, late = await welcomed(server, connect), connect()
        await late.send(register(pid=8))
        answer = await late.receive()
        assert isinstance(answer, Refuse)
        assert answer.reason == "the run has its 1 workers already"
        future = submit(server)
        await worker.answer(await worker.receive(), Success(result=Done()))
        await future
        assert not server.lost.done()

    with_server(tmp_path, scenario)


def test_workers_that_do_not_come_are_missed_by_number(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        await connect().send(register())
        with pytest.raises(
            DeadlineExceeded, match=r"only [01] of 2 workers registered at ipc://.* \(run\.deadlines\.register_s\)"
        ):
            await server.workers(0.05)

    with_server(tmp_path, scenario, num_workers=2)


def test_a_worker_that_leaves_before_all_are_there_is_lost(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = connect()
        await worker.send(register())
        await worker.ping()
        worker.socket.close(linger=0)
        with pytest.raises(WorkerLost, match=r"a worker \(pid 7 on here\) closed its connection: it died or was cut"):
            await server.workers(5)

    with_server(tmp_path, scenario, num_workers=2)


# -- requests and replies ---------------------------------------------------------------------------------------------


def test_a_request_is_answered(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        hook = Save(model="actor", directory="d")
        future = server.ask({0: HostStore()}, name="x", deadline_s=5, lane=Lane.TRANSFER, post_hooks=(hook,))
        request = await worker.receive()
        assert isinstance(request, Request)
        assert (request.run, request.epoch, request.lane) == (RUN, EPOCH, Lane.TRANSFER)
        assert (request.command, request.pre_hooks, request.post_hooks) == (HostStore(), (), (hook,))
        success = Success(result=ModelLoaded(num_parameters=3), files=(ShardFile(file="f"),))
        await worker.answer(request, success)
        assert await future == {0: Answer(success, {"release": 0.5})}

    with_server(tmp_path, scenario)


def test_requests_arrive_in_order_and_may_be_answered_in_any(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        futures = [submit(server) for _ in range(20)]
        requests = [await worker.receive() for _ in futures]
        assert [request.id for request in requests] == sorted(request.id for request in requests)
        for request in reversed(requests):
            await worker.answer(request, Success(result=ModelLoaded(num_parameters=request.id)))
        answers = [(await future)[0].success.result.num_parameters for future in futures]
        assert answers == [request.id for request in requests]

    with_server(tmp_path, scenario)


CONFIG = {"field": "model.path", "value": "here", "rule": "is empty", "cure": "fill it"}


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            Failure(kind="ConfigError", message="m", traceback="t", **CONFIG),
            ConfigError,
            "model.path = 'here': is empty",
        ),
        (Failure(kind="DataError", message="m", traceback="t", **CONFIG), DataError, "model.path = 'here': is empty"),
        (Failure(kind="ModelError", message="cannot cut", traceback="t"), ModelError, "cannot cut"),
        (
            Failure(kind="KeyError", message="'x'", traceback="Traceback ..."),
            RemoteError,
            "release of a on worker 0 (pid 7 on here) failed with KeyError: 'x'",
        ),
    ],
)
def test_a_failure_comes_out_as_what_it_was(
    tmp_path: Path, failure: Failure, kind: type[TrainmasterError], message: str
):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        future = submit(server)
        await worker.answer(await worker.receive(), failure)
        with pytest.raises(TrainmasterError) as caught:
            await future
        assert type(caught.value) is kind
        assert str(caught.value).startswith(message)
        if isinstance(caught.value, RemoteError):
            assert caught.value.remote_traceback == "Traceback ..."

    with_server(tmp_path, scenario)


def test_replies_of_other_lives_and_requests_are_dropped(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        future = submit(server)
        request = await worker.receive()
        wrong = Success(result=ModelLoaded(num_parameters=666))
        for changes in ({"epoch": EPOCH - 1}, {"epoch": EPOCH + 1}, {"run": "other"}, {"id": request.id + 1}):
            await worker.answer(request, wrong, **changes)
        await worker.answer(request, Success(result=Done()))
        await worker.answer(request, wrong)
        assert (await future)[0].success.result == Done()

    with_server(tmp_path, scenario)


def test_a_request_over_its_deadline_is_named_and_its_late_reply_dropped(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        future = submit(server, deadline_s=ALMOST_NO_TIME_S)
        with pytest.raises(
            DeadlineExceeded, match=r"release of a on worker 0 \(pid 7 on here\) took longer than its 0\.02 s"
        ):
            await future
        await worker.answer(await worker.receive(), Success(result=Done()))
        after = submit(server)
        await worker.answer(await worker.receive(), Success(result=ModelLoaded(num_parameters=2)))
        assert (await after)[0].success.result == ModelLoaded(num_parameters=2)

    with_server(tmp_path, scenario)


def test_a_request_that_was_given_up_is_no_loss(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        submit(server).cancel()
        await asyncio.sleep(0)
        request = await worker.receive()
        assert isinstance(request, Request)
        await worker.answer(request, Success(result=Done()))
        assert await worker.receive() == Cancel(run=RUN, epoch=EPOCH, id=request.id)
        after = submit(server)
        await worker.answer(await worker.receive(), Success(result=Done()))
        await after

    with_server(tmp_path, scenario)


@pytest.mark.parametrize("frames", [[b""], [b"x", b"y"], [OURS + b"\xc1"], [OURS, b"", b""], [OURS] * 100])
def test_garbage_is_dropped(tmp_path: Path, frames: list[bytes]):
    async def scenario(server: Server, connect: Connect) -> None:
        stranger = connect()
        await stranger.socket.send_multipart(frames)
        await stranger.send(Heartbeat(run=RUN, epoch=EPOCH))
        worker = await welcomed(server, connect)
        await worker.send(Shutdown(is_done=True, reason="a worker does not say this"))
        future = submit(server)
        await worker.answer(await worker.receive(), Success(result=Done()))
        await future

    with_server(tmp_path, scenario)


def test_a_worker_that_sends_what_cannot_be_read_is_lost(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        future = submit(server)
        await worker.socket.send_multipart([b"x", b"y"])
        with pytest.raises(
            WorkerLost, match=r"worker 0 .* sent what cannot be read \(a frame of 1 .* during rel"
        ) as lost:
            await future
        assert "it died" not in str(lost.value)
        assert lost.value.likely.startswith("it runs another state of Trainmaster's code than the master")

    with_server(tmp_path, scenario)


# -- loss -------------------------------------------------------------------------------------------------------------


def test_a_worker_that_closes_its_connection_is_lost_with_what_it_was_at(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        futures = [submit(server), submit(server, lane=Lane.TRANSFER)]
        worker.socket.close(linger=0)
        for future in futures:
            with pytest.raises(
                WorkerLost,
                match=r"worker 0 \(pid 7 on here\) closed its connection during release of a: it died or was cut off",
            ):
                await future
        with pytest.raises(WorkerLost, match="worker 0"):
            await server.lost

    with_server(tmp_path, scenario)


def test_a_loss_is_known_though_nothing_was_asked(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        worker.socket.close(linger=0)
        with pytest.raises(WorkerLost, match=r"closed its connection: it died") as lost:
            await server.lost
        assert lost.value.likely == WorkerLost.likely

    with_server(tmp_path, scenario)


def test_a_connection_that_closes_is_missed_before_the_next_ping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 2.0)

    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        await worker.ping()
        worker.socket.close(linger=0)
        async with asyncio.timeout(1.5):  # two of four ticks, and the time to come back
            with pytest.raises(WorkerLost, match=r"closed its connection"):
                await server.lost

    with_server(tmp_path, scenario)


def test_every_worker_is_pinged_once_in_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 0.2)

    async def scenario(server: Server, connect: Connect) -> None:
        workers = [connect() for _ in range(6)]
        for worker in workers:
            await worker.send(register())
        await server.workers(5)
        await asyncio.gather(*(worker.ping() for worker in workers))
        start_s = asyncio.get_running_loop().time()
        for _ in range(3):
            await asyncio.gather(*(worker.ping() for worker in workers))
        assert asyncio.get_running_loop().time() - start_s > 2 * 0.2

    with_server(tmp_path, scenario, num_workers=6)


def test_with_many_workers_each_is_pinged_more_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages_module, "_PINGED_EACH_S", 2)
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 0.1)

    async def scenario(server: Server, connect: Connect) -> None:
        workers = await all_welcomed(server, connect, 6)
        await asyncio.gather(*(worker.ping() for worker in workers))
        start_s = asyncio.get_running_loop().time()
        for _ in range(3):
            await asyncio.gather(*(worker.ping() for worker in workers))
        assert asyncio.get_running_loop().time() - start_s > 2 * 3 * 0.1

    with_server(tmp_path, scenario, num_workers=6)


def test_who_sends_half_a_window_hears_at_once_that_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 4.0)

    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        for identity in range(ACKNOWLEDGED):  # of requests that nobody made
            await worker.send(Reply(run=RUN, epoch=EPOCH, id=identity, outcome=Success(result=Done()), seconds={}))
        async with asyncio.timeout(2):
            while not worker.wire.link.is_idle:
                await worker.ping()

    with_server(tmp_path, scenario)


@pytest.mark.parametrize(("num_workers", "expected"), [(1, 1), (16, 1), (64, 1), (65, 2), (1024, 16), (4096, 64)])
def test_no_more_than_some_workers_are_pinged_each_second(num_workers: int, expected: int):
    assert messages_module.seldomness(num_workers) == expected


def test_who_is_told_something_is_not_waited_for(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        workers = await all_welcomed(server, connect, 2)
        server.tell(dict.fromkeys(range(2), Release(ids=("a",))), deadline_s=5.0, lane=Lane.TRANSFER)
        for worker in workers:
            request = await worker.receive()
            assert isinstance(request, Request)
            assert (request.command, request.lane, request.is_silent) == (Release(ids=("a",)), Lane.TRANSFER, True)
        assert server.roster.num_waiting() == {0: 0, 1: 0}
        failure = Failure(kind="MemoryError", message="no room", traceback="here")
        await workers[1].answer(request, failure, seconds={"release": 0.1}, is_unasked=True)
        with pytest.raises(RemoteError, match=r"release on worker 1 .*MemoryError: no room"):
            await server.lost

    with_server(tmp_path, scenario, num_workers=2)


def test_workers_that_are_asked_together_are_sent_one_request(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        workers = await all_welcomed(server, connect, 3)
        asked = ask(server, 3)
        requests = [await worker.receive() for worker in workers]
        assert requests[0] == requests[1] == requests[2]
        for rank in (2, 0, 1):
            await workers[rank].answer(requests[rank], Success(result=ModelLoaded(num_parameters=rank)))
        answers = await asked
        assert [(rank, answer.success.result.num_parameters) for rank, answer in answers.items()] == [
            (0, 0),
            (1, 1),
            (2, 2),
        ]

    with_server(tmp_path, scenario, num_workers=3)


def test_the_first_that_fails_is_named_at_once_and_others_are_listened_to(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        workers = await all_welcomed(server, connect, 3)
        asked = ask(server, 3)
        requests = [await worker.receive() for worker in workers]
        await workers[1].answer(requests[1], Failure(kind="KeyError", message="'x'", traceback=""))
        with pytest.raises(RemoteError, match=r"release of a on worker 1 \(pid 7 on here\) failed with KeyError"):
            await asked
        assert not asked.is_settled
        workers[2].socket.close(linger=0)
        await asked.news()
        assert [type(error) for error in asked.errors] == [RemoteError, WorkerLost]
        await workers[0].answer(requests[0], Success(result=Done()))
        await asked.news()
        assert asked.is_settled

    with_server(tmp_path, scenario, num_workers=3)


def test_who_is_late_of_those_that_were_asked_together_is_named(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        workers = await all_welcomed(server, connect, 2)
        asked = ask(server, 2, deadline_s=0.5)
        await workers[0].answer(await workers[0].receive(), Success(result=Done()))
        with pytest.raises(DeadlineExceeded, match=r"release of a on worker 1 \(pid 7 on here\) took longer"):
            await asked
        assert asked.is_settled

    with_server(tmp_path, scenario, num_workers=2)


def test_who_has_answered_is_not_told_of_a_cancellation(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        workers = await all_welcomed(server, connect, 2)
        asked = ask(server, 2)
        requests = [await worker.receive() for worker in workers]
        news = asked.news()
        await workers[0].answer(requests[0], Success(result=Done()))
        await news
        asked.cancel()
        ask(server, 2)
        assert isinstance(await workers[0].receive(), Request)
        assert await workers[1].receive() == Cancel(run=RUN, epoch=EPOCH, id=requests[1].id)

    with_server(tmp_path, scenario, num_workers=2)


def test_of_workers_that_are_asked_one_is_lost_already(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        workers = await all_welcomed(server, connect, 2)
        workers[1].socket.close(linger=0)
        with pytest.raises(WorkerLost):
            await server.lost
        with pytest.raises(WorkerLost, match="worker 1"):
            await ask(server, 2)

    with_server(tmp_path, scenario, num_workers=2)


def test_a_request_to_a_worker_that_was_lost_fails_at_once(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        worker.socket.close(linger=0)
        with pytest.raises(WorkerLost, match="worker 0"):
            await server.lost
        with pytest.raises(WorkerLost, match="worker 0"):
            await submit(server, deadline_s=0.5)

    with_server(tmp_path, scenario)


def test_a_worker_without_heartbeats_is_unresponsive_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        future = submit(server)
        request = await worker.receive()
        for _ in range(6):  # pings come once a heartbeat; the connection itself is answered for by ZeroMQ
            await worker.ping()
        assert "worker 0 (pid 7 on here) is unresponsive" in caplog.text
        assert not server.lost.done()
        await worker.answer(request, Success(result=Done()))
        await future
        assert "worker 0 (pid 7 on here) answers again after" in caplog.text

    with_server(tmp_path, scenario, silence_s=0.5)


STOPPED = """
import sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
socket.send_multipart([bytes.fromhex(frame) for frame in sys.argv[2:]])
while True:
    socket.recv_multipart()
    print("heard", flush=True)
"""


def test_a_stopped_process_is_lost(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        frames = [frame.hex() for frame in Wire(EPOCH).pack(register())]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STOPPED, server.address, *frames, stdout=asyncio.subprocess.PIPE
        )
        try:
            await server.workers(4.0)
            server.welcome(welcome)
            assert process.stdout is not None
            await process.stdout.readline()
            future = submit(server)
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(WorkerLost, match=r"worker 0 .* sent no sign of life for \d s \(run\."):
                await future
        finally:
            process.kill()
            await process.wait()

    with_server(tmp_path, scenario, silence_s=1.0)


def test_heartbeats_keep_a_worker(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        for _ in range(20):
            await worker.ping()
            await worker.send(Heartbeat(run=RUN, epoch=EPOCH))
        assert not server.lost.done()

    with_server(tmp_path, scenario, silence_s=0.1)


def test_before_its_welcome_a_worker_may_be_silent(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = connect()
        await worker.send(register())
        for _ in range(8):
            await worker.ping()
        assert not server.lost.done()

    with_server(tmp_path, scenario, num_workers=2, silence_s=0.01)


def test_a_killed_process_is_a_lost_worker(tmp_path: Path):
    script = (
        "import sys, zmq\n"
        "socket = zmq.Context().socket(zmq.DEALER)\n"
        "socket.connect(sys.argv[1])\n"
        "socket.send_multipart([bytes.fromhex(frame) for frame in sys.argv[2:]])\n"
        "while True:\n"
        "    socket.recv_multipart()\n"
    )
    frames = [frame.hex() for frame in Wire(EPOCH).pack(register(pid=99))]

    async def scenario(server: Server, _: Connect) -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, server.address, *frames)
        try:
            await server.workers(5)
            server.welcome(welcome)
            future = submit(server)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(WorkerLost, match=r"worker 0 \(pid 99 on here\) closed its connection during release"):
                await future
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    with_server(tmp_path, scenario)


# -- connections that break, and epochs ------------------------------------------------------------------------------


def test_a_worker_whose_connection_comes_back_gets_what_it_missed_once(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        futures = [submit(server) for _ in range(3)]
        first = await worker.receive()
        worker.socket.close(linger=0)
        worker.connect()
        await worker.send(register(run=RUN, epoch=EPOCH))
        requests = [first, await worker.receive(), await worker.receive()]
        for request in requests:
            await worker.answer(request, Success(result=Done()))
        await asyncio.gather(*futures)
        assert len({request.id for request in requests}) == 3
        assert not server.lost.done()

    with_server(tmp_path, scenario)


def test_a_welcome_that_was_missed_is_said_again(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        await worker.send(register())
        assert isinstance(await worker.receive(), Welcome)

    with_server(tmp_path, scenario)


def test_a_repeated_reply_counts_once(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        futures = [submit(server), submit(server)]
        ids = [(await worker.receive()).id for _ in futures]
        replies = [
            worker.wire.pack(
                Reply(
                    run=RUN, epoch=EPOCH, id=each, outcome=Success(result=ModelLoaded(num_parameters=each)), seconds={}
                )
            )
            for each in ids
        ]
        for frames in (replies[1], replies[1], replies[0], replies[0]):  # out of order too
            await worker.socket.send_multipart(frames)
        assert [(await future)[0].success.result.num_parameters for future in futures] == ids

    with_server(tmp_path, scenario)


def test_a_worker_that_was_given_up_is_fenced(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        worker.socket.close(linger=0)
        with pytest.raises(WorkerLost):
            await server.lost
        worker.connect()
        await worker.send(register(run=RUN, epoch=EPOCH))
        assert await worker.receive() == Refuse(reason="it was given up as lost")

    with_server(tmp_path, scenario)


def test_a_worker_of_another_run_is_refused(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        stray = connect()
        await stray.send(register(run="other", epoch=EPOCH))
        refusal = await stray.receive()
        assert isinstance(refusal, Refuse)
        assert refusal.reason == f"it belongs to the run other, and this master's is {RUN}"
        await welcomed(server, connect)

    with_server(tmp_path, scenario)


def test_nobody_can_speak_under_the_name_of_anothers_connection(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        worker = await welcomed(server, connect)
        (route,) = server.roster.by_route
        forger = worker._context.socket(zmq.DEALER)
        forger.setsockopt(zmq.ROUTING_ID, route)
        forger.connect(server.address)
        await forger.send_multipart([b"garbage", b""])
        future = submit(server)
        await worker.answer(await worker.receive(), Success(result=Done()))
        await future
        assert not await forger.poll(0)
        assert not server.lost.done()
        forger.close(linger=0)

    with_server(tmp_path, scenario)


def test_a_stranger_cannot_have_much_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def scenario(server: Server, connect: Connect) -> None:
        await connect().socket.send(OURS + bytes(2**15))
        await welcomed(server, connect)
        assert "a first message of 32810 bytes" in caplog.text

    with_server(tmp_path, scenario)


def test_after_a_loss_the_others_go_on_in_a_new_epoch(tmp_path: Path):
    async def scenario(server: Server, connect: Connect) -> None:
        stays, leaves = connect(), connect()
        for worker, pid in ((leaves, 1), (stays, 2)):
            await worker.send(register(pid=pid))
            await worker.ping()
        await server.workers(5)
        server.welcome(welcome)
        assert [(await worker.receive()).rank for worker in (leaves, stays)] == [0, 1]
        stale = submit(server, rank=1)
        old = await stays.receive()
        leaves.socket.close(linger=0)
        with pytest.raises(WorkerLost, match=r"worker 0 \(pid 1"):
            await server.lost

        server.next_epoch()
        assert str(stale.exception()) == f"epoch {EPOCH} is over"
        comes = connect()
        await comes.send(register(pid=3))
        assert [each.pid for each in await server.workers(5)] == [2, 3]
        server.welcome(lambda rank: welcome(rank, epoch=server.epoch))
        for worker in (stays, comes):
            assert (await worker.receive()).epoch == EPOCH + 1
        await stays.answer(old, Success(result=ModelLoaded(num_parameters=666)))  # of the old epoch, on the old link
        stays.wire, comes.wire = Wire(EPOCH + 1), Wire(EPOCH + 1)
        futures = [submit(server, rank=0), submit(server, rank=1)]
        for worker in (stays, comes):
            await worker.answer(await worker.receive(), Success(result=Done()), epoch=EPOCH + 1)
        assert [answer.success.result for answers in await asyncio.gather(*futures) for answer in answers.values()] == [
            Done(),
            Done(),
        ]

    with_server(tmp_path, scenario, num_workers=2)


def test_too_many_requests_that_wait_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "MAX_PENDING", 3)

    async def scenario(server: Server, connect: Connect) -> None:
        await welcomed(server, connect)
        for _ in range(3):
            submit(server)
        with pytest.raises(RunError, match=r"worker 0 .* has 3 requests that wait for replies, and release of a would"):
            submit(server)

    with_server(tmp_path, scenario)


# -- beginning and end ------------------------------------------------------------------------------------------------


def test_at_the_end_workers_are_told(tmp_path: Path):
    async def main() -> None:
        context = zmq.asyncio.Context()
        server = Server(f"ipc://{tmp_path}/s", RUN, EPOCH, 1, DIGEST, 10.0, tmp_path)
        async with server:
            worker = await welcomed(server, lambda: FakeWorker(context, server.address))
            unanswered = submit(server)
            await worker.receive()
        assert str(unanswered.exception()) == "the run is over"
        async with asyncio.timeout(5):
            assert await worker.receive() == Shutdown(is_done=True, reason="the run is over")
        context.destroy(linger=0)

    asyncio.run(main())


@pytest.mark.parametrize("in_groups", [0, 2])
def test_after_a_failure_workers_are_told_why(in_groups: int, tmp_path: Path):
    async def main() -> None:
        context = zmq.asyncio.Context()
        server = Server(f"ipc://{tmp_path}/s", RUN, EPOCH, 1, DIGEST, 10.0, tmp_path)
        workers: list[FakeWorker] = []

        async def fail() -> None:
            async with server:
                workers.append(await welcomed(server, lambda: FakeWorker(context, server.address)))
                error: Exception = RuntimeError("the disk is full")
                for _ in range(in_groups):
                    error = ExceptionGroup("unhandled errors in a TaskGroup", [error])
                raise error

        with pytest.raises((RuntimeError, ExceptionGroup), match=r"the disk is full|TaskGroup"):
            await fail()
        async with asyncio.timeout(5):
            assert await workers[0].receive() == Shutdown(is_done=False, reason="the run ended: the disk is full")
        context.destroy(linger=0)

    asyncio.run(main())


def test_a_port_in_use_is_a_config_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ConfigError, match=r"--bind = 'tcp://127.*': cannot bind: Address already in use.* Choose a"
        ):
            Server(address, RUN, EPOCH, 1, DIGEST, 10.0, Path())


def test_an_address_of_another_machine_is_a_config_error():
    with pytest.raises(ConfigError, match=r"--bind = 'tcp://192\.0\.2\.1:5555': cannot bind"):
        Server("tcp://192.0.2.1:5555", RUN, EPOCH, 1, DIGEST, 10.0, Path())


def test_the_address_is_told_as_it_was_given():
    """People copy it into `--master`; as `[::ffff:127.0.0.1]` it would not even be known to be local."""
    address = free_address()
    assert address_of(Server(address, RUN, EPOCH, 1, DIGEST, 10.0, Path())) == address


def test_an_ipv6_address_can_be_bound():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    address = f"tcp://[::1]:{port}"
    assert address_of(Server(address, RUN, EPOCH, 1, DIGEST, 10.0, Path())) == address


def address_of(server: Server) -> str:
    async def main() -> str:
        async with server:
            return server.address

    return asyncio.run(main())
