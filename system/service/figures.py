"""What a master and a worker say of themselves to operators: health and figures. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pydantic import Field

from ...api.record import record
from ..rpc.inquiries import RunStatus, WorkerState
from ..rpc.messages import Lane
from .health import Health, Kind, Metric, Sample
from .lifecycle import State

_READY = (State.READY, State.RUNNING, State.PAUSED)
_UNWELL = (State.FAILED, State.LOST)
_SECONDS = "seconds/"
_Labelled = Iterable[tuple[float, dict[str, str]]]
"""Values of a metric, with their labels."""


def health_of(
    status: RunStatus,
    num_tokens: int | None = None,
    num_waiting: Mapping[int, int] | None = None,
    num_refused: int | None = None,
) -> Health:
    """A master's health. That a worker hangs, or is missing, does not make its master unwell: see the metrics."""
    reason = "" if status.state == State.RUNNING else f"{status.state} for {status.state_s:.0f} s"
    if status.state == State.STARTING:
        reason += f", {len(status.workers)} of {status.num_workers} workers are there"
    return Health(
        is_well=status.state not in _UNWELL,
        is_ready=status.state in _READY,
        reason=reason,
        metrics=metrics_of(status, num_tokens, num_waiting, num_refused),
    )


def metrics_of(
    status: RunStatus,
    num_tokens: int | None = None,
    num_waiting: Mapping[int, int] | None = None,
    num_refused: int | None = None,
) -> tuple[Metric, ...]:
    """A master's figures. Pure.

    `num_tokens` counts all tokens of finished steps, `num_waiting` requests that wait for replies, by rank,
    `num_refused` connections of strangers: a status does not say them, and without them their metrics are left out.
    """
    run = {"run": status.run}
    states = ((status.state == state, run | {"state": str(state)}) for state in State if state is not State.LOST)
    parts = {name: value for name, value in status.values.items() if name.startswith(_SECONDS)}
    others = {name: value for name, value in status.values.items() if name not in parts}
    taken = ((value, run | {"part": name.removeprefix(_SECONDS)}) for name, value in parts.items())
    figures = [
        _metric("up_seconds", "Since the service started.", [(status.up_s, run)]),
        _metric("state", "1 for the state that the run is in.", states),
        _metric("state_seconds", "Since the run entered its state.", [(status.state_s, run)]),
        _metric("epoch", "Rises with each new set of workers, and with each new master.", [(status.epoch, run)]),
        _metric("workers", "Workers that are there.", [(len(status.workers), run)]),
        _metric("workers_needed", "Workers that the run needs.", [(status.num_workers, run)]),
        _metric("step", "The step that is under way, or was last.", [(status.step, run)]),
        _metric("num_steps", "Steps of the whole run; 0 before the first.", [(status.num_steps, run)]),
        _metric("last_step_seconds", "Of the last step, of each CALL in it, and of its hooks (CALL/HOOK).", taken),
        _metric(
            "last_step_value",
            "All other figures of the last step, as TensorBoard names them.",
            ((value, run | {"name": name}) for name, value in others.items()),
        ),
        *_worker_metrics(status, run, num_waiting),
    ]
    if num_tokens is not None:
        figures.append(_metric("tokens_total", "Tokens of finished steps.", [(num_tokens, run)], Kind.COUNTER))
    if num_refused is not None:
        text = "Connections of strangers, which were not let in; 0 where there are no keys."
        figures.append(_metric("connections_refused_total", text, [(num_refused, run)], Kind.COUNTER))
    return tuple(figures)


def _worker_metrics(status: RunStatus, run: dict[str, str], num_waiting: Mapping[int, int] | None) -> Iterator[Metric]:
    names = [f"pid {worker.pid}" if worker.rank is None else str(worker.rank) for worker in status.workers]
    labelled = [
        (worker, run | {"worker": name, "host": worker.host})
        for name, worker in zip(names, status.workers, strict=True)
    ]
    yield _metric(
        "worker_state",
        "1 for the state that the worker is in, as its master knows it.",
        ((worker.state == state, own | {"state": str(state)}) for worker, own in labelled for state in WorkerState),
    )
    heard = ((worker.heard_s, own) for worker, own in labelled)
    yield _metric("worker_heard_seconds", "Since the master heard of the worker.", heard)
    at = ((worker.call_s, own) for worker, own in labelled)
    yield _metric("worker_call_seconds", "For how long the worker has been at its call; 0 if it is at none.", at)
    if num_waiting is not None:
        waiting = (
            (num_waiting[worker.rank], own)
            for worker, own in labelled
            if worker.rank is not None and worker.rank in num_waiting
        )
        yield _metric("worker_waiting", "Requests to the worker without a reply, the one it is at included.", waiting)


# -- a worker's figures -----------------------------------------------------------------------------------------------


@record
class Executed:
    """What a worker has done so far on one lane, of one type of command."""

    lane: Lane
    command: str
    num_requests: int
    num_failed: int = 0
    seconds: float
    """Of all of them, hooks included."""


@record
class AtRequest:
    """What a lane is at, and for how long."""

    lane: Lane
    command: str
    seconds: float


@record
class WorkerFigures:
    """What a worker says of itself."""

    run: str = ""
    """With `rank` and `epoch`: from its last welcome."""
    rank: int | None = None
    epoch: int = 0
    is_connected: bool
    """Whether the master was heard on the connection that is open."""
    up_s: float
    executed: tuple[Executed, ...] = ()
    """One for each pair of lane and command."""
    executing: tuple[AtRequest, ...] = ()
    """One for each lane that is at something."""
    num_waiting: dict[Lane, int] = Field(default_factory=dict)
    """Requests in each lane's queue that have not begun."""


def health_of_worker(figures: WorkerFigures) -> Health:
    """A worker without its master is well (it ends itself when it has waited too long), but not ready."""
    is_ready = figures.is_connected and figures.rank is not None
    reason = "" if is_ready else "waits for its master's welcome" if figures.is_connected else "hears no master"
    return Health(is_well=True, is_ready=is_ready, reason=reason, metrics=metrics_of_worker(figures))


def metrics_of_worker(figures: WorkerFigures) -> tuple[Metric, ...]:
    """A worker's own figures. Pure."""
    own = {"run": figures.run, "worker": "" if figures.rank is None else str(figures.rank)}

    def on(at: Executed | AtRequest) -> dict[str, str]:
        return own | {"lane": str(at.lane), "command": at.command}

    num_requests = ((done.num_requests, on(done)) for done in figures.executed)
    num_failed = ((done.num_failed, on(done)) for done in figures.executed)
    seconds = ((done.seconds, on(done)) for done in figures.executed)
    waiting = ((count, own | {"lane": str(lane)}) for lane, count in figures.num_waiting.items())
    return (
        _metric("up_seconds", "Since the service started.", [(figures.up_s, own)]),
        _metric("connected", "1 while the worker hears its master.", [(figures.is_connected, own)]),
        _metric("epoch", "Of the master's last welcome; 0 before the first.", [(figures.epoch, own)]),
        _metric("requests_total", "Requests executed.", num_requests, Kind.COUNTER),
        _metric("requests_failed_total", "Those of them that raised.", num_failed, Kind.COUNTER),
        _metric("request_seconds_total", "Seconds that they took.", seconds, Kind.COUNTER),
        _metric(
            "executing_seconds",
            "For how long a lane has been at a request.",
            ((at.seconds, on(at)) for at in figures.executing),
        ),
        _metric("waiting", "Requests in a lane's queue that have not begun.", waiting),
    )


def _metric(name: str, text: str, values: _Labelled, kind: Kind = Kind.GAUGE) -> Metric:
    samples = tuple(Sample(value=value, labels=labels) for value, labels in values)
    return Metric(name=f"trainmaster_{name}", help=text, kind=kind, samples=samples)
