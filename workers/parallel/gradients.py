"""What must be summed over workers before an optimizer step: gradients, and the square of their norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .groups import Group


def all_reduce_gradients(parameters: Sequence[nn.Parameter], group: Group) -> None:
    """Sums gradients over the group, in one message a type.

    A parameter without a gradient counts as zeros. If no member has one it stays without, and an optimizer passes it by
    as it does in one process.

        message of a type    [gradients, flat and in order; for each of them how many members have one]
    """
    gradients = [
        torch.zeros_like(each, dtype=each.grad_dtype) if each.grad is None else each.grad  # float32 for half precision
        for each in parameters
    ]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        pairs = [pair for pair in zip(parameters, gradients, strict=True) if pair[1].dtype == dtype]
        counts = pairs[0][1].new_tensor([parameter.grad is not None for parameter, _ in pairs])
        flat = torch.cat([*(gradient.view(-1) for _, gradient in pairs), counts])
        group.all_reduce(flat)
        *parts, counts = flat.split([*(gradient.numel() for _, gradient in pairs), len(pairs)])
        for (parameter, gradient), part, count in zip(pairs, parts, counts, strict=True):
            gradient.copy_(part.view_as(gradient))
            if parameter.grad is None and count:  # to look at `count` is to wait for the device: only where it matters
                parameter.grad = gradient


def sum_copies(copies: Sequence[Sequence[nn.Parameter]], group: Group | None) -> None:
    """Gives all copies of some parameters the sum of their gradients: those of this rank, and of the group's others.

    `copies`: each as long as the first. Every member of the group has at least one.
    """
    first, *others = copies
    for other in others:
        for parameter, copy in zip(first, other, strict=True):
            if copy.grad is not None:
                parameter.grad = copy.grad if parameter.grad is None else parameter.grad.add_(copy.grad)
    if group is not None:
        all_reduce_gradients(first, group)
    for other in others:
        for parameter, copy in zip(first, other, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.clone()


def squared_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The sum of squares of all gradients, a float32 scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.float() for norm in norms]).square().sum()
