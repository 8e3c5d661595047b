"""A service's life, and where others read of it: `service.json` in the run directory, replaced whole at every change.

    starting --> ready --> running <--> paused
       |           |          |           |
       +-----------+----------+-----------+--> stopping --> stopped
       |           |          |           |       |
       +-----------+----------+-----------+-------+------> failed

`lost` is never entered: it is what others call a service that is gone without having said how it ended.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ...api.record import record
from .claims import owner_of
from .files import write_whole

_FILE = "service.json"


class State(StrEnum):
    STARTING = "starting"
    """Waits for its workers."""
    READY = "ready"
    """All workers are there: groups are formed, data is read, models are loaded."""
    RUNNING = "running"
    PAUSED = "paused"
    """Between two steps, until it is told to go on."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    """At its end, or because it was told to."""
    FAILED = "failed"
    LOST = "lost"

    @property
    def is_final(self) -> bool:
        return self in (State.STOPPED, State.FAILED, State.LOST)


_ENDS = frozenset({State.STOPPING, State.FAILED})
NEXT = {
    State.STARTING: _ENDS | {State.READY},
    State.READY: _ENDS | {State.RUNNING, State.STARTING},
    State.RUNNING: _ENDS | {State.PAUSED, State.STARTING},
    State.PAUSED: _ENDS | {State.RUNNING, State.STARTING},
    State.STOPPING: frozenset({State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset[State](),
    State.FAILED: frozenset[State](),
    State.LOST: frozenset[State](),
}
"""To `starting` again: another epoch's workers are waited for."""


@record
class Entry:
    """What `service.json` says."""

    run: str
    state: State
    since_s: float
    """Wall-clock time at which the state began."""
    started_s: float
    pid: int
    host: str
    address: str
    """Of the master, for workers and for who asks."""
    reason: str = ""
    """Why it ended, if it failed."""


_ENTRIES: TypeAdapter[Entry] = TypeAdapter(Entry)


class Life:
    """One service's own state. Every change is on disk before it is acted upon."""

    def __init__(self, directory: Path, run: str, address: str) -> None:
        now_s = time.time()
        self._directory = directory
        self.entry = Entry(
            run=run,
            state=State.STARTING,
            since_s=now_s,
            started_s=now_s,
            pid=os.getpid(),
            host=socket.gethostname(),
            address=address,
        )
        self._write()

    @property
    def state(self) -> State:
        return self.entry.state

    def enter(self, state: State, reason: str = "") -> None:
        """Changes the state; to enter the one that it is in changes nothing."""
        if state is self.state:
            return
        assert state in NEXT[self.state], f"a service that is {self.state} cannot become {state}"
        self.entry = replace(self.entry, state=state, since_s=time.time(), reason=reason)
        self._write()

    def _write(self) -> None:
        write_whole(self._directory / _FILE, json.dumps(_ENTRIES.dump_python(self.entry, mode="json"), indent=1) + "\n")


def read_entry(directory: Path) -> Entry | None:
    """What a run directory's service says of itself, or `lost` if it is gone; None if it never began."""
    try:
        entry = _ENTRIES.validate_json((directory / _FILE).read_text())
    except (OSError, ValidationError):
        return None
    is_here = entry.host == socket.gethostname()
    if not entry.state.is_final and is_here and owner_of(directory) is None:
        return replace(entry, state=State.LOST)
    return entry
