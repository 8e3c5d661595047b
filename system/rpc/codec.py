"""Messages to ZeroMQ frames and back: a header that names protocol and version, and a msgpack body.

A frame from outside is not trusted: every length, depth and count is bounded before anything is built from it, and the
body must validate against the closed union of messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgpack  # type: ignore[import-untyped]
from pydantic import ValidationError

from ...api.errors import ProtocolError
from .messages import MESSAGES, PROTOCOL_VERSION, Message

MAX_BODY_BYTES = 64 * 2**20
MAX_ITEMS = 2**20
"""The most items of one array or map."""
HEADER = b"TRAINMASTER" + PROTOCOL_VERSION.to_bytes(2, "big")


def encode(message: Message) -> list[bytes]:
    """Header and body."""
    body: bytes = msgpack.packb(MESSAGES.dump_python(message), unicode_errors="backslashreplace")
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError(f"a {message.type} message of {len(body)} bytes is over the limit of {MAX_BODY_BYTES}")
    return [HEADER, body]


def decode(frames: Sequence[bytes]) -> Message:
    """Raises `ProtocolError` for anything but a valid message of this version."""
    if len(frames) != 2:
        raise ProtocolError(f"{len(frames)} frames where a message has 2")
    header, body = frames
    if header != HEADER:
        raise ProtocolError(
            f"header {header[:32]!r} is not {HEADER!r}: another program, or another version of Trainmaster"
        )
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError(f"a body of {len(body)} bytes is over the limit of {MAX_BODY_BYTES}")
    try:
        content = msgpack.unpackb(
            body, use_list=False, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS, max_ext_len=0, max_bin_len=0
        )
        return MESSAGES.validate_python(content)
    except ValidationError as error:
        raise ProtocolError(
            f"not a message of ours: {error.errors(include_url=False, include_input=False)[:3]}"
        ) from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not msgpack that we accept: {error}") from None
