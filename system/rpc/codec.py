"""Messages to ZeroMQ frames and back: msgpack in frame 0, behind the envelope (see `framing`), and arrays.

Each large array travels in a frame of its own: raw bytes, never copied; type and shape stand in the message.

A frame from outside is not trusted: every length, depth and count is bounded before anything is built from it, and the
message must validate against the closed union of messages.
"""

from __future__ import annotations

import functools
import math
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any  # Any: what msgpack reads: nested containers of anything

import msgpack  # type: ignore[import-untyped]
import numpy as np
from pydantic import ValidationError

from ...api.errors import ProtocolError
from .framing import MAX_ARRAYS, MAX_BODY_BYTES, PROTOCOL_VERSION, Body, Envelope, Frame, opened
from .messages import MESSAGES, Message

MAX_ITEMS = 2**20
"""The most items of one array or map."""
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
_BUFFER_BYTES = 4096
"""msgpack's at first; by default it takes a quarter of a megabyte for each message."""
_SAID_CHARACTERS = 500
"""Of what is wrong with a message: the rest is likely the sender's."""
_ARRAY, _SMALL_ARRAY = 1, 2
"""msgpack's extension types of arrays. The content of one: its frame and its dtype's code, a byte each, then its shape.
Of a small one: the number of its dimensions in place of the frame, and behind the shape its bytes."""
_SMALL_BYTES = 4096
_MAX_EXTENSION_BYTES = 2 + 8 * MAX_DIMENSIONS + _SMALL_BYTES
_HEADS = tuple(struct.Struct(f">BB{num_dimensions}Q") for num_dimensions in range(MAX_DIMENSIONS + 1))
"""Of arrays, by their number of dimensions."""
_extension: Callable[[tuple[int, bytes]], msgpack.ExtType] = functools.partial(tuple.__new__, msgpack.ExtType)
"""Without looking at what it is given, which takes longer than all the rest: a message may have many small arrays."""


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
        at, code, num_dimensions = len(self._arrays), _DTYPE_CODES.get(value.dtype), value.ndim
        is_small = value.nbytes <= _SMALL_BYTES
        if (at == MAX_ARRAYS and not is_small) or code is None or num_dimensions > MAX_DIMENSIONS:
            raise ProtocolError(
                f"array {at} of a message is {value.dtype} of {num_dimensions} dimensions: a message holds at most "
                f"{MAX_ARRAYS}, of at most {MAX_DIMENSIONS}, and of no other types than numbers"
            )
        if is_small:
            head = _HEADS[num_dimensions].pack(num_dimensions, code, *value.shape)
            return _extension((_SMALL_ARRAY, head + value.tobytes()))
        self._arrays.append(np.ascontiguousarray(value).data.cast("B"))
        return _extension((_ARRAY, _HEADS[num_dimensions].pack(at, code, *value.shape)))


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
    at, code, *shape = _HEADS[num_dimensions].unpack(content)
    if at != expected or at >= len(frames):
        raise ValueError(f"an array in frame {at} of {len(frames)}, where {expected} is next")
    return _array(shape, code, frames[at])


def _read_small_array(content: bytes) -> np.ndarray[Any, Any]:
    num_dimensions = content[0] if content else 0
    if num_dimensions > MAX_DIMENSIONS or len(content) < (head := _HEADS[num_dimensions]).size:
        raise ValueError(f"a small array whose head says that it has {num_dimensions} dimensions")
    _, code, *shape = head.unpack_from(content)
    return _array(shape, code, content, head.size)


def _array(shape: list[int], code: int, memory: Frame, start: int = 0) -> np.ndarray[Any, Any]:
    """A view of all that is there from `start` on."""
    if code >= len(DTYPES):
        raise ValueError(f"an array of type {code}")
    dtype, num_bytes = DTYPES[code], len(memory) - start
    if math.prod(shape) * dtype.itemsize != num_bytes:
        raise ValueError(f"an array of {shape} {dtype} in {num_bytes} bytes")
    return np.ndarray(shape, dtype, memory, start)


def encode(message: Message, envelope: Envelope) -> list[Frame]:
    """All frames."""
    return envelope.around(encode_body(message))


def decode(frames: Sequence[Frame]) -> tuple[Envelope, Message]:
    """All at once. Raises `ProtocolError`."""
    envelope, body = opened(frames)
    if envelope.version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {envelope.version}, not {PROTOCOL_VERSION}")
    return envelope, decode_body(body)
