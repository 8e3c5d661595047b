"""Every message of the control plane: one closed union.

    worker                     master
      | -- Register ------------> |      who I am, what I would run
      | <------------ Welcome --- |      your rank, this run's epoch      (or Refuse)
      | <------------ Request --- |      a command with hooks, on a lane
      | -- Reply ---------------> |      a result, or an error with its traceback; to a silent request an error alone
      | <------------- Cancel --- |      nobody waits for that request any more
      | <--------------- Ping --- |      every second, or more seldom with many workers
      | -- Heartbeat -----------> |      at once, if the interpreter lets it; by itself where no ping comes
      | <----------- Shutdown --- |

Requests, replies, cancellations and the shutdown pass through a `Link`: once and in order, over a connection that may
break. The others are said again until they are heard, or do not matter. Every message after the welcome carries its run
and epoch: anything of another life of the master is dropped. Epochs only ever rise.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, TypeAdapter

from ...api.record import message, record
from .commands import Command, Hook, Result, ShardFile
from .inquiries import Inquire, Refuse, RunStatus

Word = Annotated[str, Field(max_length=256, pattern=r"^\P{Cc}*$")]
"""What ends up in logs: short, and on one line."""
HEARTBEAT_S = 1.0
"""Seconds between two pings of a worker, and so between two of its heartbeats; `seldomness` times that with many."""
_PINGED_EACH_S = 64
"""Workers at most: the master hears as many heartbeats. They tell who is unresponsive, which is no loss, and bring
acknowledgements; a connection that closed or fell silent is found without them."""


def seldomness(num_workers: int) -> int:
    """By what heartbeats of one of so many workers are further apart."""
    return max(1, -(-num_workers // _PINGED_EACH_S))


class Lane(StrEnum):
    """A worker executes the requests of one lane one after the other, and its lanes side by side."""

    COMPUTE = "compute"
    TRANSFER = "transfer"
    FUNCTION = "function"


@record
class Register:
    type: Literal["register"] = "register"
    run: Word = ""
    """With `epoch`: where it was welcomed last, if it was; empty for a new worker."""
    epoch: NonNegativeInt = 0
    host: Word
    pid: NonNegativeInt
    incarnation: Word
    """Unique to this process: by it a worker is known again on another connection."""
    address: Word
    """Where other workers can reach this one."""
    devices: Annotated[tuple[Word, ...], Field(max_length=64)] = ()
    """Its host's, such as `cuda:0`; none on a host that has only its CPU."""
    versions: Annotated[dict[Word, Word], Field(max_length=16)]
    """Of Python and of the libraries that numerics depend on."""
    code_digest: Word


def stacks_name(register: Register) -> str:
    """Of the file in the run's `logs/` in which a worker that ends itself at a deadline leaves its stacks."""
    return f"worker-{register.host}-{register.pid}.stacks"


@record
class Executing:
    """A request that a worker is at, and for how long it has been."""

    id: NonNegativeInt
    seconds: NonNegativeFloat


@record
class Heartbeat:
    type: Literal["heartbeat"] = "heartbeat"
    run: str
    epoch: NonNegativeInt
    executing: Annotated[tuple[Executing, ...], Field(max_length=len(Lane))] = ()


@message
class Success:
    type: Literal["success"] = "success"
    result: Result
    files: tuple[ShardFile, ...] = ()
    """Results of the request's `Save` hooks, in order."""


@record
class Failure:
    type: Literal["failure"] = "failure"
    kind: str
    """The exception's class name."""
    message: str
    traceback: str
    field: str | None = None
    """With `value`, `rule` and `cure`: the parts of a `ConfigError`."""
    value: str = ""
    rule: str = ""
    cure: str = ""


@message
class Reply:
    type: Literal["reply"] = "reply"
    run: str
    epoch: NonNegativeInt
    id: NonNegativeInt
    outcome: Annotated[Success | Failure, Field(discriminator="type")]
    seconds: dict[str, NonNegativeFloat]
    """How long the command and each kind of hook took, by their type."""
    is_unasked: bool = False
    """Whether the request was silent: then only a failure is sent."""


@record
class Welcome:
    type: Literal["welcome"] = "welcome"
    run: str
    epoch: NonNegativeInt
    rank: NonNegativeInt
    num_workers: int
    num_local_workers: int
    """Workers on the same host, this one included."""
    overrides: tuple[str, ...]
    """Command-line overrides to apply to the experiment file."""
    experiment_digest: str
    log_directory: str
    log_json: bool = False
    """Whether to log as JSON."""
    is_recorded: bool = False
    """Whether each call's first minibatch is recorded, for `trainmaster doctor`."""
    orphan_s: NonNegativeFloat
    """How long to wait for a master whose connection closed, before ending."""
    silence_s: PositiveFloat
    """How long a connection may be silent."""


@record
class Ping:
    type: Literal["ping"] = "ping"


@message
class Request:
    type: Literal["request"] = "request"
    run: str
    epoch: NonNegativeInt
    id: NonNegativeInt
    lane: Lane
    deadline_s: PositiveFloat
    """From `submitted_s`, hooks included: then it is not begun any more, and a worker that is at it ends itself."""
    submitted_s: float
    """On the master's clock, which the worker knows from the envelopes."""
    step: NonNegativeInt = 0
    """For logs: the step that it belongs to, 0 outside of steps."""
    command: Command
    pre_hooks: tuple[Hook, ...] = ()
    post_hooks: tuple[Hook, ...] = ()
    is_silent: bool = False
    """Whether nobody waits for a reply: there is none but a failure."""


@record
class Cancel:
    """Drop this request if it has not begun. There is no reply."""

    type: Literal["cancel"] = "cancel"
    run: str
    epoch: NonNegativeInt
    id: NonNegativeInt


@record
class Shutdown:
    type: Literal["shutdown"] = "shutdown"
    is_done: bool
    """Whether the run came to its end, rather than failed."""
    reason: str


Message = Annotated[
    Register | Heartbeat | Reply | Welcome | Refuse | Ping | Request | Cancel | Shutdown | Inquire | RunStatus,
    Field(discriminator="type"),
]
MESSAGES: TypeAdapter[Message] = TypeAdapter(Message)
