"""Frames, as they come and go: an envelope, and behind it what nobody has read yet.

    frame 0     the envelope, 42 bytes, the same in every version: mark, protocol version, epoch, order, received, time;
                after it the message, encoded
    frame 1...  one for each large array in it: raw bytes, never copied

Sizes and counts are bounded before anything is kept. What it does not do: read messages. See `codec`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import zmq

from ...api.errors import ProtocolError

PROTOCOL_VERSION = 5
MAX_BODY_BYTES = 64 * 2**20
"""Of a message without its arrays, and of each of them."""
MAX_ARRAYS = 64
_ENVELOPE = struct.Struct(">8sHQQQd")
MAX_FRAME_BYTES = _ENVELOPE.size + MAX_BODY_BYTES
_MARK = b"TRAINMST"
_COPIED_BYTES = 2**16
"""Below, a copy is cheaper than ZeroMQ's bookkeeping of who owns what."""
_NOBLOCK, _SEND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""Plain numbers: enumerations cost more than the calls that take them."""
QUEUED_MESSAGES = 10_000
"""In either direction of a connection. A heartbeat a second takes hours to fill it: libzmq 4.3.5 aborts the process if
a connection with heartbeats breaks while its queue is full (github.com/zeromq/libzmq/issues/4364)."""
Frame = bytes | bytearray | memoryview
Body = list[Frame]
"""A message, encoded, and its arrays."""


class Envelope(NamedTuple):
    """What a link needs to know of a message before it is read."""

    epoch: int
    order: int = 0
    """The message's number in its link; 0 for one outside of it."""
    received: int = 0
    """How far the sender has received the other direction."""
    sent_s: float = 0.0
    """On the sender's monotonic clock."""
    version: int = PROTOCOL_VERSION

    def around(self, body: Body) -> list[Frame]:
        """All frames."""
        head = _ENVELOPE.pack(_MARK, self.version, self.epoch, self.order, self.received, self.sent_s)
        return [b"".join((head, body[0])), *body[1:]]


def opened(frames: Sequence[Frame]) -> tuple[Envelope, Body]:
    """Raises `ProtocolError` for anything but the envelope of a Trainmaster, of whatever version."""
    if not 1 <= len(frames) <= 1 + MAX_ARRAYS:
        raise ProtocolError(f"{len(frames)} frames where a message has 1, and {MAX_ARRAYS} arrays at most")
    first = frames[0]
    if len(first) < _ENVELOPE.size:
        raise ProtocolError(
            f"a frame of {len(first)} bytes, less than an envelope's {_ENVELOPE.size}: another program's"
        )
    mark, version, epoch, order, received, sent_s = _ENVELOPE.unpack_from(first)
    if mark != _MARK:
        raise ProtocolError(f"an envelope that begins with {mark!r}, not {_MARK!r}: another program's")
    rest = first[_ENVELOPE.size :] if len(first) < _COPIED_BYTES else memoryview(first)[_ENVELOPE.size :]
    return Envelope(epoch, order, received, sent_s, version), [rest, *frames[1:]]


def receive(socket: zmq.Socket[bytes]) -> list[Frame]:
    """The frames of the next message, or what is left of them. Arrays are not copied.

    Raises `zmq.Again` if there is none. Of a message with too many frames, one more is returned than there can be.
    """
    frames: list[Frame] = []
    while True:
        frame = socket.recv(_NOBLOCK, copy=False)
        if len(frames) <= 1 + MAX_ARRAYS:
            frames.append(frame.bytes if len(frame) < _COPIED_BYTES else frame.buffer)
        if not frame.more:  # cheaper than to ask the socket
            return frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> None:
    """Raises `zmq.Again` if the socket's queue is full. What is large is not copied: leave its arrays as they are."""
    for frame in frames[:-1]:
        socket.send(frame, _SEND_MORE, copy=len(frame) < _COPIED_BYTES)
    socket.send(frames[-1], _NOBLOCK, copy=len(frames[-1]) < _COPIED_BYTES)
