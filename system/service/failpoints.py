"""Named places where a test can make a process fail, by the environment variable TRAINMASTER_FAILPOINT.

worker.save@1           the worker of rank 1 kills itself (SIGKILL) at `worker.save`
worker.save@1=raise     it raises `InjectedFault` there
             =hang      it waits there for ever
             =spin      it computes there for ever, and lets no other thread run
             =stall     the same, for ten seconds
             =stop      it stops itself (SIGSTOP)
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time

STALL_S = 10.0


class InjectedFault(Exception):
    """What an armed failpoint raises."""


def failpoint(name: str, rank: int | None = None) -> None:
    """Does nothing, unless the environment names this place (and this rank)."""
    armed, _, action = os.environ.get("TRAINMASTER_FAILPOINT", "").partition("=")
    if armed not in (name, f"{name}@{rank}"):
        return
    sys.stderr.write(f"failpoint {armed} reached at {time.time():.3f}\n")
    sys.stderr.flush()
    match action:
        case "raise":
            raise InjectedFault(f"the failpoint {armed} is armed")
        case "hang":
            threading.Event().wait()
        case "spin":
            hold_the_interpreter(math.inf)
        case "stall":
            hold_the_interpreter(STALL_S)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case _:
            os.kill(os.getpid(), signal.SIGKILL)


def hold_the_interpreter(seconds: float) -> None:
    """Runs Python without ever handing the interpreter lock to another thread."""
    before_s, end_s = sys.getswitchinterval(), time.monotonic() + seconds
    sys.setswitchinterval(1e6)
    while time.monotonic() < end_s:
        pass
    sys.setswitchinterval(before_s)
