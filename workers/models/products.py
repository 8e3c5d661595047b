"""Products with matrices of half precision whose results are float32, for a model's head.

A logit of 20 in bfloat16 is off by up to 0.06, and so would be every log-probability; the matrix itself, and what it is
multiplied by, are as exact as they are.

Shapes: n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)


class float32_products(TorchFunctionMode):
    """Inside, linear modules of half precision give float32. Their gradients are of the types of what they are for, or
    float32 for a parameter that takes such. A layer norm in a head of several products takes and gives its own type."""

    def __torch_function__(
        self,
        func: Callable[..., Any],  # any torch function, with its own arguments
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        if func is F.layer_norm:
            return self._layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if input.dtype not in HALF or weight.dtype is not input.dtype:
            return F.linear(input, weight, bias)
        out = _Product.apply(input, weight)
        assert isinstance(out, Tensor), "what forward gives"
        return out if bias is None else out + bias.float()

    def _layer_norm(
        self,
        input: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        return F.layer_norm(input if weight is None else input.to(weight.dtype), list(shape), weight, bias, eps)


class _Product(torch.autograd.Function):
    """`given @ weight^T`, float32, of half-precision `given` [1, n, in] and `weight` [out, in]."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(given, weight)
        return _product(given.flatten(0, -2), weight.t()).unflatten(0, given.shape[:-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        given, weight = ctx.saved_tensors
        slope = gradient.flatten(0, -2).to(given.dtype)
        for_given = for_weight = None
        if ctx.needs_input_grad[0]:
            for_given = (slope @ weight).view_as(given)
        if ctx.needs_input_grad[1]:
            for_weight = _product(slope.t(), given.flatten(0, -2))  # float32, if the parameter takes such gradients
        return for_given, for_weight


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of two matrices of half precision, accumulated and given in float32."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
