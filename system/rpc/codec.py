"""Messages to ZeroMQ frames and back.

    frame 0     the envelope, 34 bytes, the same in every version: mark, protocol version, epoch, order, received
    frame 1     the message: msgpack
    frame 2...  one for each array in it: raw bytes, never copied; type and shape stand in the message

A frame from outside is not trusted: every length, depth and count is bounded before anything is built from it, and the
message must validate against the closed union of messages.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any  # what msgpack reads: nested containers of anything

import msgpack  # type: ignore[import-untyped]
import numpy as np
import zmq
from pydantic import ValidationError

from ...api.errors import ProtocolError
from .messages import MESSAGES, PROTOCOL_VERSION, Message

MAX_BODY_BYTES = 64 * 2**20
"""Of any one frame."""
MAX_ITEMS = 2**20
"""The most items of one array or map."""
MAX_ARRAYS = 64
MAX_DIMENSIONS = 8
DTYPES = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
)
_ENVELOPE = struct.Struct(">8sHQQQ")
_MARK = b"TRAINMST"
_ARRAY = 1
"""msgpack's extension type of an array: its frame, dtype and shape."""
Frame = bytes | bytearray | memoryview
Body = list[Frame]
"""All frames of a message after the envelope."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a link needs to know of a message before it is read."""

    epoch: int
    order: int = 0
    """The message's number in its link; 0 for one outside of it."""
    received: int = 0
    """How far the sender has received the other direction."""
    version: int = PROTOCOL_VERSION

    def encode(self) -> bytes:
        return _ENVELOPE.pack(_MARK, self.version, self.epoch, self.order, self.received)

    @classmethod
    def decode(cls, frames: Sequence[Frame]) -> Envelope:
        """Raises `ProtocolError` for anything but the envelope of a Trainmaster, of whatever version."""
        if not 2 <= len(frames) <= 2 + MAX_ARRAYS:
            raise ProtocolError(f"{len(frames)} frames where a message has 2, and {MAX_ARRAYS} arrays at most")
        if len(frames[0]) != _ENVELOPE.size:
            raise ProtocolError(f"an envelope of {len(frames[0])} bytes, not {_ENVELOPE.size}: another program's")
        mark, version, epoch, order, received = _ENVELOPE.unpack(frames[0])
        if mark != _MARK:
            raise ProtocolError(f"an envelope that begins with {mark!r}, not {_MARK!r}: another program's")
        return cls(epoch=epoch, order=order, received=received, version=version)


def encode_body(message: Message) -> Body:
    """Raises `ProtocolError` if the message is larger than a receiver accepts."""
    arrays: list[Frame] = []

    def default(value: object) -> msgpack.ExtType:
        assert isinstance(value, np.ndarray), f"messages hold plain values and arrays, not {type(value)}"
        arrays.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        return msgpack.ExtType(_ARRAY, msgpack.packb([len(arrays) - 1, value.dtype.name, value.shape]))

    packed: bytes = msgpack.packb(MESSAGES.dump_python(message), default=default, unicode_errors="backslashreplace")
    body: Body = [packed, *arrays]
    largest = max(map(len, body))
    if largest > MAX_BODY_BYTES or len(arrays) > MAX_ARRAYS:
        raise ProtocolError(
            f"a {message.type} message of {largest} bytes and {len(arrays)} arrays is over the limits of "
            f"{MAX_BODY_BYTES} and {MAX_ARRAYS}"
        )
    return body


def decode_body(body: Sequence[Frame]) -> Message:
    """Raises `ProtocolError` for anything but a valid message of this version. Arrays are views of their frames."""
    packed, arrays = body[0], body[1:]
    if max(map(len, body)) > MAX_BODY_BYTES:
        raise ProtocolError(f"a frame of {max(map(len, body))} bytes is over the limit of {MAX_BODY_BYTES}")
    num_read = 0

    def read(code: int, content: bytes) -> np.ndarray[Any, Any]:
        nonlocal num_read
        if code != _ARRAY:
            raise ValueError(f"extension type {code}")
        value = _read_array(content, arrays, num_read)
        num_read += 1
        return value

    try:
        content = msgpack.unpackb(
            packed,
            use_list=False,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=256,
            max_bin_len=0,
            ext_hook=read,
        )
        if num_read != len(arrays):
            raise ValueError(f"{len(arrays)} arrays came, {num_read} are in the message")
        return MESSAGES.validate_python(content)
    except ValidationError as error:
        raise ProtocolError(
            f"not a message of ours: {error.errors(include_url=False, include_input=False)[:3]}"
        ) from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not msgpack that we accept: {error}") from None


def _read_array(content: bytes, frames: Sequence[Frame], expected: int) -> np.ndarray[Any, Any]:
    parts = msgpack.unpackb(content, use_list=False, max_array_len=MAX_DIMENSIONS, max_ext_len=0, max_bin_len=0)
    if not isinstance(parts, tuple) or len(parts) != 3:
        raise ValueError("an array that is not (frame, dtype, shape)")
    at, dtype, shape = parts
    if type(at) is not int or at != expected or at >= len(frames):
        raise ValueError(f"an array in frame {at!r} of {len(frames)}, where {expected} is next")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"an array of {dtype!r}")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {shape!r}")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(frames[at]):
        raise ValueError(f"an array of {shape} {dtype} in {len(frames[at])} bytes")
    return np.frombuffer(frames[at], dtype).reshape(shape)


def receive(socket: zmq.Socket[bytes], route: int = 0) -> Body:
    """The frames of the next message, after `route` frames that say where it came from. Arrays are not copied.

    Raises `zmq.Again` if there is none. Of a message with too many frames, one more is returned than there can be.
    """
    frames: Body = [socket.recv(zmq.NOBLOCK)]
    while socket.rcvmore:
        frame = socket.recv() if len(frames) < route + 2 else socket.recv(copy=False).buffer
        if len(frames) <= route + 2 + MAX_ARRAYS:
            frames.append(frame)
    return frames


def encode(message: Message, envelope: Envelope) -> Body:
    """All frames."""
    return [envelope.encode(), *encode_body(message)]


def decode(frames: Sequence[Frame]) -> tuple[Envelope, Message]:
    """All at once. Raises `ProtocolError`."""
    envelope = Envelope.decode(frames)
    if envelope.version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {envelope.version}, not {PROTOCOL_VERSION}")
    return envelope, decode_body(frames[1:])
