"""When a rank's instructions ran: the measured counterpart of `simulate`.

Times are seconds from a moment that all ranks of a pipeline share to within the end of one small collective, so the
clocks of their hosts need not agree.
"""

from __future__ import annotations

import time

import torch


class Clock:
    """Reads nothing unless it is given a device: then it waits for the device's work before each reading."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._origin_s: float | None = None
        self._start_s = 0.0
        self.times: list[tuple[float, float]] = []
        """Start and end of each instruction, in order."""

    def start(self) -> None:
        """An instruction's work begins; called again where it had to wait. The first call is the origin."""
        if self._device is not None:
            now_s = self._now_s()
            self._origin_s = now_s if self._origin_s is None else self._origin_s
            self._start_s = now_s

    def stop(self) -> None:
        if self._device is not None:
            assert self._origin_s is not None, "a stop follows a start"
            self.times.append((self._start_s - self._origin_s, self._now_s() - self._origin_s))

    def _now_s(self) -> float:
        assert self._device is not None, "asked where there is a device"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
