"""Moving the weights of one model towards another's, each worker its own shard: nothing travels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..api.errors import ModelError


@torch.no_grad()
def blend(
    source: nn.Module,
    target: nn.Module,
    eta: float,
    masters: Mapping[nn.Parameter, nn.Parameter] | None = None,
    averages: dict[Tensor, Tensor] | None = None,
) -> None:
    """`target = eta * source + (1 - eta) * target`, in place and in the target's types.

    Of parameters and buffers alike, by name. With an eta of 1 the target is the source to the bit, and what is equal in
    both stays so with any. Buffers of whole numbers are copied. Raises `ModelError` if names or shapes differ.

    `masters`: more exact values of some of the source's tensors. `averages`: kept by the caller from one time to the
    next, float32 values of those of the target's tensors that are of half precision, whose last bit may be more than
    eta moves.
    """
    masters, averages = masters or {}, {} if averages is None else averages
    given, changed = _tensors(source), _tensors(target)
    _check_alike(given, changed)
    for name, tensor in changed.items():
        if eta == 1 or not tensor.is_floating_point():
            tensor.copy_(given[name])
            averages.pop(tensor, None)
            continue
        value = given[name]
        exact = masters.get(value, value) if isinstance(value, nn.Parameter) else value
        if tensor.itemsize >= torch.float32.itemsize:
            tensor.lerp_(exact.to(tensor.dtype), eta)
            continue
        if tensor not in averages:
            averages[tensor] = tensor.detach().float()
        tensor.copy_(averages[tensor].lerp_(exact.float(), eta))


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
