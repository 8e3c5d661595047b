"""The other end of a connection, for tests that play master or worker: messages to frames and back, through a link.

And what both ends have in common: a run and its epoch, a worker's registration and welcome, an address.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainmaster.system.rpc import codec, framing
from trainmaster.system.rpc.link import Link
from trainmaster.system.rpc.messages import Cancel, Message, Register, Reply, Request, Shutdown, Welcome

RUN, EPOCH, DIGEST = "first", 3, "digest"
LINKED = (Request, Reply, Cancel, Shutdown)
"""What passes through a link once there is one."""


class Wire:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.link: Link[framing.Body] = Link()

    def pack(self, message: Message, *, linked: bool | None = None) -> list[framing.Frame]:
        """All frames. `linked`: whether through the link, by default as such a message should."""
        body, order = codec.encode_body(message), 0
        if isinstance(message, LINKED) if linked is None else linked:
            self.link.post(body)
            ((order, body),) = self.link.due(0.0)
        return framing.Envelope(epoch=self.epoch, order=order, received=self.link.received).around(body)

    def unpack(self, frames: Sequence[framing.Frame]) -> list[Message]:
        """What is delivered now: none for a message that was had before."""
        envelope, body = framing.opened(frames)
        self.link.acknowledge(envelope.received)
        bodies = [body] if envelope.order == 0 else self.link.accept(envelope.order, body)
        return [codec.decode_body(body) for body in bodies]


def head(version: int = framing.PROTOCOL_VERSION, epoch: int = EPOCH) -> bytes:
    """An envelope, and no message in it."""
    (frame,) = framing.Envelope(epoch=epoch, version=version).around([b""])
    return bytes(frame)


def register(**changes: Any) -> Register:  # Any: fields, which the record checks
    """Of a worker that has not been welcomed yet."""
    worker = Register(host="here", pid=7, incarnation="i", address="127.0.0.1", versions={}, code_digest=DIGEST)
    return replace(worker, **changes)


def welcome(rank: int = 0, **changes: Any) -> Welcome:  # Any: fields, which the record checks
    """Of a run with one worker."""
    told = Welcome(
        run=RUN,
        epoch=EPOCH,
        rank=rank,
        num_workers=1,
        num_local_workers=1,
        overrides=(),
        experiment_digest="",
        log_directory="",
        orphan_s=1.0,
        silence_s=5.0,
    )
    return replace(told, **changes)


def free_address() -> str:
    """On this machine, over TCP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
