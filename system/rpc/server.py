"""The master's end of the control plane: a ROUTER socket driven by the event loop.

Guarantees:
- every future that `submit` returns is settled: by a reply, by its deadline, or by the loss of its worker;
- a worker that closes its connection is known within `HEARTBEAT_S`, a host that falls silent within `silence_s`;
- a worker whose interpreter is busy is slow, not lost: its connection is answered for by ZeroMQ's own thread. It is
  reported as unresponsive, and ends itself at its call's deadline, with its stacks in a file that the error quotes;
- a reply of another run, epoch or request is dropped;
- requests of one lane reach a worker in the order in which they were submitted.

What it does not do: decide what to request, or what a loss means.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from ...api.errors import (
    ConfigError,
    DataError,
    DeadlineExceeded,
    ModelError,
    ProtocolError,
    RemoteError,
    RewardError,
    RunError,
    WorkerLost,
)
from . import codec
from .commands import Command, Hook
from .messages import (
    HEARTBEAT_S,
    PROTOCOL_VERSION,
    Failure,
    Heartbeat,
    Lane,
    Message,
    Ping,
    Refuse,
    Register,
    Reply,
    Request,
    Shutdown,
    Success,
    Welcome,
)

logger = logging.getLogger(__name__)

_PING_SHARE, _PONG_SHARE = 0.2, 0.6
"""Of `silence_s`: between two of ZeroMQ's pings, and for an answer; what is left is for us to notice."""
_LATE_GRACE_S = 1.0
"""For a worker to end itself at a deadline, and for us to learn of it."""
_UNRESPONSIVE_HEARTBEATS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful reply: its outcome, and seconds by command and hook type."""

    success: Success
    seconds: dict[str, float]


@dataclass(slots=True)
class _Pending:
    name: str
    start_s: float
    deadline_s: float
    future: asyncio.Future[Answer]
    timer: asyncio.TimerHandle


@dataclass(slots=True)
class Peer:
    """A registered worker."""

    route: bytes
    register: Register
    last_heard_s: float
    rank: int | None = None
    welcomed: bool = False
    """A worker sends heartbeats from its welcome on."""
    responsive: bool = True
    pending: dict[int, _Pending] = field(default_factory=dict)
    lost: RunError | None = None

    def __str__(self) -> str:
        name = "a worker" if self.rank is None else f"worker {self.rank}"
        return f"{name} (pid {self.register.pid} on {self.register.host})"


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
    ) -> None:
        self.run, self.epoch, self.num_workers = run, epoch, num_workers
        self._code_digest, self._silence_s, self._log_directory = code_digest, silence_s, log_directory
        self._peers: dict[bytes, Peer] = {}
        self._ranks: list[Peer] = []
        self._strangers: deque[str] = deque(maxlen=1)
        """Why the last message that could not be read was dropped."""
        self._num_requests = 0
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.IPV6, "[" in address)
        # a send to a closed connection is then an error: how we learn of it
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_BODY_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 10_000)
        # pings of ZeroMQ's own, answered without Python; the last makes the other end give up as soon as we do
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * silence_s * _PING_SHARE))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * silence_s * _PONG_SHARE))
        self._socket.setsockopt(zmq.HEARTBEAT_TTL, round(1000 * silence_s * _PONG_SHARE))
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(
                "--bind", address, f"cannot bind: {error}", "choose a free port of this machine"
            ) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def __aenter__(self) -> Server:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Any] = self._future()  # Any: it never has a result
        """Fails with `WorkerLost` or `DeadlineExceeded` at the first loss of a worker, asked for something or not."""
        self._all_registered = asyncio.Event()
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._timer = self._loop.call_later(HEARTBEAT_S / 2, self._tick)
        self._loop.call_soon(self._drain)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        reason = "the run is over" if error is None else f"the run ended: {error or type(error).__name__}"
        for peer in list(self._peers.values()):
            with contextlib.suppress(zmq.ZMQError):
                self._send(peer, Shutdown(is_done=error is None, reason=reason[:2000]))
            for pending in peer.pending.values():
                pending.timer.cancel()
                pending.future.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self.lost.cancel()
        self._socket.close(linger=500)  # here, on the thread that uses it
        await asyncio.to_thread(self._context.term)

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
            raise DeadlineExceeded(
                f"only {len(self._peers)} of {self.num_workers} workers registered at {self.address} within "
                f"{deadline_s:g} s (run.deadlines.register_s). Start the missing ones with "
                f"`trainmaster worker FILE --master {self.address}`, or look into their logs"
                + "".join(f". A message was dropped: {reason}" for reason in self._strangers)
            )
        peers = list(self._peers.values())
        hosts = list(dict.fromkeys(peer.register.host for peer in peers))
        self._ranks = sorted(peers, key=lambda peer: hosts.index(peer.register.host))
        for rank, peer in enumerate(self._ranks):
            peer.rank = rank
        return [peer.register for peer in self._ranks]

    def welcome(self, make: Callable[[int], Welcome]) -> None:
        """Sends every worker its welcome."""
        for rank, peer in enumerate(self._ranks):
            peer.last_heard_s = self._loop.time()
            peer.welcomed = True
            self._post(peer, make(rank))

    def submit(
        self,
        rank: int,
        command: Command,
        *,
        name: str,
        deadline_s: float,
        lane: Lane = Lane.COMPUTE,
        pre_hooks: tuple[Hook, ...] = (),
        post_hooks: tuple[Hook, ...] = (),
    ) -> asyncio.Future[Answer]:
        """Asks a worker for something. `name` says in errors what it was.

        The future fails with `RemoteError` (or the `ConfigError`, `DataError`, `ModelError` that the worker raised),
        with `DeadlineExceeded`, or with `WorkerLost`.
        """
        peer = self._ranks[rank]
        self._num_requests += 1
        identity = self._num_requests
        future: asyncio.Future[Answer] = self._future()
        if peer.lost is not None:
            future.set_exception(peer.lost)
            return future
        timer = self._loop.call_later(deadline_s + _LATE_GRACE_S, self._late, peer, identity)
        peer.pending[identity] = _Pending(name, self._loop.time(), deadline_s, future, timer)
        request = Request(
            run=self.run,
            epoch=self.epoch,
            id=identity,
            lane=lane,
            deadline_s=deadline_s,
            command=command,
            pre_hooks=pre_hooks,
            post_hooks=post_hooks,
        )
        self._post(peer, request)
        return future

    def probe(self) -> None:
        """Pings every worker now, to learn at once of connections that have closed."""
        for peer in list(self._peers.values()):
            self._post(peer, Ping())

    def _future(self) -> asyncio.Future[Any]:  # Any: the caller's annotation says of what
        future: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # an unread failure is no news
        return future

    # -- sending --------------------------------------------------------------------------------------------------

    def _send(self, peer: Peer, message: Message) -> None:
        self._socket.send_multipart([peer.route, *codec.encode(message)], zmq.NOBLOCK)

    def _post(self, peer: Peer, message: Message) -> None:
        try:
            self._send(peer, message)
        except zmq.ZMQError as error:
            silent_s = self._loop.time() - peer.last_heard_s
            if error.errno != zmq.EHOSTUNREACH:
                cause = f"cannot be sent to ({error})"
            elif peer.welcomed and silent_s > self._silence_s * _PONG_SHARE:
                cause = f"sent no sign of life for {silent_s:.0f} s (run.deadlines.silence_s)"
            else:
                cause = "closed its connection"
            self._lose(peer, cause)
        self._loop.call_soon(self._drain)  # the socket's descriptor is edge-triggered: a send can swallow its event

    # -- receiving ------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                route, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = codec.decode(frames)
            except ProtocolError as error:
                logger.warning("dropped a message from route %s: %s", route.hex(), error)
                self._strangers.append(str(error))
                if route in self._peers:
                    self._lose(self._peers[route], f"sent what cannot be read ({error})")
                continue
            self._receive(route, message)

    def _receive(self, route: bytes, message: Message) -> None:
        peer = self._peers.get(route)
        if isinstance(message, Register):
            self._register(route, message)
        elif peer is None:
            logger.warning("dropped a %s from a worker that is not registered", message.type)
        else:
            self._heard(peer)
            match message:
                case Reply():
                    self._settle(peer, message)
                case Heartbeat():
                    pass
                case _:
                    logger.warning("dropped a %s from %s: not a worker's message", message.type, peer)

    def _register(self, route: bytes, register: Register) -> None:
        peer = Peer(route, register, self._loop.time())
        refusal = None
        if register.protocol != PROTOCOL_VERSION:
            refusal = (
                f"the worker speaks protocol {register.protocol}, the master {PROTOCOL_VERSION}: install one version"
            )
        elif register.code_digest != self._code_digest:
            refusal = "the worker's experiment file differs from the master's: copy the same file to both"
        elif len(self._peers) >= self.num_workers:
            refusal = f"the run has its {self.num_workers} workers already"
        if refusal is not None:
            logger.warning("refused %s: %s", peer, refusal)
            with contextlib.suppress(zmq.ZMQError):
                self._send(peer, Refuse(reason=refusal))
            return
        self._peers[route] = peer
        logger.info("%s registered, %d of %d", peer, len(self._peers), self.num_workers)
        if len(self._peers) == self.num_workers:
            self._all_registered.set()

    def _settle(self, peer: Peer, reply: Reply) -> None:
        if (reply.run, reply.epoch) != (self.run, self.epoch) or reply.id not in peer.pending:
            logger.warning("dropped a reply of %s to request %d of epoch %d", peer, reply.id, reply.epoch)
            return
        pending = peer.pending.pop(reply.id)
        pending.timer.cancel()
        if pending.future.done():  # the caller gave up on it
            return
        match reply.outcome:
            case Success() as success:
                pending.future.set_result(Answer(success, reply.seconds))
            case Failure() as failure:
                pending.future.set_exception(_raised(f"{pending.name} on {peer}", failure))

    # -- time -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._timer = self._loop.call_later(HEARTBEAT_S / 2, self._tick)
        self._drain()  # after a stall, signs of life lie unread
        self.probe()
        for peer in list(self._peers.values()):
            silent_s = self._loop.time() - peer.last_heard_s
            if peer.welcomed and peer.responsive and silent_s > _UNRESPONSIVE_HEARTBEATS * HEARTBEAT_S:
                peer.responsive = False
                logger.warning("%s is unresponsive: its interpreter is busy; its call's deadline is what counts", peer)

    def _heard(self, peer: Peer) -> None:
        now_s = self._loop.time()
        if not peer.responsive:
            peer.responsive = True
            logger.warning("%s answers again after %.0f s", peer, now_s - peer.last_heard_s)
        peer.last_heard_s = now_s

    def _late(self, peer: Peer, identity: int) -> None:
        """For a worker that could not even end itself."""
        pending = peer.pending.pop(identity)
        if not pending.future.done():
            pending.future.set_exception(DeadlineExceeded(_late_message(peer, pending)))

    def _lose(self, peer: Peer, cause: str) -> None:
        if self._peers.pop(peer.route, None) is None:
            return
        error = self._obituary(peer, cause)
        logger.error("%s", error)
        peer.lost = error
        for pending in peer.pending.values():
            pending.timer.cancel()
            if not pending.future.done():
                pending.future.set_exception(error)
        peer.pending.clear()
        if not self.lost.done():
            self.lost.set_exception(error)

    def _obituary(self, peer: Peer, cause: str) -> RunError:
        """What a lost worker died of. One that ended itself at a deadline left its stacks."""
        now_s = self._loop.time()
        overdue = [pending for pending in peer.pending.values() if now_s >= pending.start_s + pending.deadline_s]
        stacks = self._log_directory / f"worker-{peer.rank}.stacks"
        if overdue and stacks.is_file() and (text := stacks.read_text().strip()):
            return DeadlineExceeded(f"{_late_message(peer, overdue[0])}. It was here ({stacks}):\n{text}")
        during = ", ".join(dict.fromkeys(pending.name for pending in peer.pending.values()))
        return WorkerLost(f"{peer} {cause}" + (f" during {during}" if during else "") + ": it died or was cut off")


def _late_message(peer: Peer, pending: _Pending) -> str:
    return f"{pending.name} on {peer} took longer than its {pending.deadline_s:g} s (run.deadlines)"


def _raised(where: str, failure: Failure) -> Exception:
    """The error that a worker reported: a user's mistake as itself, anything else as `RemoteError`."""
    if failure.field is not None:
        kind = DataError if failure.kind == DataError.__name__ else ConfigError
        return kind(failure.field, failure.value, failure.rule, failure.cure)
    for telling in (ModelError, RewardError):  # messages that say it all
        if failure.kind == telling.__name__:
            return telling(failure.message)
    return RemoteError(where, failure.kind, failure.message, failure.traceback)
