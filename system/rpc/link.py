"""One end of the message stream between the master and one worker, over a transport that may drop, repeat, delay and
reorder: what is posted at one end is delivered at the other once, and in order.

    post --> [waiting] --window--> [unacknowledged] ~~ order n ~~> [ahead of its turn] --> delivered
                                          ^~~~~~ received: n ~~~~~~~~~~~~~~'

The sender numbers messages 1, 2, ... and keeps each until the receiver says that it has come so far; what stays
unacknowledged is sent again, at growing intervals. The receiver delivers n after n - 1 and drops what it had before.
At most `WINDOW` messages are under way, so both ends hold a bounded number.

Pure: times and bodies come in, bodies come out. Nothing here touches a socket or a clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

WINDOW = 256
"""The most messages under way, unacknowledged."""
ACKNOWLEDGED = WINDOW // 2
"""Who has received as many, or twice as many, or so on, says so at once."""
RESEND_S = 1.5
"""Until a message is sent again for the first time: longer than the heartbeats that bring acknowledgements."""
MAX_RESEND_S = 12.0
_CLOCK_SAMPLES = 256
"""Four minutes of pings, or more with many workers."""
B = TypeVar("B")


@dataclass(slots=True)
class _Sent(Generic[B]):
    body: B
    again_s: float
    wait_s: float


class MasterClock:
    """The master's monotonic clock, from the times at which it says that it sent its messages.

    The message that took least time tells how the clocks differ; only the last few count, for clocks drift.
    """

    def __init__(self) -> None:
        self._differences: deque[float] = deque(maxlen=_CLOCK_SAMPLES)
        self._difference_s = math.inf

    def note(self, sent_s: float, received_s: float) -> None:
        if not math.isfinite(sent_s):
            return
        if len(self._differences) == _CLOCK_SAMPLES and self._differences[0] == self._difference_s:
            self._difference_s = min(list(self._differences)[1:])
        self._differences.append(received_s - sent_s)
        self._difference_s = min(self._difference_s, self._differences[-1])

    def age(self, time_s: float, now_s: float) -> float:
        """Seconds since the master's clock showed `time_s`."""
        return now_s - self._difference_s - time_s


class Link(Generic[B]):
    """Made anew at both ends for each (epoch, worker)."""

    def __init__(self, seldomness: int = 1) -> None:
        """`seldomness`: by what acknowledgements are further apart, and so is what is sent again."""
        self._resend_s, self._max_resend_s = RESEND_S * seldomness, MAX_RESEND_S * seldomness
        self.received = 0
        """The number of messages delivered: every header tells it to the other end."""
        self._ahead: dict[int, B] = {}
        self._waiting: deque[B] = deque()
        self._unacknowledged: dict[int, _Sent[B]] = {}
        self._num_sent = 0
        self._again_s = math.inf
        """Nothing has to be sent again before."""

    @property
    def is_idle(self) -> bool:
        """Whether all that was posted has arrived."""
        return not self._waiting and not self._unacknowledged

    def post(self, body: B) -> None:
        self._waiting.append(body)

    def is_due(self, now_s: float) -> bool:
        """Whether `due` may have something."""
        return bool(self._waiting) or now_s >= self._again_s

    def due(self, now_s: float) -> list[tuple[int, B]]:
        """What to send now, each with its order: new messages as far as the window allows, and old ones once more."""
        due = self._overdue(now_s) if now_s >= self._again_s else []
        while self._waiting and len(self._unacknowledged) < WINDOW:
            self._num_sent += 1
            body = self._waiting.popleft()
            self._unacknowledged[self._num_sent] = _Sent(body, now_s + self._resend_s, self._resend_s)
            self._again_s = min(self._again_s, now_s + self._resend_s)
            due.append((self._num_sent, body))
        return due

    def _overdue(self, now_s: float) -> list[tuple[int, B]]:
        again = []
        for order, sent in self._unacknowledged.items():
            if now_s >= sent.again_s:
                sent.wait_s = min(2 * sent.wait_s, self._max_resend_s)
                sent.again_s = now_s + sent.wait_s
                again.append((order, sent.body))
        self._again_s = min((sent.again_s for sent in self._unacknowledged.values()), default=math.inf)
        return again

    def acknowledge(self, received: int) -> None:
        """The other end has had this many."""
        while self._unacknowledged and (first := next(iter(self._unacknowledged))) <= received:
            del self._unacknowledged[first]

    def hurry(self) -> None:
        """What is under way is likely lost, with its connection perhaps: it is due at once."""
        self._again_s = 0.0
        for sent in self._unacknowledged.values():
            sent.again_s, sent.wait_s = 0.0, self._resend_s / 2

    def accept(self, order: int, body: B) -> list[B]:
        """A message arrived. Returns what can be delivered now, in order."""
        if not self.received < order <= self.received + WINDOW:
            return []  # had before, or from nobody who keeps to the window
        self._ahead[order] = body
        delivered = []
        while self.received + 1 in self._ahead:
            self.received += 1
            delivered.append(self._ahead.pop(self.received))
        return delivered
