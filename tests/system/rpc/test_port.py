"""The master's socket by itself; with a server around it, it is in `test_server`."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import pytest
import zmq
from trainmaster.system.rpc import port as module
from trainmaster.system.rpc.port import Port

PAUSE_S = 0.2
CROWD = 6
Arrivals = asyncio.Queue[tuple[bytes, float]]
"""What arrived, and when."""


def with_port(num_connections: int, scenario: Callable[[zmq.Socket[bytes], Arrivals], Awaitable[None]]) -> None:
    """A port, someone who is connected to it, and what arrived since."""

    async def run() -> None:
        arrivals, faults = Arrivals(), []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        port = Port("tcp://127.0.0.1:*", silence_s=5.0, num_connections=num_connections)
        port.open(lambda _, frames, __: arrivals.put_nowait((bytes(frames[0]), time.monotonic())), lambda _: None)
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.connect(port.address)
        dealer.send(b"hello")
        async with asyncio.timeout(5):
            await arrivals.get()
            await scenario(dealer, arrivals)
        dealer.close(linger=0)
        await port.close(linger_s=0.1)
        num_arrived = arrivals.qsize()
        await asyncio.sleep(2 * PAUSE_S)  # nothing comes of it any more
        assert (faults, arrivals.qsize()) == ([], num_arrived)

    asyncio.run(run())


async def send_three(dealer: zmq.Socket[bytes], arrivals: Arrivals) -> list[float]:
    """At intervals, once nothing is gathered any more. Returns how long after the first was sent each arrived."""
    await asyncio.sleep(2 * PAUSE_S)
    start_s = time.monotonic()
    for body in (b"1", b"2", b"3"):
        dealer.send(body)
        await asyncio.sleep(PAUSE_S / 10)
    arrived = [await arrivals.get() for _ in range(3)]
    assert [body for body, _ in arrived] == [b"1", b"2", b"3"]
    return [arrived_s - start_s for _, arrived_s in arrived]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is gathered")


@pytest.fixture(autouse=True)
def crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CROWD", CROWD)
    monkeypatch.setattr(module, "_PAUSE_S", PAUSE_S)


def test_messages_of_a_crowd_are_gathered():
    async def scenario(dealer: zmq.Socket[bytes], arrivals: Arrivals) -> None:
        times = await send_three(dealer, arrivals)
        assert times[0] > 0.9 * PAUSE_S, "the first waited for the others"
        assert times[-1] - times[0] < PAUSE_S / 10, "and none for itself"

    with_port(CROWD, scenario)


def test_messages_of_a_few_are_passed_on_as_they_come():
    async def scenario(dealer: zmq.Socket[bytes], arrivals: Arrivals) -> None:
        times = await send_three(dealer, arrivals)
        assert times[0] < 0.9 * PAUSE_S

    with_port(CROWD - 1, scenario)


def test_it_may_be_closed_while_it_gathers():
    async def scenario(dealer: zmq.Socket[bytes], arrivals: Arrivals) -> None:
        await asyncio.sleep(2 * PAUSE_S)
        dealer.send(b"late")
        await asyncio.sleep(PAUSE_S / 2)
        assert arrivals.empty(), "it is gathered still"

    with_port(CROWD, scenario)
