"""What the master says to its workers: through their links, or outside of them.

    post --> the worker's link --> once and in order, also over a connection that breaks and comes back
    say, ping, answer -----------> now, or never

Who says something learns whether the connection is there still: a worker's that is not may come back for `RECONNECT_S`,
then the worker is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from . import codec, framing
from .framing import PROTOCOL_VERSION
from .inquiries import Refuse, RunStatus
from .messages import Message, Ping
from .peer import CLOSED, Loss, Peer, silent
from .port import Port

RECONNECT_S = 0.3
"""For a connection that closed to come back, before its worker is lost."""


class Outgoing:
    """Made on the event loop."""

    def __init__(self, port: Port, epoch: int, lose: Callable[[Peer, Loss], None], heartbeat_s: float) -> None:
        """`heartbeat_s`: between two of a worker's heartbeats."""
        self._port, self.epoch, self._lose, self._heartbeat_s = port, epoch, lose, heartbeat_s
        self._loop = asyncio.get_running_loop()
        self._ping = codec.encode_body(Ping())

    def post(self, peer: Peer, body: framing.Body) -> None:
        """Through the worker's link: once and in order. One body may be posted to several."""
        peer.link.post(body)
        self.flush(peer)

    def flush(self, peer: Peer) -> None:
        """Sends what is due in the worker's link."""
        if peer.gone is None:
            for order, body in peer.link.due(self._loop.time()):
                self._transmit(peer, order, body)

    def say(self, peer: Peer, message: Message) -> None:
        """Outside of the link: now, or never."""
        self._transmit(peer, 0, codec.encode_body(message))

    def ping(self, peers: Iterable[Peer]) -> None:
        """Has workers send a heartbeat, and finds out whether they are connected."""
        for peer in peers:
            self._transmit(peer, 0, self._ping)

    def refuse(self, route: bytes, refuse: Refuse, version: int = PROTOCOL_VERSION) -> None:
        """In words that a worker of that version can read: its envelope, and `Refuse`, are the same in all of them."""
        self._port.send(route, codec.encode(refuse, framing.Envelope(epoch=0, version=version)))

    def answer(self, route: bytes, answer: RunStatus | Refuse) -> None:
        """To an operator."""
        self._port.send(route, codec.encode(answer, framing.Envelope(epoch=self.epoch)))

    def _transmit(self, peer: Peer, order: int, body: framing.Body) -> None:
        envelope = framing.Envelope(self.epoch, order, peer.link.received, self._loop.time())
        if not self._port.send(peer.route, envelope.around(body)) and peer.gone is None:
            peer.gone = self._loop.call_later(RECONNECT_S, self._lose_gone, peer)

    def _lose_gone(self, peer: Peer) -> None:
        silent_s = self._loop.time() - peer.last_heard_s
        if peer.welcome is not None and silent_s > max(self._port.noticed_s, self._heartbeat_s + 2 * RECONNECT_S):
            self._lose(peer, silent(silent_s))
        else:
            self._lose(peer, CLOSED)
