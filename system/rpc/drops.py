"""Messages that were dropped, told now and then: a flood of them must not fill the log."""

from __future__ import annotations

import logging

INTERVAL_S = 10.0
"""Between two lines."""


class Drops:
    """Pure but for the log: the caller says what time it is."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._silent_until_s = float("-inf")
        self._num_untold = 0
        self.last: str | None = None
        """The last reason."""

    def note(self, reason: str, now_s: float) -> None:
        self.last = reason
        if now_s < self._silent_until_s:
            self._num_untold += 1
            return
        more = f" ({self._num_untold} more before it)" if self._num_untold else ""
        self._logger.warning("dropped a message: %s%s", reason, more)
        self._silent_until_s, self._num_untold = now_s + INTERVAL_S, 0
