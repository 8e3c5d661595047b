"""The master's end of the control plane: a ROUTER socket driven by the event loop.

Guarantees:
- every future that `ask` returns is settled: by a reply, by its deadline, or by the loss of its worker;
- a worker that closes its connection is known within `HEARTBEAT_S`, a host that falls silent within `silence_s`;
- a worker whose interpreter is busy is slow, not lost: its connection is answered for by ZeroMQ's own thread. It is
  reported as unresponsive, and ends itself at its call's deadline, with its stacks in a file that the error quotes;
- a reply of another run, epoch or request is dropped;
- requests of one lane reach a worker once, and in the order in which they were submitted, even if its connection breaks
  and comes back; a worker that was given up as lost is refused from then on;
- with keys, a worker is heard and served only by the key with which it came, and for as long as that is allowed.

What it does not do: decide what to request, or what a loss means.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ...api.errors import DeadlineExceeded, ProtocolError, RunError, first_cause
from ..service.keys import Holder, MasterKeys, Role
from . import codec, framing
from .commands import Command, Hook
from .drops import Drops
from .framing import PROTOCOL_VERSION
from .inquiries import Inquire, Refuse, RunStatus
from .link import ACKNOWLEDGED, Link
from .messages import (
    HEARTBEAT_S,
    Cancel,
    Heartbeat,
    Lane,
    Message,
    Ping,
    Register,
    Reply,
    Request,
    Shutdown,
    Welcome,
    seldomness,
)
from .outgoing import Outgoing
from .peer import REVOKED, Asked, Loss, Peer, Roster, unreadable
from .port import Port

logger = logging.getLogger(__name__)

_LATE_GRACE_S = 1.0
"""For a worker to end itself at a deadline, and for us to learn of it."""
_TICKS = 4
"""In `HEARTBEAT_S`. Workers take turns: each has its ping in one of these, or of those of several heartbeats."""
_LINGER_S = 0.5
_SHUTDOWN_S = 1.0
"""For workers to hear that the run is over."""
_STRANGER_BYTES = 2**15
"""The most that one who is not registered may send at once: a registration is far smaller."""
MAX_PENDING = 2**16
"""The most requests of one worker that wait for replies: who submits more has lost count."""


class Server:
    """Use as an async context manager; all methods are called on its event loop."""

    def __init__(
        self,
        address: str,
        run: str,
        epoch: int,
        num_workers: int,
        code_digest: str,
        silence_s: float,
        log_directory: Path,
        keys: MasterKeys | None = None,
    ) -> None:
        self.run, self.epoch = run, epoch
        self._log_directory, self._seldomness = log_directory, seldomness(num_workers)
        self.roster = Roster(run, num_workers, code_digest)
        self.on_inquiry: Callable[[Inquire], RunStatus | Refuse] = lambda _: Refuse(reason="nobody here knows")
        """Answers who asks after the run. Must not wait."""
        self._drops = Drops(logger)
        self._num_requests = 0
        self._num_ticks = 0
        self._num_probes_due = 0
        self._port = Port(address, silence_s, keys, num_workers)
        self.address = self._port.address

    async def __aenter__(self) -> Server:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Any] = _quiet(self._loop)  # Any: it never has a result
        """Fails with `WorkerLost` or `DeadlineExceeded` at the first loss of a worker, asked for something or not; or
        with what a worker raised that was told something."""
        self._all_registered, self._arrived = asyncio.Event(), asyncio.Event()
        self._outgoing = Outgoing(self._port, self.epoch, self._lose, HEARTBEAT_S * self._seldomness)
        self._timer = self._loop.call_later(HEARTBEAT_S / _TICKS, self._tick)
        self._port.open(self._received, self._dropped)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reason = "the run is over" if error is None else f"the run ended: {_said(error)}"
        shutdown = Shutdown(is_done=error is None, reason=reason[:2000])
        for peer in list(self.roster.peers.values()):
            peer.lost = RunError(reason)
            peer.drop(peer.lost)
            if peer.welcome is None:
                self._outgoing.say(peer, shutdown)
            else:
                self._outgoing.post(peer, codec.encode_body(shutdown))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHUTDOWN_S):
                await self._all_told()
        self._timer.cancel()
        for peer in self.roster.peers.values():
            peer.stop_waiting()
        self.lost.cancel()
        await self._port.close(_LINGER_S)

    async def _all_told(self) -> None:
        """Waits until nothing is left to acknowledge. Time is short: what is not acknowledged is soon sent again."""
        while waiting := [peer for peer in self.roster.peers.values() if not peer.link.is_idle]:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), _SHUTDOWN_S / 5)
            except TimeoutError:
                for peer in waiting:
                    peer.link.hurry()
                    self._outgoing.flush(peer)

    async def workers(self, deadline_s: float) -> list[Register]:
        """Waits until every worker has registered; then ranks are fixed, workers of one host side by side.

        Returns registrations by rank. Raises `DeadlineExceeded`, or `WorkerLost` for one that left again.
        """
        waiting: asyncio.Future[Any] = asyncio.ensure_future(self._all_registered.wait())
        try:
            await asyncio.wait({waiting, self.lost}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self.lost.done():
            self.lost.result()
        if not self._all_registered.is_set():
            raise _too_few(self.roster, self.address, deadline_s, self._drops.last)
        self.roster.assign_ranks()
        return [peer.register for peer in self.roster.by_rank]

    @property
    def registered(self) -> list[Register]:
        """Workers that are there, in the order in which they came."""
        return [peer.register for peer in self.roster.peers.values()]

    @property
    def num_refused(self) -> int:
        """Connections of strangers, where there are keys."""
        return self._port.num_refused

    def welcome(self, make: Callable[[int], Welcome]) -> None:
        """Sends every worker its welcome."""
        for rank, peer in enumerate(self.roster.by_rank):
            peer.last_heard_s = self._loop.time()
            peer.link, peer.welcome = Link(self._seldomness), make(rank)
            assert (peer.welcome.run, peer.welcome.epoch) == (self.run, self.epoch), "a welcome is to this epoch"
            self._outgoing.say(peer, peer.welcome)

    def next_epoch(self) -> None:
        """Begins a new epoch with the workers that are left: `workers` waits for others in place of the lost."""
        over = RunError(f"epoch {self.epoch} is over")
        self.epoch = self._outgoing.epoch = self.epoch + 1
        self.lost = _quiet(self._loop)
        for peer in self.roster.peers.values():
            peer.drop(over)
            peer.rank, peer.welcome = None, None
        if not self.roster.is_complete:
            self._all_registered.clear()

    def ask(
        self,
        commands: Mapping[int, Command],
        *,
        name: str,
        deadline_s: float,
        lane: Lane = Lane.COMPUTE,
        step: int = 0,
        pre_hooks: tuple[Hook, ...] = (),
        post_hooks: tuple[Hook, ...] = (),
    ) -> Asked:
        """Asks workers for something, by rank. `name` says in errors what it was; `step` in logs where it belongs.

        The future fails with `RemoteError` (or the `ConfigError`, `DataError`, `ModelError` that a worker raised),
        with `DeadlineExceeded`, with `WorkerLost`, or with a plain `RunError` if the epoch ends first. Ranks in a row
        that are given one object of a command are sent the same bytes.
        """
        assert commands, "somebody is asked"
        peers = {rank: self.roster.by_rank[rank] for rank in commands}
        for peer in peers.values():
            if len(peer.pending) >= MAX_PENDING:
                raise RunError(f"{peer} has {MAX_PENDING} requests that wait for replies, and {name} would be one more")
        start_s = self._loop.time()
        identity = self._post(
            commands,
            submitted_s=start_s,
            deadline_s=deadline_s,
            lane=lane,
            step=step,
            pre_hooks=pre_hooks,
            post_hooks=post_hooks,
        )
        asked = Asked(self._loop, identity, name, step, start_s, deadline_s, self._cancel)  # while it travels
        asked.wait_for(peers, _LATE_GRACE_S)
        return asked

    def tell(self, commands: Mapping[int, Command], deadline_s: float, lane: Lane) -> None:
        """Has workers do something, in its turn on the lane. They say nothing but that they failed: see `lost`."""
        self._post(commands, submitted_s=self._loop.time(), deadline_s=deadline_s, lane=lane, is_silent=True)

    def _post(self, commands: Mapping[int, Command], **terms: Any) -> int:  # Any: the other fields of `Request`
        """Returns the number by which workers know the request."""
        self._num_requests += 1
        last: Command | None = None
        for rank, command in commands.items():
            if command is not last:
                request = Request(run=self.run, epoch=self.epoch, id=self._num_requests, command=command, **terms)
                last, body = command, codec.encode_body(request)
            peer = self.roster.by_rank[rank]
            if peer.lost is None:
                self._outgoing.post(peer, body)
        return self._num_requests

    def probe(self) -> None:
        """Pings every worker now, to learn at once of connections that have closed."""
        self._outgoing.ping(list(self.roster.peers.values()))

    # -- receiving ------------------------------------------------------------------------------------------------

    def _dropped(self, reason: str) -> None:
        self._drops.note(reason, self._loop.time())

    def _received(self, route: bytes, frames: list[framing.Frame], sender: Holder | None) -> None:
        peer = self.roster.by_route.get(route)
        if sender is not None and (sender.role is Role.NOBODY or (peer is not None and peer.holder != sender)):
            self._dropped(f"one by a key that is not allowed any more ({sender.key})")
            if peer is not None:
                self._lose(peer, REVOKED)
            return
        try:
            self._take(route, peer, frames, sender)
        except ProtocolError as error:
            self._dropped(str(error))
            peer = self.roster.by_route.get(route)
            if peer is not None:
                self._lose(peer, unreadable(error))

    def _take(self, route: bytes, peer: Peer | None, frames: list[framing.Frame], sender: Holder | None) -> None:
        envelope, body = framing.opened(frames)
        if envelope.version != PROTOCOL_VERSION:
            reason = f"the worker speaks protocol {envelope.version}, the master {PROTOCOL_VERSION}: install the same"
            self._dropped(reason)
            self._outgoing.refuse(route, Refuse(reason=reason), envelope.version)
            return
        if peer is None and sum(map(len, frames)) > _STRANGER_BYTES:
            raise ProtocolError(f"a first message of {sum(map(len, frames))} bytes")
        if envelope.order == 0:
            self._receive(route, peer, codec.decode_body(body), sender)
        if peer is None or envelope.epoch != self.epoch:
            if envelope.order > 0:
                who = "someone who is not registered" if peer is None else str(peer)
                self._dropped(f"{who} sent one of epoch {envelope.epoch}")
            return
        peer.link.acknowledge(envelope.received)
        self._arrived.set()
        if envelope.order > 0:
            for delivered in peer.link.accept(envelope.order, body):
                self._receive(route, peer, codec.decode_body(delivered), sender)
            if envelope.order % ACKNOWLEDGED == 0:
                self._outgoing.ping([peer])
        if peer.link.is_due(self._loop.time()):
            self._outgoing.flush(peer)

    def _receive(self, route: bytes, peer: Peer | None, message: Message, sender: Holder | None) -> None:
        objection = self.roster.objection(sender, message)
        if objection is not None:
            self._dropped(objection.reason)
            self._outgoing.refuse(route, objection)
        elif isinstance(message, Register):
            self._register(route, message, sender)
        elif isinstance(message, Inquire):
            self._outgoing.answer(route, self.on_inquiry(message))
        elif peer is None:
            self._dropped(f"a {message.type} from someone who is not registered")
        else:
            peer.heard(self._loop.time())
            match message:
                case Reply() if (message.run, message.epoch) == (self.run, self.epoch):
                    error = peer.settle(message)
                    if error is not None and not self.lost.done():
                        self.lost.set_exception(error)
                case Heartbeat():
                    peer.executing = message.executing
                case _:
                    self._dropped(f"a {message.type} from {peer}, which is not for it to send")

    def _register(self, route: bytes, register: Register, sender: Holder | None) -> None:
        peer = self.roster.peers.get(register.incarnation)
        if peer is not None:  # it has not heard its welcome, or its connection is a new one
            peer.stop_waiting()
            self.roster.reroute(peer, route)
            if peer.welcome is not None:
                is_new = (register.run, register.epoch) != (self.run, self.epoch)
                self._outgoing.say(peer, peer.welcome if is_new else Ping())  # it begins nothing until it hears us
            peer.link.hurry()
            self._outgoing.flush(peer)
            return
        peer = Peer(route, register, self._loop.time(), holder=sender)
        refusal = self.roster.admit(peer)
        if refusal is not None:
            self._dropped(f"{peer} was refused: {refusal}")
            self._outgoing.refuse(route, Refuse(reason=refusal))
            return
        logger.info("%s registered: %s", peer, peer.describe())
        if self.roster.is_complete:
            self._all_registered.set()

    def _cancel(self, peer: Peer, identity: int) -> None:
        """The caller gave up on a request: it need not begin any more."""
        self._outgoing.post(peer, codec.encode_body(Cancel(run=self.run, epoch=self.epoch, id=identity)))

    # -- time and loss --------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._timer = self._loop.call_later(HEARTBEAT_S / _TICKS, self._tick)
        self._port.drain()  # after a stall, signs of life lie unread
        self._num_ticks += 1
        if self._port.had_closed():
            self._num_probes_due = 2  # it is told a little before it can be found
        if is_probed := self._num_probes_due > 0:
            self._num_probes_due -= 1
            self.probe()
        now_s, peers = self._loop.time(), list(self.roster.peers.values())
        num_turns = _TICKS * self._seldomness
        turn = peers[self._num_ticks % num_turns :: num_turns]
        for peer in turn:
            peer.check_heartbeats(now_s, HEARTBEAT_S * self._seldomness)
        if not is_probed:
            self._outgoing.ping(turn)
        for peer in peers[self._num_ticks % self._seldomness :: self._seldomness]:
            if peer.link.is_due(now_s):
                self._outgoing.flush(peer)
        for peer in peers:
            if peer.holder is not None and not self._port.is_allowed(peer.holder):
                self._lose(peer, REVOKED)

    def _lose(self, peer: Peer, loss: Loss) -> None:
        if not self.roster.expel(peer):
            return
        peer.stop_waiting()
        peer.lost = peer.obituary(loss, self._loop.time(), self._log_directory)
        logger.error("%s", peer.lost)
        peer.drop(peer.lost)
        self._outgoing.refuse(peer.route, Refuse(reason="it was given up as lost"))  # if it can hear
        if not self.lost.done():
            self.lost.set_exception(peer.lost)


def _quiet(loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:  # Any: the caller's annotation says of what
    future: asyncio.Future[Any] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # an unread failure is no news
    return future


def _said(error: BaseException) -> str:
    cause = first_cause(error)
    return str(cause) or type(cause).__name__


def _too_few(roster: Roster, address: str, deadline_s: float, dropped: str | None) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"only {len(roster.peers)} of {roster.num_workers} workers registered at {address} within {deadline_s:g} s "
        f"(run.deadlines.register_s). Start the missing ones with `trainmaster worker FILE --master {address}`, or "
        "look into their logs" + (f". A message was dropped: {dropped}" if dropped is not None else "")
    )
