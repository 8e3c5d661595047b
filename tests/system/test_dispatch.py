import asyncio

import pytest
from trainmaster.api.errors import RemoteError, WorkerLost
from trainmaster.system import dispatch
from trainmaster.system.dispatch import settle
from trainmaster.system.rpc.commands import Done
from trainmaster.system.rpc.messages import Success
from trainmaster.system.rpc.peer import Answer

ANSWER = Answer(Success(result=Done()), {})
SYMPTOM = RemoteError("call train on worker 0", "PeerLost", "connection closed by peer", "Traceback ...")
CAUSE = RemoteError("call train on worker 1", "OutOfMemoryError", "no memory", "Traceback ...")
LOSS = WorkerLost("worker 1 closed its connection")


class FakeServer:
    """What `settle` uses of a server: news of a loss, and a way to ask for them."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_probes = 0
        self.on_probe = lambda: None

    def probe(self) -> None:
        self.num_probes += 1
        asyncio.get_running_loop().call_soon(self.on_probe)


def futures(count: int) -> list[asyncio.Future[Answer]]:
    return [asyncio.get_running_loop().create_future() for _ in range(count)]


def test_answers_come_in_the_order_of_the_requests():
    async def scenario() -> None:
        first, second = Answer(Success(result=Done()), {"a": 1.0}), ANSWER
        asked = futures(2)
        asyncio.get_running_loop().call_soon(asked[1].set_result, second)
        asyncio.get_running_loop().call_soon(asked[0].set_result, first)
        assert await settle(FakeServer(), asked) == [first, second]

    asyncio.run(scenario())


def test_a_lost_peer_followed_by_a_lost_worker_reports_the_worker():
    async def scenario() -> None:
        server, asked = FakeServer(), futures(2)

        def lose() -> None:
            asked[1].set_exception(LOSS)
            server.lost.set_exception(LOSS)

        server.on_probe = lose
        asked[0].set_exception(SYMPTOM)
        with pytest.raises(WorkerLost, match="worker 1 closed its connection"):
            await settle(server, asked)
        assert server.num_probes == 1

    asyncio.run(scenario())


def test_the_lost_worker_need_not_take_part_in_the_call():
    async def scenario() -> None:
        server, asked = FakeServer(), futures(1)
        server.on_probe = lambda: server.lost.set_exception(LOSS)
        asked[0].set_exception(SYMPTOM)
        with pytest.raises(WorkerLost, match="worker 1 closed"):
            await settle(server, asked)

    asyncio.run(scenario())


def test_a_lost_peer_followed_by_another_error_reports_that_error():
    async def scenario() -> None:
        server, asked = FakeServer(), futures(3)
        server.on_probe = lambda: asked[2].set_exception(CAUSE)
        asked[0].set_exception(SYMPTOM)
        with pytest.raises(RemoteError, match="worker 1 failed with OutOfMemoryError"):
            await settle(server, asked)

    asyncio.run(scenario())


def test_a_cause_that_comes_first_is_raised_at_once():
    async def scenario() -> None:
        server, asked = FakeServer(), futures(2)
        asked[0].set_exception(CAUSE)
        with pytest.raises(RemoteError, match="OutOfMemoryError"):
            await settle(server, asked)
        assert server.num_probes == 0

    asyncio.run(scenario())


def test_a_lost_peer_alone_is_raised_after_a_moment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_CAUSE_GRACE_S", 0.01)

    async def scenario() -> None:
        asked = futures(2)
        asked[0].set_exception(SYMPTOM)
        with pytest.raises(RemoteError, match="PeerLost: connection closed by peer"):
            await settle(FakeServer(), asked)

    asyncio.run(scenario())


def test_all_peers_lost_is_raised_after_a_moment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_CAUSE_GRACE_S", 0.01)

    async def scenario() -> None:
        asked = futures(2)
        for future in asked:
            future.set_exception(SYMPTOM)
        with pytest.raises(RemoteError, match="PeerLost"):
            await settle(FakeServer(), asked)

    asyncio.run(scenario())


def test_requests_that_are_left_are_given_up():
    async def scenario() -> None:
        asked = futures(2)
        asked[0].set_exception(CAUSE)
        with pytest.raises(RemoteError, match="OutOfMemoryError"):
            await settle(FakeServer(), asked)
        assert asked[1].cancelled()

    asyncio.run(scenario())


def test_a_cancelled_wait_gives_its_requests_up():
    async def scenario() -> None:
        asked = futures(1)
        waiting = asyncio.create_task(settle(FakeServer(), asked))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert asked[0].cancelled()

    asyncio.run(scenario())
