"""Weighted means of a call, summed over microbatches and then over replicas."""

from __future__ import annotations

import torch
from torch import Tensor

from ...system.rpc.commands import Mean
from ..parallel.groups import Group


class Statistics:
    """Totals and weights by name, in double precision."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, weight: Tensor | float) -> None:
        """Adds to a mean of `total / weight`. Every replica adds the same names."""
        pair = torch.stack([torch.as_tensor(value, device=self._device).detach().double() for value in (total, weight)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def merged(self, group: Group | None) -> dict[str, Mean]:
        """The means over all replicas. Every member of the group calls this."""
        names = sorted(self._sums)
        if not names:
            return {}
        table = torch.stack([self._sums[name] for name in names])  # [names, 2]
        if group is not None:
            group.all_reduce(table)
        return {
            name: Mean(total=total, weight=weight) for name, (total, weight) in zip(names, table.tolist(), strict=True)
        }
