"""Moving the weights of one model towards another's, each worker its own shard: nothing travels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..api.errors import ModelError


@torch.no_grad()
def blend(source: nn.Module, target: nn.Module, eta: float) -> None:
    """`target = eta * source + (1 - eta) * target`, in place and in the target's types.

    Of parameters and buffers alike, by name. With an eta of 1 the target is the source to the bit, and what is equal in
    both stays so with any. Buffers of whole numbers are copied. Raises `ModelError` if names or shapes differ.
    """
    given, changed = _tensors(source), _tensors(target)
    _check_alike(given, changed)
    for name, tensor in changed.items():
        if eta == 1 or not tensor.is_floating_point():
            tensor.copy_(given[name])
        else:
            tensor.lerp_(given[name].to(tensor.dtype), eta)


def _check_alike(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name in (*source, *target):
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (source, target)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"a model cannot move towards another: {name} is {shapes[0] or 'missing'} in the source and "
                f"{shapes[1] or 'missing'} in the target; take two models of one config"
            )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tied ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
