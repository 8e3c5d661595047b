"""A deadline that works even where nothing else does: the kernel ends the process, and it tells where each thread was.

A call that deadlocks, spins, or waits in a library under no time limit cannot be trusted to notice its own deadline,
and a thread that watches it needs the interpreter lock that it may hold. So the deadline is a POSIX interval timer: at
its end SIGALRM has `faulthandler` write the Python stacks of all threads to a file (it takes no lock), then takes its
default action, which ends the process. The master sees the connection close, and finds the stacks.
"""

from __future__ import annotations

import faulthandler
import math
import signal
import threading
import time
from pathlib import Path


class Alarm:
    """One for the whole process: there is one such timer. Made on the main thread, used from any."""

    def __init__(self, stacks: Path) -> None:
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self._file = stacks.open("w")  # open as long as the process lives: the handler writes to its descriptor
        faulthandler.register(signal.SIGALRM, file=self._file, all_threads=True, chain=True)
        self._lock = threading.Lock()
        self._ends_s: list[float] = []
        """Of blocks that have begun."""
        self._armed_s = math.inf
        """The first of them, for which the timer is set; infinite while it is off."""

    def within(self, seconds: float) -> _Block:
        """Ends the process unless the block is left in time."""
        return _Block(self, seconds)

    def begin(self, seconds: float) -> float:
        """Use `within`. Returns the block's deadline, for its `end`."""
        end_s = time.monotonic() + seconds
        with self._lock:
            self._ends_s.append(end_s)
            if end_s < self._armed_s:
                self._arm(end_s)
        return end_s

    def end(self, end_s: float) -> None:
        """Sets the timer anew at once, though the next block will do so again: left on, it could end the process."""
        with self._lock:
            self._ends_s.remove(end_s)
            if not self._ends_s:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                self._armed_s = math.inf
            elif end_s == self._armed_s:
                self._arm(min(self._ends_s))

    def _arm(self, end_s: float) -> None:
        left_s = end_s - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, left_s if left_s > 0 else 1e-6)  # 0 would set it off
        self._armed_s = end_s


class _Block:
    """Not a generator, which takes longer: it surrounds every request."""

    __slots__ = ("_alarm", "_end_s", "_seconds")
    _end_s: float

    def __init__(self, alarm: Alarm, seconds: float) -> None:
        self._alarm, self._seconds = alarm, seconds

    def __enter__(self) -> None:
        self._end_s = self._alarm.begin(self._seconds)

    def __exit__(self, *_: object) -> None:
        self._alarm.end(self._end_s)
