"""Which device a worker computes on, and with how many threads."""

from __future__ import annotations

import os

import torch

from ..api.errors import ConfigError


def pick_device(rank: int, num_local_workers: int) -> torch.device:
    """A CUDA device of its own if the host has any, else the CPU. Raises `ConfigError` if there are too few."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_devices == 0:
        return torch.device("cpu")
    if num_local_workers > num_devices:
        raise ConfigError(
            "run.workers",
            num_local_workers,
            f"this host has {num_devices} CUDA devices, and each worker needs one",
            "start fewer workers here, or hide the devices (CUDA_VISIBLE_DEVICES=) to run on the CPU",
        )
    device = torch.device("cuda", rank % num_local_workers)
    torch.cuda.set_device(device)
    return device


def set_threads(threads: int | None, num_local_workers: int) -> None:
    """Intra-op threads: as asked, else this host's cores shared out among its workers (more would slow them down)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // num_local_workers))
