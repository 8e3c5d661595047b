"""Messages to ZeroMQ frames and back.

    frame 0     the envelope, 42 bytes, the same in every version: mark, protocol version, epoch, order, received, time;
                after it the message: msgpack
    frame 1...  one for each large array in it: raw bytes, never copied; type and shape stand in the message

A frame from outside is not trusted: every length, depth and count is bounded before anything is built from it, and the
message must validate against the closed union of messages.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple  # Any: what msgpack reads: nested containers of anything

import msgpack  # type: ignore[import-untyped]
import numpy as np
import zmq
from pydantic import ValidationError

from ...api.errors import ProtocolError
from .messages import MESSAGES, PROTOCOL_VERSION, Message

MAX_BODY_BYTES = 64 * 2**20
"""Of a message without its arrays, and of each of them."""
MAX_ITEMS = 2**20
"""The most items of one array or map."""
MAX_ARRAYS = 64
MAX_DIMENSIONS = 8
DTYPES = tuple(
    np.dtype(name)
    for name in [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    ]
)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_ENVELOPE = struct.Struct(">8sHQQQd")
MAX_FRAME_BYTES = _ENVELOPE.size + MAX_BODY_BYTES
_MARK = b"TRAINMST"
_BUFFER_BYTES = 4096
"""msgpack's at first; by default it takes a quarter of a megabyte for each message."""
_COPIED_BYTES = 2**16
"""Below, a copy is cheaper than ZeroMQ's bookkeeping of who owns what."""
_NOBLOCK, _SEND_MORE, _RECEIVE_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.RCVMORE)
"""Plain numbers: enumerations cost more than the calls that take them."""
QUEUED_MESSAGES = 10_000
"""In either direction of a connection. A heartbeat a second takes hours to fill it: libzmq 4.3.5 aborts the process if
a connection with heartbeats breaks while its queue is full (github.com/zeromq/libzmq/issues/4364)."""
_SAID_CHARACTERS = 500
"""Of what is wrong with a message: the rest is likely the sender's."""
_ARRAY, _SMALL_ARRAY = 1, 2
"""msgpack's extension types of arrays. The content of one: its frame and its dtype's code, a byte each, then its shape.
Of a small one: the number of its dimensions in place of the frame, and behind the shape its bytes."""
_SMALL_BYTES = 4096
_MAX_EXTENSION_BYTES = 2 + 8 * MAX_DIMENSIONS + _SMALL_BYTES
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


class _Encoder(threading.local):
    """A packer for each thread, which is not made anew for each message."""

    def __init__(self) -> None:
        self._pack = msgpack.Packer(default=self._plain, unicode_errors="backslashreplace", buf_size=_BUFFER_BYTES).pack
        self._arrays: list[Frame] = []

    def encode(self, message: Message) -> Body:
        try:
            return [self._pack(message), *self._arrays]
        finally:
            self._arrays.clear()

    def _plain(self, value: Any) -> dict[str, Any] | msgpack.ExtType:  # Any: a record, its fields, or an array
        if not isinstance(value, np.ndarray):
            return {name: getattr(value, name) for name in value.__dataclass_fields__}
        at, is_small = len(self._arrays), value.nbytes <= _SMALL_BYTES
        if (at == MAX_ARRAYS and not is_small) or value.dtype not in _DTYPE_CODES or value.ndim > MAX_DIMENSIONS:
            raise ProtocolError(
                f"array {at} of a message is {value.dtype} of {value.ndim} dimensions: a message holds at most "
                f"{MAX_ARRAYS}, of at most {MAX_DIMENSIONS}, and of no other types than numbers"
            )
        first = value.ndim if is_small else at
        head = struct.pack(f">BB{value.ndim}Q", first, _DTYPE_CODES[value.dtype], *value.shape)
        if is_small:
            return msgpack.ExtType(_SMALL_ARRAY, head + value.tobytes())
        self._arrays.append(np.ascontiguousarray(value).data.cast("B"))
        return msgpack.ExtType(_ARRAY, head)


_ENCODER = _Encoder()


def encode_body(message: Message) -> Body:
    """Raises `ProtocolError` if the message is larger than a receiver accepts."""
    body = _ENCODER.encode(message)
    for frame in body:
        if len(frame) > MAX_BODY_BYTES:
            raise ProtocolError(f"a {message.type} message of {len(frame)} bytes is over the limit of {MAX_BODY_BYTES}")
    return body


def decode_body(body: Sequence[Frame]) -> Message:
    """Raises `ProtocolError` for anything but a valid message of this version. Arrays are views of their frames."""
    packed, arrays = body[0], body[1:]
    for frame in body:
        if len(frame) > MAX_BODY_BYTES:
            raise ProtocolError(f"a frame of {len(frame)} bytes is over the limit of {MAX_BODY_BYTES}")
    num_read = 0

    def read(code: int, content: bytes) -> np.ndarray[Any, Any]:
        nonlocal num_read
        if code == _SMALL_ARRAY:
            return _read_small_array(content)
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
            max_ext_len=_MAX_EXTENSION_BYTES,
            max_bin_len=0,
            ext_hook=read,
        )
        if num_read != len(arrays):
            raise ValueError(f"{len(arrays)} arrays came, {num_read} are in the message")
        message: Message = MESSAGES.validator.validate_python(content)
        return message
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[:3]
        raise ProtocolError(f"not a message of ours: {found}"[:_SAID_CHARACTERS]) from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not msgpack that we accept: {error}"[:_SAID_CHARACTERS]) from None


def _read_array(content: bytes, frames: Sequence[Frame], expected: int) -> np.ndarray[Any, Any]:
    num_dimensions, rest = divmod(len(content) - 2, 8)
    if rest or not 0 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"an array whose head has {len(content)} bytes")
    at, code, *shape = struct.unpack(f">BB{num_dimensions}Q", content)
    if at != expected or at >= len(frames):
        raise ValueError(f"an array in frame {at} of {len(frames)}, where {expected} is next")
    if code >= len(DTYPES):
        raise ValueError(f"an array of type {code}")
    dtype = DTYPES[code]
    if math.prod(shape) * dtype.itemsize != len(frames[at]):
        raise ValueError(f"an array of {shape} {dtype} in {len(frames[at])} bytes")
    return np.ndarray(shape, dtype, frames[at])


def _read_small_array(content: bytes) -> np.ndarray[Any, Any]:
    num_dimensions = content[0] if content else 0
    head = struct.Struct(f">BB{num_dimensions}Q")
    if num_dimensions > MAX_DIMENSIONS or len(content) < head.size:
        raise ValueError(f"a small array whose head says that it has {num_dimensions} dimensions")
    _, code, *shape = head.unpack_from(content)
    if code >= len(DTYPES):
        raise ValueError(f"an array of type {code}")
    dtype = DTYPES[code]
    if math.prod(shape) * dtype.itemsize != len(content) - head.size:
        raise ValueError(f"an array of {shape} {dtype} in {len(content) - head.size} bytes")
    return np.ndarray(shape, dtype, content, head.size)


def receive(socket: zmq.Socket[bytes]) -> list[Frame]:
    """The frames of the next message, or what is left of them. Arrays are not copied.

    Raises `zmq.Again` if there is none. Of a message with too many frames, one more is returned than there can be.
    """
    frames: list[Frame] = [socket.recv(_NOBLOCK)]
    while socket.getsockopt(_RECEIVE_MORE):
        frame = socket.recv(_NOBLOCK, copy=False)
        if len(frames) <= 1 + MAX_ARRAYS:
            frames.append(frame.bytes if len(frame) < _COPIED_BYTES else frame.buffer)
    return frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> None:
    """Raises `zmq.Again` if the socket's queue is full. What is large is not copied: leave its arrays as they are."""
    for frame in frames[:-1]:
        socket.send(frame, _SEND_MORE, copy=len(frame) < _COPIED_BYTES)
    socket.send(frames[-1], _NOBLOCK, copy=len(frames[-1]) < _COPIED_BYTES)


def encode(message: Message, envelope: Envelope) -> list[Frame]:
    """All frames."""
    return envelope.around(encode_body(message))


def decode(frames: Sequence[Frame]) -> tuple[Envelope, Message]:
    """All at once. Raises `ProtocolError`."""
    envelope, body = opened(frames)
    if envelope.version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {envelope.version}, not {PROTOCOL_VERSION}")
    return envelope, decode_body(body)
