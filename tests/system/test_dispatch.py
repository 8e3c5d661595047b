import asyncio
from types import SimpleNamespace

import pytest
from trainmaster.api.errors import RemoteError, WorkerLost
from trainmaster.system import dispatch
from trainmaster.system.dispatch import settle
from trainmaster.system.rpc.commands import Done
from trainmaster.system.rpc.messages import Success
from trainmaster.system.rpc.peer import Answer, Asked

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


class Workers:
    """Who was asked, and who was told that nobody waits any more."""

    def __init__(self, count: int) -> None:
        self.withdrawn: list[int] = []
        peers = {rank: SimpleNamespace(rank=rank, pending={}, lost=None) for rank in range(count)}
        loop = asyncio.get_running_loop()
        self.asked = Asked(loop, 7, "call train", 1, loop.time(), 60.0, self._withdraw)
        self.asked.wait_for(peers, 1.0)

    def _withdraw(self, peer: SimpleNamespace, identity: int) -> None:
        assert identity == 7
        self.withdrawn.append(peer.rank)


def test_answers_come_in_the_order_of_the_requests():
    async def scenario() -> None:
        first, second = Answer(Success(result=Done()), {"a": 1.0}), ANSWER
        one, other = Workers(2).asked, Workers(1).asked
        asyncio.get_running_loop().call_soon(other.answer, 0, first)
        asyncio.get_running_loop().call_soon(one.answer, 1, second)
        asyncio.get_running_loop().call_soon(one.answer, 0, first)
        answers = await settle(FakeServer(), one, other)
        assert answers == [{0: first, 1: second}, {0: first}]
        assert list(answers[0]) == [0, 1]

    asyncio.run(scenario())


def test_a_lost_peer_followed_by_a_lost_worker_reports_the_worker():
    async def scenario() -> None:
        server, asked = FakeServer(), Workers(2).asked

        def lose() -> None:
            asked.fail(1, LOSS)
            server.lost.set_exception(LOSS)

        server.on_probe = lose
        asked.fail(0, SYMPTOM)
        with pytest.raises(WorkerLost, match="worker 1 closed its connection"):
            await settle(server, asked)
        assert server.num_probes == 1

    asyncio.run(scenario())


def test_the_lost_worker_need_not_take_part_in_the_call():
    async def scenario() -> None:
        server, asked = FakeServer(), Workers(1).asked
        server.on_probe = lambda: server.lost.set_exception(LOSS)
        asked.fail(0, SYMPTOM)
        with pytest.raises(WorkerLost, match="worker 1 closed"):
            await settle(server, asked)

    asyncio.run(scenario())


def test_a_lost_peer_followed_by_another_error_reports_that_error():
    async def scenario() -> None:
        server, asked = FakeServer(), Workers(3).asked
        server.on_probe = lambda: asked.fail(2, CAUSE)
        asked.fail(0, SYMPTOM)
        with pytest.raises(RemoteError, match="worker 1 failed with OutOfMemoryError"):
            await settle(server, asked)

    asyncio.run(scenario())


def test_a_cause_that_comes_first_is_raised_at_once():
    async def scenario() -> None:
        server, asked = FakeServer(), Workers(2).asked
        asked.fail(0, CAUSE)
        with pytest.raises(RemoteError, match="OutOfMemoryError"):
            await settle(server, asked)
        assert server.num_probes == 0

    asyncio.run(scenario())


def test_a_lost_peer_alone_is_raised_after_a_moment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_CAUSE_GRACE_S", 0.01)

    async def scenario() -> None:
        asked = Workers(2).asked
        asked.fail(0, SYMPTOM)
        with pytest.raises(RemoteError, match="PeerLost: connection closed by peer"):
            await settle(FakeServer(), asked)

    asyncio.run(scenario())


def test_all_peers_lost_is_raised_after_a_moment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_CAUSE_GRACE_S", 0.01)

    async def scenario() -> None:
        asked = Workers(2).asked
        for rank in range(2):
            asked.fail(rank, SYMPTOM)
        with pytest.raises(RemoteError, match="PeerLost"):
            await settle(FakeServer(), asked)

    asyncio.run(scenario())


def test_requests_that_are_left_are_given_up():
    async def scenario() -> None:
        workers = Workers(3)
        workers.asked.answer(2, ANSWER)
        workers.asked.fail(0, CAUSE)
        with pytest.raises(RemoteError, match="OutOfMemoryError"):
            await settle(FakeServer(), workers.asked)
        assert workers.withdrawn == [1]

    asyncio.run(scenario())


def test_a_failure_of_one_gives_up_what_others_were_asked_besides():
    async def scenario() -> None:
        workers, others = Workers(1), Workers(2)
        workers.asked.fail(0, CAUSE)
        with pytest.raises(RemoteError, match="OutOfMemoryError"):
            await settle(FakeServer(), others.asked, workers.asked)
        assert others.withdrawn == [0, 1]

    asyncio.run(scenario())


def test_a_cancelled_wait_gives_its_requests_up():
    async def scenario() -> None:
        workers = Workers(1)
        waiting = asyncio.create_task(settle(FakeServer(), workers.asked))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert workers.asked.cancelled()
        assert workers.withdrawn == [0]

    asyncio.run(scenario())
