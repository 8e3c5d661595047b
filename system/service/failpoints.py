"""Named places where a test can make a process fail, by the environment variable TRAINMASTER_FAILPOINT.

worker.save@1           the worker of rank 1 kills itself (SIGKILL) at `worker.save`
worker.save@1=raise     it raises `InjectedFault` there
"""

from __future__ import annotations

import os
import signal


class InjectedFault(Exception):
    """What an armed failpoint raises."""


def failpoint(name: str, rank: int | None = None) -> None:
    """Does nothing, unless the environment names this place (and this rank)."""
    armed, _, action = os.environ.get("TRAINMASTER_FAILPOINT", "").partition("=")
    if armed not in (name, f"{name}@{rank}"):
        return
    if action == "raise":
        raise InjectedFault(f"the failpoint {armed} is armed")
    os.kill(os.getpid(), signal.SIGKILL)
