"""Workers as the master knows them: who belongs to the run, what each was asked, and what its failures mean.

Pure bookkeeping: nothing here sends anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
from ..service.keys import Holder, Role
from ..service.logs import at
from . import framing
from .inquiries import Inquire, Refuse, WorkerState, WorkerStatus
from .link import Link
from .messages import Executing, Failure, Message, Register, Reply, Success, Welcome, stacks_name

logger = logging.getLogger(__name__)

_UNRESPONSIVE_HEARTBEATS = 3
"""Without which a worker is marked, no more."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful reply: its outcome, and seconds by command and hook type."""

    success: Success
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a worker is given up."""

    what: str
    """It did, or was done to it."""
    meaning: str = ""
    likely: str = ""
    """Where it comes from and what to do, where that is not what a worker's death comes from."""


CLOSED = Loss("closed its connection", "it died or was cut off")
REVOKED = Loss(
    "had its key revoked",
    likely="somebody ran `trainmaster keys --revoke`, or removed its key from the list `allowed` of the run's keys. If "
    "that was not meant, make it another key, and start it with that",
)


def silent(silent_s: float) -> Loss:
    """For longer than it may be."""
    what = f"sent no sign of life for {silent_s:.0f} s (run.deadlines.silence_s)"
    return Loss(what, "it died or was cut off")


def unreadable(error: ProtocolError) -> Loss:
    """It sent what is no message of ours."""
    return Loss(
        f"sent what cannot be read ({error})",
        likely="it runs another state of Trainmaster's code than the master: install the same on all hosts. If it does "
        "not, this is a defect of ours",
    )


class Asked(asyncio.Future[dict[int, Answer]]):
    """What was asked of workers, each once: their answers by rank.

    It fails at the first failure, and `errors` go on to come. A failure that nobody reads is no news. Cancelling it,
    done or not, withdraws what has no reply yet.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        identity: int,
        name: str,
        step: int,
        start_s: float,
        deadline_s: float,
        withdraw: Callable[[Peer, int], None],
    ) -> None:
        super().__init__(loop=loop)
        self.identity, self.name, self.step, self.start_s, self.deadline_s = identity, name, step, start_s, deadline_s
        self.answers: dict[int, Answer] = {}
        """In the order of asking, once all are there."""
        self.errors: list[Exception] = []
        self._withdraw = withdraw
        self._waiting: dict[int, Peer] = {}
        """Who has not replied, by rank."""
        self._ranks: tuple[int, ...] = ()
        self._news: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def wait_for(self, peers: dict[int, Peer], late_s: float) -> None:
        """Begins to wait, `late_s` beyond the deadline: who can, ends itself at that."""
        self._ranks, self._waiting = tuple(peers), peers
        for rank in self._ranks:
            peer = peers[rank]
            if peer.lost is None:
                peer.pending[self.identity] = self
            else:
                self.fail(rank, peer.lost)
        if self._waiting:
            self._timer = self.get_loop().call_later(self.deadline_s + late_s, self._expire)

    def answer(self, rank: int, answer: Answer) -> None:
        self.answers[rank] = answer
        self._heard(rank)
        if not self._waiting and not self.done():
            if len(self._ranks) > 1:
                self.answers = {each: self.answers[each] for each in self._ranks}
            self.set_result(self.answers)

    def fail(self, rank: int, error: Exception) -> None:
        self.errors.append(error)
        self._heard(rank)
        if not self.done():
            self.set_exception(error)
            self.exception()

    def news(self) -> asyncio.Future[None]:
        """Done when another reply comes."""
        self._news = self.get_loop().create_future()
        return self._news

    @property
    def is_settled(self) -> bool:
        """Whether every reply has come."""
        return not self._waiting

    def cancel(self, msg: object = None) -> bool:
        for rank, peer in list(self._waiting.items()):
            self._forget(rank)
            self._withdraw(peer, self.identity)
        return super().cancel(msg)

    def _heard(self, rank: int) -> None:
        self._forget(rank)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _forget(self, rank: int) -> None:
        self._waiting.pop(rank).pending.pop(self.identity, None)
        if not self._waiting and self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        """For workers that could not even end themselves at their deadline."""
        for rank, peer in list(self._waiting.items()):
            self.fail(rank, DeadlineExceeded(peer.late(self)))


@dataclass(slots=True)
class Peer:
    """A registered worker."""

    route: bytes
    """The router's name for its connection: the router chose it, so nobody can ask for another's."""
    register: Register
    last_heard_s: float
    rank: int | None = None
    link: Link[framing.Body] = field(default_factory=Link)
    welcome: Welcome | None = None
    """What it was told, or is still to hear. A worker sends heartbeats from its welcome on."""
    responsive: bool = True
    gone: asyncio.TimerHandle | None = None
    """Its connection closed, and may come back until then."""
    executing: tuple[Executing, ...] = ()
    """What its last heartbeat said it was at."""
    pending: dict[int, Asked] = field(default_factory=dict)
    """What it was asked and has not replied to, by request."""
    has_failed: bool = False
    lost: RunError | None = None
    holder: Holder | None = None
    """Of the key by which it came, where there are keys."""

    def __str__(self) -> str:
        name = "a worker" if self.rank is None else f"worker {self.rank}"
        return f"{name} (pid {self.register.pid} on {self.register.host})"

    def describe(self) -> str:
        """What it can do and with what."""
        devices = ", ".join(self.register.devices) or "CPU only"
        return "; ".join([devices, *(f"{name} {version}" for name, version in self.register.versions.items())])

    def heard(self, now_s: float) -> None:
        if not self.responsive:
            self.responsive = True
            logger.warning("%s answers again after %.0f s", self, now_s - self.last_heard_s)
        self.last_heard_s = now_s

    def status(self, now_s: float) -> WorkerStatus:
        """What it is at, as far as it has said."""
        silent_s = max(0.0, now_s - self.last_heard_s)
        at = [(each.seconds + silent_s, self.pending[each.id]) for each in self.executing if each.id in self.pending]
        at = at or [(now_s - each.start_s, each) for each in self.pending.values()]  # it has not said yet
        call_s, asked = max(at, key=lambda each: each[0], default=(0.0, None))
        state = WorkerState.IDLE if asked is None else WorkerState.BUSY
        state = state if self.responsive else WorkerState.UNRESPONSIVE
        return WorkerStatus(
            rank=self.rank,
            host=self.register.host,
            pid=self.register.pid,
            state=state,
            call="" if asked is None else asked.name,
            call_s=call_s,
            heard_s=silent_s,
        )

    def stop_waiting(self) -> None:
        """Its connection is back, or nobody waits for that any more."""
        if self.gone is not None:
            self.gone.cancel()
            self.gone = None

    def check_heartbeats(self, now_s: float, heartbeat_s: float) -> None:
        """Marks a worker whose connection lives, but whose Python lets it send nothing.

        `heartbeat_s`: between two of its heartbeats.
        """
        silent_s = now_s - self.last_heard_s
        if self.welcome is None or not self.responsive or silent_s <= _UNRESPONSIVE_HEARTBEATS * heartbeat_s:
            return
        self.responsive = False
        at = {each.id for each in self.executing}
        names = ", ".join(asked.name for identity, asked in self.pending.items() if identity in at)
        logger.warning(
            "%s is unresponsive%s: its interpreter is busy; its call's deadline is what counts",
            self,
            f" during {names}" if names else "",
        )

    def settle(self, reply: Reply) -> Exception | None:
        """Passes an answer on to whoever waits for it. Returns the error of a request that nobody waits for."""
        if reply.is_unasked and isinstance(reply.outcome, Failure):
            error = raised(f"{', '.join(reply.seconds)} on {self}", reply.outcome)
            logger.error("%s", error)
            return error
        asked = self.pending.get(reply.id)
        if asked is None:  # the caller gave up on it
            return None
        assert self.rank is not None, "who was asked has a rank"
        match reply.outcome:
            case Success() as success:
                asked.answer(self.rank, Answer(success, reply.seconds))
            case Failure() as failure:
                error = raised(f"{asked.name} on {self}", failure)
                if not self.has_failed:
                    with at(step=asked.step):
                        logger.error("the first error of %s: %s", self, error)
                self.has_failed = True
                asked.fail(self.rank, error)
        return None

    def drop(self, error: RunError) -> None:
        """Waits for no reply any longer: all fail with the error."""
        for asked in list(self.pending.values()):
            assert self.rank is not None, "who was asked has a rank"
            asked.fail(self.rank, error)

    def obituary(self, loss: Loss, now_s: float, log_directory: Path) -> RunError:
        """What a lost worker died of. One that ended itself at a deadline left its stacks."""
        overdue = [asked for asked in self.pending.values() if now_s >= asked.start_s + asked.deadline_s]
        stacks = log_directory / stacks_name(self.register)
        if overdue and stacks.is_file() and (text := stacks.read_text().strip()):
            return DeadlineExceeded(f"{self.late(overdue[0])}. It was here ({stacks}):\n{text}")
        during = ", ".join(dict.fromkeys(asked.name for asked in self.pending.values()))
        what = f"{self} {loss.what}" + (f" during {during}" if during else "")
        return WorkerLost(f"{what}: {loss.meaning}" if loss.meaning else what, loss.likely)

    def late(self, asked: Asked) -> str:
        return f"{asked.name} on {self} took longer than its {asked.deadline_s:g} s (run.deadlines)"


class Roster:
    """The run's workers, and by rank once all are there. Who was lost stays outside."""

    def __init__(self, run: str, num_workers: int, code_digest: str) -> None:
        self.run, self.num_workers, self._code_digest = run, num_workers, code_digest
        self.peers: dict[str, Peer] = {}
        """By incarnation."""
        self.by_route: dict[bytes, Peer] = {}
        """Of connections that are open, as far as is known."""
        self.by_rank: list[Peer] = []
        self._fenced: set[str] = set()
        """Incarnations that were lost: what they do no longer counts."""

    @property
    def is_complete(self) -> bool:
        return len(self.peers) == self.num_workers

    def admit(self, peer: Peer) -> str | None:
        """Takes a worker in, or returns why not."""
        if peer.register.incarnation in self._fenced:
            return "it was given up as lost"
        if peer.register.run not in ("", self.run):
            return f"it belongs to the run {peer.register.run}, and this master's is {self.run}"
        if peer.register.code_digest != self._code_digest:
            return "the worker's experiment file differs from the master's: copy the same file to both"
        if self.is_complete:
            return f"the run has its {self.num_workers} workers already"
        self.peers[peer.register.incarnation] = self.by_route[peer.route] = peer
        return None

    def objection(self, sender: Holder | None, message: Message) -> Refuse | None:
        """Why the holder of a key may not send this: each key is for one worker at a time, or for an operator."""
        if sender is None:
            return None
        if isinstance(message, Inquire) != (sender.role is Role.OPERATOR):
            return Refuse(reason=f"the key {sender.name} is not good for the message {message.type}")
        if isinstance(message, Register):
            known = self.peers.get(message.incarnation)
            if known is None:
                known = next((peer for peer in self.peers.values() if peer.holder == sender), None)
                if known is not None:
                    reason = f"the key {sender.name} is in use by {known}"
                    return Refuse(reason=reason, again=True)  # that one may be dead: it is not known at once
            elif known.holder != sender:
                reason = f"the key {sender.name} is not that of {known}, for which it wants to pass"
                return Refuse(reason=reason)
        return None

    def reroute(self, peer: Peer, route: bytes) -> None:
        """The worker has a new connection."""
        self.by_route.pop(peer.route, None)
        self.by_route[route] = peer
        peer.route = route

    def expel(self, peer: Peer) -> bool:
        """Gives a worker up for good; whether it was one still."""
        if self.peers.get(peer.register.incarnation) is not peer:
            return False
        del self.peers[peer.register.incarnation], self.by_route[peer.route]
        self._fenced.add(peer.register.incarnation)
        return True

    def statuses(self, now_s: float) -> tuple[WorkerStatus, ...]:
        """Of all workers that are there, by rank or else as they came."""
        statuses = [peer.status(now_s) for peer in self.peers.values()]
        return tuple(sorted(statuses, key=lambda status: -1 if status.rank is None else status.rank))

    def num_waiting(self) -> dict[int, int]:
        """Requests without a reply, by rank."""
        return {peer.rank: len(peer.pending) for peer in self.peers.values() if peer.rank is not None}

    def assign_ranks(self) -> None:
        """In the order of registration, workers of one host side by side."""
        peers = list(self.peers.values())
        hosts = list(dict.fromkeys(peer.register.host for peer in peers))
        self.by_rank = sorted(peers, key=lambda peer: hosts.index(peer.register.host))
        for rank, peer in enumerate(self.by_rank):
            peer.rank = rank


def raised(where: str, failure: Failure) -> Exception:
    """The error that a worker reported: a user's mistake as itself, anything else as `RemoteError`."""
    if failure.field is not None:
        kind = DataError if failure.kind == DataError.__name__ else ConfigError
        return kind(failure.field, failure.value, failure.rule, failure.cure)
    for telling in (ModelError, RewardError):  # messages that say it all
        if failure.kind == telling.__name__:
            return telling(failure.message)
    return RemoteError(where, failure.kind, failure.message, failure.traceback)
