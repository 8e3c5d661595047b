"""Which device a worker computes on, and with how many threads."""

from __future__ import annotations

import os

import torch


def pick_device(rank: int) -> torch.device:
    """A CUDA device if there is one (workers of a host take turns), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def set_threads(threads: int | None, num_local_workers: int) -> None:
    """Intra-op threads: as asked, else this host's cores shared out among its workers (more would slow them down)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // num_local_workers))
