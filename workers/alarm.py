"""A deadline that works even where nothing else does: the kernel ends the process, and it tells where each thread was.

A call that deadlocks, spins, or waits in a library under no time limit cannot be trusted to notice its own deadline,
and a thread that watches it needs the interpreter lock that it may hold. So the deadline is a POSIX interval timer: at
its end SIGALRM has `faulthandler` write the Python stacks of all threads to a file (it takes no lock), then takes its
default action, which ends the process. The master sees the connection close, and finds the stacks.
"""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Alarm:
    """One for the whole process: there is one such timer. Made on the main thread, used from any."""

    def __init__(self, stacks: Path) -> None:
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self._file = stacks.open("w")  # open as long as the process lives: the handler writes to its descriptor
        faulthandler.register(signal.SIGALRM, file=self._file, all_threads=True, chain=True)
        self._lock = threading.Lock()
        self._ends_s: list[float] = []
        self._armed_s: float | None = None

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Ends the process unless the block is left in time."""
        end_s = time.monotonic() + seconds
        with self._lock:
            self._ends_s.append(end_s)
            self._arm()
        try:
            yield
        finally:
            with self._lock:
                self._ends_s.remove(end_s)
                self._arm()

    def _arm(self) -> None:
        first_s = min(self._ends_s, default=None)
        if first_s != self._armed_s:
            left_s = 0.0 if first_s is None else max(first_s - time.monotonic(), 1e-6)  # 0 disarms
            signal.setitimer(signal.ITIMER_REAL, left_s)
            self._armed_s = first_s
