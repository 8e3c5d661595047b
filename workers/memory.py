"""Is there room for a model? Asked before any of its weights is read or drawn.

Counts what lasts: weights, gradients, optimizer state; and, beside it, the weights as they are while they are made: in
the host's memory, also for a GPU, and in float32 where they are rounded afterwards. Activations and KV caches come on
top, and are for the layout (pp, recompute) and the microbatches to bound. What was granted counts as taken, though
gradients and moments are there only after a first step.
"""

from __future__ import annotations

import gc
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
    """What a worker has of its device's memory, or of its host's. `host`: where stages are made, if not there."""

    def __init__(self, where: str, num_bytes: int, host: Room | None = None) -> None:
        self._where, self._left, self._host = where, num_bytes, host

    @classmethod
    def on(cls, device: torch.device, num_local_workers: int) -> Room:
        """What is free now, of a GPU and of the host, which its workers share evenly.

        What earlier models of this process left behind is let go of first: stages lie in cycles of references, and
        torch keeps blocks of a GPU.
        """
        gc.collect()
        where = f"this worker's share (1 of {num_local_workers}) of what is free here"
        host = cls(where, _free() // num_local_workers)
        if device.type != "cuda":
            return host
        torch.cuda.empty_cache()
        return cls(f"free on {device}", torch.cuda.mem_get_info(device)[0], host)

    def take(self, model: str, need: Need, making: int = 0) -> None:
        """For parameters that are about to be made. Raises ModelError if they do not fit.

        `making`: bytes that are wanted of the host's memory meanwhile.
        """
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
        (self._host or self)._hold(model, need, making)
        self._left -= wanted
        logger.info("%s; %s are left", estimate, _gib(self._left))

    def _hold(self, model: str, need: Need, num_bytes: int) -> None:
        """For a moment."""
        if num_bytes > self._left:
            raise ModelError(
                f"{model}: {need.num_parameters:,} parameters take {_gib(num_bytes)} of the host's memory while they "
                f"are made; there are {_gib(max(self._left, 0))}, {self._where}, less what other models take. Raise "
                f"{model}.layout.pp, have fewer workers on a host, or take larger machines"
            )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def _free() -> int:
    """Bytes of this host's memory that are free for us, containers' limits included."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 2**10)
    limit, used, kinds = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        lines = dict(line.split() for line in kinds.read_text().splitlines()) if kinds.is_file() else {}
        cached = int(lines.get("inactive_file", 0))  # pages of files, given up as soon as memory is wanted
        free.append(int(text) - int(used.read_text()) + cached)
    return min(free)
