"""Is there room for a model? Asked before any of its weights is read or drawn.

Counts what lasts: weights, gradients, optimizer state. Activations and KV caches come on top, and are for the layout
(pp, recompute) and the microbatches to bound. What was granted counts as taken, though gradients and moments are there
only after a first step.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..api.errors import ModelError

logger = logging.getLogger(__name__)

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a part of a model."""

    num_parameters: int
    num_trained: int
    """Of them."""
    weights: int
    gradients: int
    optimizer: int

    @classmethod
    def of(cls, dtype: torch.dtype, num_parameters: int, num_trained: int) -> Need:
        """Gradients, moments, and masters of what is not float32, are float32, and there for what is trained."""
        return cls(
            num_parameters,
            num_trained,
            weights=num_parameters * dtype.itemsize,
            gradients=num_trained * 4,
            optimizer=num_trained * (8 if dtype is torch.float32 else 12),
        )

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


class Room:
    """What a worker has of its device's memory, or of its host's."""

    def __init__(self, where: str, num_bytes: int) -> None:
        self._where, self._left = where, num_bytes

    @classmethod
    def on(cls, device: torch.device, num_local_workers: int) -> Room:
        """What is free now; workers on a CPU share it evenly."""
        if device.type == "cuda":
            return cls(f"free on {device}", torch.cuda.mem_get_info(device)[0])
        return cls(f"this worker's share (1 of {num_local_workers}) of what is free here", _free() // num_local_workers)

    def take(self, model: str, need: Need) -> None:
        """For parameters that are about to be loaded. Raises ModelError if they do not fit."""
        wanted = need.total
        parts = {"weights": need.weights, "gradients": need.gradients, "optimizer": need.optimizer}
        shown = ", ".join(f"{name} {_gib(each)}" for name, each in parts.items() if each)
        some = f", {need.num_trained:,} of them trained," if 0 < need.num_trained < need.num_parameters else ""
        estimate = f"{model}: {need.num_parameters:,} parameters{some} take {_gib(wanted)} on this worker ({shown})"
        if wanted > self._left:
            raise ModelError(
                f"{estimate}, and activations on top; there are {_gib(max(self._left, 0))}, {self._where}, less what "
                f"other models take. Raise {model}.layout.pp and the number of workers, set {model}.dtype to bfloat16, "
                "or take larger machines"
            )
        self._left -= wanted
        logger.info("%s; %s are left", estimate, _gib(self._left))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def _free() -> int:
    """Bytes of this host's memory that are free for us, containers' limits included."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 2**10)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(int(text) - int(used.read_text()))
    return min(free)
