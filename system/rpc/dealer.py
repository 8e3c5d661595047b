"""The other end of a master's port: sockets towards it, and what it means when one is not let in."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

import zmq

from ..service.keys import ClientKeys
from . import framing

HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
"""Events of a monitor."""
_FOLLOWED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILED
_RECONNECT_MS, _CONNECT_TIMEOUT_MS, _LINGER_MS = 50, 1000, 1000
_PING_SHARE, _PONG_SHARE = 0.2, 0.4
"""Of `silence_s`: between two of ZeroMQ's pings, and for an answer. Together no more than what the master waits for an
answer: a worker knows of a partition before it is given up."""
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)
"""Plain numbers: enumerations cost more than the calls that take them."""


def dealer_to(
    master: str, context: zmq.Context[zmq.Socket[bytes]], keys: ClientKeys | None, linger_ms: int
) -> zmq.Socket[bytes]:
    """Not yet connected. With keys, it encrypts, and speaks to nobody but the master that they name."""
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, linger_ms)
    dealer.setsockopt(zmq.IPV6, "[" in master)
    dealer.setsockopt(zmq.MAXMSGSIZE, framing.MAX_FRAME_BYTES)
    if keys is not None:
        keys.secure(dealer)
    return dealer


def keep_alive(socket: zmq.Socket[bytes], silence_s: float) -> None:
    """Has ZeroMQ's own thread ping the master, and close a connection on which nothing comes."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * silence_s * _PING_SHARE))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * silence_s * _PONG_SHARE))


def suspicion(keys: ClientKeys | None) -> str:
    """What handshakes that fail without a reason likely come from."""
    if keys is None:
        return "it likely asks for keys, and none were given"
    return f"{keys.file} is likely of another run, or this master has no keys"


def next_event(monitor: zmq.Socket[bytes]) -> int:
    """Of those that a monitor tells. (`zmq.utils.monitor` does the same, and imports asyncio.)"""
    described, _ = monitor.recv_multipart()
    return int.from_bytes(described[:2], sys.byteorder)


class Dealer:
    """A worker's connection. One thread at a time may use it, but one may `wait` and any may `wake` that all the while.

    It waits for the sockets' descriptors, which is half of what ZeroMQ's own poll costs. A descriptor tells of each
    arrival once, and whatever uses the socket may swallow that: who does must look whether it `is_readable`.
    """

    def __init__(self, master: str, silence_s: float, keys: ClientKeys | None) -> None:
        self._master, self._keys = master, keys
        self._context = zmq.Context()
        self._poll = select.poll()
        self._woken, self._waker = os.pipe()
        for end in (self._woken, self._waker):
            os.set_blocking(end, False)
        self._poll.register(self._woken, select.POLLIN)
        self._connect(silence_s)

    def reconnect(self, silence_s: float) -> None:
        """With a new socket. What the old one had not sent yet is lost."""
        for socket in (self._socket, self._monitor):
            self._poll.unregister(socket.fileno())
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._connect(silence_s)

    def _connect(self, silence_s: float) -> None:
        """The router gives each connection a name, and `Register` says whose it is."""
        self._socket = dealer_to(self._master, self._context, self._keys, _LINGER_MS)
        self._socket.setsockopt(zmq.RCVHWM, framing.QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS)
        keep_alive(self._socket, silence_s)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(_FOLLOWED)
        self._socket.connect(self._master)
        self._is_new = True
        """Its first events may not show: a descriptor tells of arrivals only once all before them were looked for."""
        self._monitored = self._monitor.fileno()
        for descriptor in (self._socket.fileno(), self._monitored):
            self._poll.register(descriptor, select.POLLIN)

    def wake(self) -> None:
        """Has `wait` return. Safe from any thread."""
        with contextlib.suppress(BlockingIOError):  # full of wake-ups
            os.write(self._waker, b"\0")

    def wait(self, timeout_s: float) -> tuple[bool, bool]:
        """Until something has arrived, or somebody wakes it. Returns whether there may be a message, and `events`."""
        has_message, has_events, self._is_new = False, self._is_new, False
        for descriptor, _ in self._poll.poll(0 if has_events else 1000 * timeout_s):
            if descriptor == self._woken:
                os.read(descriptor, select.PIPE_BUF)
            elif descriptor == self._monitored:
                has_events = True
            else:
                has_message = True
        return has_message, has_events

    @property
    def is_readable(self) -> bool:
        """Whether there is a message."""
        return _is_readable(self._socket)

    def receive(self) -> list[framing.Frame] | None:
        """The frames of the next message, if there is one."""
        try:
            return framing.receive(self._socket)
        except zmq.Again:
            return None

    def send(self, frames: list[framing.Frame]) -> None:
        """If there is no connection yet, or its queue is full, it is lost."""
        with contextlib.suppress(zmq.Again):
            framing.send(self._socket, frames)

    def events(self) -> Iterator[int]:
        """Handshakes that succeeded or failed, and connections that were closed."""
        while _is_readable(self._monitor):
            yield next_event(self._monitor)


def _is_readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(_EVENTS)) & _READABLE)
