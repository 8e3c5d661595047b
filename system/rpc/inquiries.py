"""What operators ask of a master, and what it answers: a part of `messages` that they can read without the rest."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from ...api.record import record
from ..service.lifecycle import State


@record
class Refuse:
    type: Literal["refuse"] = "refuse"
    reason: str
    again: bool = False
    """Whether it may be otherwise in a while: a worker that is not in the run then asks again."""


class Order(StrEnum):
    """What a person may ask of a run."""

    STATUS = "status"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    STOP = "stop"
    """After the step that is under way, with a checkpoint."""
    STOP_NOW = "stop_now"


@record
class Inquire:
    """From a command such as `trainmaster status`, which is no worker. Answered by `RunStatus`, or `Refuse`."""

    type: Literal["inquire"] = "inquire"
    order: Order


class WorkerState(StrEnum):
    """What a worker is at, as its master knows it."""

    IDLE = "idle"
    BUSY = "busy"
    UNRESPONSIVE = "unresponsive"
    """Its interpreter lets it say nothing."""


@record
class WorkerStatus:
    rank: int | None
    """None until all workers have come."""
    host: str
    pid: int
    state: WorkerState
    call: str = ""
    """What it is at, as errors would name it."""
    call_s: NonNegativeFloat = 0.0
    heard_s: NonNegativeFloat
    """Since it was heard."""


@record
class RunStatus:
    type: Literal["run_status"] = "run_status"
    run: str
    state: State
    state_s: NonNegativeFloat
    """For how long."""
    up_s: NonNegativeFloat
    epoch: NonNegativeInt
    host: str
    pid: int
    num_workers: int
    workers: tuple[WorkerStatus, ...]
    """Those that are there."""
    step: NonNegativeInt
    """The step that is under way, or was last."""
    num_steps: NonNegativeInt
    values: dict[str, Annotated[float, Field(allow_inf_nan=True)]]
    """Of the last step that was finished."""
