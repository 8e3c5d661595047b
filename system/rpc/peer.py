"""A worker as the master knows it: its connection, what it was asked, and what its failures mean."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ...api.errors import ConfigError, DataError, ModelError, RemoteError, RewardError, RunError
from . import codec
from .link import Link
from .messages import Executing, Failure, Register, Success, Welcome


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful reply: its outcome, and seconds by command and hook type."""

    success: Success
    seconds: dict[str, float]


@dataclass(slots=True)
class Pending:
    """A request that waits for its reply."""

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
    link: Link[codec.Body] = field(default_factory=Link)
    welcome: Welcome | None = None
    """What it was told, or is still to hear. A worker sends heartbeats from its welcome on."""
    responsive: bool = True
    gone: asyncio.TimerHandle | None = None
    """Its connection closed, and may come back until then."""
    executing: tuple[Executing, ...] = ()
    """What its last heartbeat said it was at."""
    pending: dict[int, Pending] = field(default_factory=dict)
    lost: RunError | None = None

    def __str__(self) -> str:
        name = "a worker" if self.rank is None else f"worker {self.rank}"
        return f"{name} (pid {self.register.pid} on {self.register.host})"


def late_message(peer: Peer, pending: Pending) -> str:
    return f"{pending.name} on {peer} took longer than its {pending.deadline_s:g} s (run.deadlines)"


def raised(where: str, failure: Failure) -> Exception:
    """The error that a worker reported: a user's mistake as itself, anything else as `RemoteError`."""
    if failure.field is not None:
        kind = DataError if failure.kind == DataError.__name__ else ConfigError
        return kind(failure.field, failure.value, failure.rule, failure.cure)
    for telling in (ModelError, RewardError):  # messages that say it all
        if failure.kind == telling.__name__:
            return telling(failure.message)
    return RemoteError(where, failure.kind, failure.message, failure.traceback)
