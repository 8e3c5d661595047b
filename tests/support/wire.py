"""The other end of a connection, for tests that play master or worker: messages to frames and back, through a link."""

from __future__ import annotations

from collections.abc import Sequence

from trainmaster.system.rpc import codec
from trainmaster.system.rpc.link import Link
from trainmaster.system.rpc.messages import Cancel, Message, Reply, Request, Shutdown

LINKED = (Request, Reply, Cancel, Shutdown)
"""What passes through a link once there is one."""


class Wire:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.link: Link[codec.Body] = Link()

    def pack(self, message: Message, *, linked: bool | None = None) -> codec.Body:
        """All frames. `linked`: whether through the link, by default as such a message should."""
        body, order = codec.encode_body(message), 0
        if isinstance(message, LINKED) if linked is None else linked:
            self.link.post(body)
            ((order, body),) = self.link.due(0.0)
        return [codec.Envelope(epoch=self.epoch, order=order, received=self.link.received).encode(), *body]

    def unpack(self, frames: Sequence[codec.Frame]) -> list[Message]:
        """What is delivered now: none for a message that was had before."""
        envelope = codec.Envelope.decode(frames)
        self.link.acknowledge(envelope.received)
        bodies = [list(frames[1:])] if envelope.order == 0 else self.link.accept(envelope.order, list(frames[1:]))
        return [codec.decode_body(body) for body in bodies]
