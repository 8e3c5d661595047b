"""The master's socket: a ROUTER that the event loop drives. Frames come in and go out; their meaning is not known here.

The router names each connection itself, so nobody can speak or listen under another's name. With keys, connections are
encrypted, only holders of allowed keys have one (see `zap`), and with each message it is told who sent it.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import sys
from collections import deque
from collections.abc import Callable

import zmq

from ...api.errors import ConfigError
from ..service.keys import Holder, MasterKeys
from . import framing
from .zap import Gate

_PING_SHARE, _PONG_SHARE = 0.2, 0.6
"""Of `silence_s`: between two of ZeroMQ's pings, and for an answer; what is left is for the server to notice."""
_CONNECTIONS_PER_THREAD = 512
_CLOSED_ADDRESS = "inproc://closed"
_CROWD, _PAUSE_S = 128, 0.003
"""So many connections have their messages gathered for that long: a turn of the event loop for each costs as much as
what is in it, and three thousandths of a second are little beside a step of so many workers. What has come when
something is said is passed on at once."""
_DRAINED_AT_ONCE = 1000
"""Messages, however many more may wait."""
_Received = tuple[bytes, list[framing.Frame], Holder | None]
"""The connection's name, the frames, and with keys who sent them."""
_EVENTS, _READABLE, _NOBLOCK = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK)


def io_threads(num_connections: int) -> int:
    """How many threads ZeroMQ should have for so many connections that it pings.

    A thread looks for each timer that ends among all of its own: their cost grows with the square of their number.
    """
    return -(-num_connections // _CONNECTIONS_PER_THREAD)


class Port:
    """Bound at construction; `open` on the loop that is to drive it."""

    def __init__(
        self, address: str, silence_s: float, keys: MasterKeys | None = None, num_connections: int = 1
    ) -> None:
        self.noticed_s = silence_s * _PONG_SHARE
        """How long a silence is when ZeroMQ closes a connection for it, at least."""
        self._context = zmq.Context(io_threads(num_connections))
        self._gate = None if keys is None else Gate(self._context, keys)
        self._closed: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        """Tells of connections that have closed, where there is no gate that does."""
        self._closed.setsockopt(zmq.RCVHWM, 0)  # a full queue would halt ZeroMQ's I/O thread
        self._router = self._bound(address, silence_s)
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._is_open, self._is_drain_due = True, False
        self._descriptor = int(self._router.fileno())
        self._received: deque[_Received] = deque()
        """And not passed on yet."""
        self._crowd = select.epoll() if num_connections >= _CROWD and sys.platform == "linux" else None
        """Stands between the socket's descriptor and the loop, whose own ways to look away take long."""

    def _bound(self, address: str, silence_s: float) -> zmq.Socket[bytes]:
        """Raises `ConfigError` if the address cannot be had."""
        router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.IPV6, "[" in address)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # to send to a closed connection is an error: how we learn of it
        router.setsockopt(zmq.MAXMSGSIZE, framing.MAX_FRAME_BYTES)
        router.setsockopt(zmq.SNDHWM, framing.QUEUED_MESSAGES)
        router.setsockopt(zmq.RCVHWM, framing.QUEUED_MESSAGES)
        # answered by ZeroMQ's own thread, whatever Python does at the other end
        router.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * silence_s * _PING_SHARE))
        router.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * silence_s * _PONG_SHARE))
        if self._gate is not None:
            self._gate.secure(router)
        else:
            router.monitor(_CLOSED_ADDRESS, zmq.EVENT_DISCONNECTED)
            self._closed.connect(_CLOSED_ADDRESS)
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(
                "--bind", address, f"cannot bind: {error}", "choose a free port of this machine"
            ) from None
        return router

    @property
    def num_refused(self) -> int:
        """Connections that nobody got in by."""
        return 0 if self._gate is None else self._gate.num_refused

    def open(
        self, take: Callable[[bytes, list[framing.Frame], Holder | None], None], refuse: Callable[[str], None]
    ) -> None:
        """Has every message passed on, with the name of its connection and, with keys, who sent it.

        `refuse` is told why a connection was refused.
        """
        self._loop, self._take, self._refuse = asyncio.get_running_loop(), take, refuse
        if self._crowd is not None:
            self._crowd.register(self._descriptor, select.EPOLLIN)
        self._loop.add_reader(self._descriptor if self._crowd is None else self._crowd.fileno(), self._awake)
        if self._gate is not None:
            self._gate.open()
            self._loop.add_reader(self._gate.events.fileno(), self._count_strangers, self._gate)
            self._loop.call_soon(self._count_strangers, self._gate)
        self._drain_soon()

    def had_closed(self) -> bool:
        """Whether a connection, of anyone, has closed since the last time."""
        if self._gate is not None:
            had_closed, self._gate.had_closed = self._gate.had_closed, False
            return had_closed
        had_closed = False
        while self._closed.poll(0):
            self._closed.recv_multipart()
            had_closed = True
        return had_closed

    async def close(self, linger_s: float) -> None:
        self._is_open = False
        self._loop.remove_reader(self._descriptor if self._crowd is None else self._crowd.fileno())
        if self._crowd is not None:
            self._crowd.close()
        self._router.disable_monitor()  # first: ZeroMQ waits for who listens to it
        self._closed.close(linger=0)
        if self._gate is not None:
            self._loop.remove_reader(self._gate.events.fileno())
            self._gate.events.close(linger=0)
        self._router.close(linger=round(1000 * linger_s))  # here, on the thread that uses it
        await asyncio.to_thread(self._context.term)

    def send(self, route: bytes, frames: list[framing.Frame]) -> bool:
        """Whether the connection is there still. What a full queue does not take is lost."""
        if not self._is_open:
            return False
        try:
            framing.send(self._router, [route, *frames])
        except zmq.Again:
            pass
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        finally:
            self._drain_soon()
        return True

    def drain(self) -> None:
        """Passes on what has arrived. All is received first: to do one thing often is faster than two by turns."""
        self._is_drain_due = False
        while self._is_open and int(self._router.getsockopt(_EVENTS)) & _READABLE:  # cheaper than to fail
            self._received.append(self._receive())
            if len(self._received) >= _DRAINED_AT_ONCE:
                self._drain_soon()  # others on the loop have their turn
                break
        try:
            while self._received and self._is_open:
                self._take(*self._received.popleft())
        finally:
            if self._received and self._is_open:  # one of them was a mistake of ours
                self._drain_soon()

    def _awake(self) -> None:
        """The descriptor says that there is something: a message, almost always. Who waits for it comes before more."""
        if self._crowd is not None:
            self._crowd.modify(self._descriptor, 0)
            self._loop.call_later(_PAUSE_S, self._resume, self._crowd)
            return
        with contextlib.suppress(zmq.Again):
            self._take(*self._receive())
        self._drain_soon()

    def _resume(self, crowd: select.epoll) -> None:
        if self._is_open:
            crowd.modify(self._descriptor, select.EPOLLIN)
            self.drain()

    def _receive(self) -> _Received:
        if self._gate is None:
            return self._router.recv(_NOBLOCK), framing.receive(self._router), None
        first = self._router.recv(_NOBLOCK, copy=False)
        return first.bytes, framing.receive(self._router), self._gate.sender(first)

    def is_allowed(self, holder: Holder) -> bool:
        """Whether a key is still its holder's."""
        return self._gate is not None and self._gate.holder(holder.key) == holder

    def _count_strangers(self, gate: Gate) -> None:
        if not gate.events.closed and gate.events.poll(0):
            for reason in gate.refusals():
                self._refuse(reason)
            self._loop.call_soon(self._count_strangers, gate)  # there may be more

    def _drain_soon(self) -> None:
        """The socket's descriptor is edge-triggered: a send can swallow its event."""
        if not self._is_drain_due:
            self._is_drain_due = True
            self._loop.call_soon(self.drain)
