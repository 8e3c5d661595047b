"""Gradients of weights apart from those of inputs: what INPUT_GRADIENT leaves for WEIGHT_GRADIENT.

    forward, inside `deferring(store)`   a product with a trained matrix becomes `_Product`
    backward (INPUT_GRADIENT)            gives the gradient of a product's input; leaves (input, gradient) in the store
    `store.run()` (WEIGHT_GRADIENT)      gradient of the matrix += gradient^T input

Nothing is traversed twice, and activations of anything but products are let go at INPUT_GRADIENT. Products hold almost
all of the work with weights; what is not one (embeddings, norms, expert kernels), and the head of a model that is
scored in chunks, has its gradient at once.

Guarantees: after both, `.grad` of every parameter is what one backward would leave, to rounding, also if a parameter is
used twice, in one product and elsewhere (tied embeddings), or not at all. Models are not changed: products are found by
the torch functions that they call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


@dataclass(slots=True)
class Deferred:
    """Of one microbatch on one stage."""

    _products: list[tuple[Tensor, Tensor, Tensor, bool]] = field(default_factory=list)
    """Matrix, input `[n, in]`, gradient of the output `[n, out]`; whether the matrix is `[in, out]`."""

    def add(self, matrix: Tensor, given: Tensor, gradient: Tensor, is_transposed: bool) -> None:
        self._products.append((matrix, given.flatten(0, -2), gradient.flatten(0, -2), is_transposed))

    @torch.no_grad()
    def run(self) -> None:
        """Adds all that was left to `.grad`, and forgets it."""
        for matrix, given, gradient, is_transposed in self._products:
            left, right = (given, gradient) if is_transposed else (gradient, given)
            if matrix.grad is None:
                matrix.grad = (left.t() @ right).to(matrix.grad_dtype)  # float32 for half precision
            elif matrix.grad.dtype is left.dtype:
                matrix.grad.addmm_(left.t(), right)
            else:
                matrix.grad.add_(left.t() @ right)
        self._products.clear()


class deferring(TorchFunctionMode):
    """Inside, what is computed leaves its gradients of matrices in `store`."""

    def __init__(self, store: Deferred) -> None:
        super().__init__()
        self._store = store

    def __torch_function__(
        self,
        func: Callable[..., Any],  # any torch function, with its own arguments
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm and not kwargs and _is_trained_matrix(args[2]):  # gpt2's Conv1D
            bias, given, matrix = args
            return _product(given, matrix, self._store, is_transposed=True) + bias
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _is_trained_matrix(weight):
            return F.linear(input, weight, bias)
        out = _product(input, weight, self._store, is_transposed=False)
        return out if bias is None else out + bias


def _is_trained_matrix(tensor: object) -> bool:
    """What is made from parameters (merged adapters) has a gradient that flows on, at once."""
    return isinstance(tensor, Tensor) and tensor.requires_grad and tensor.is_leaf and tensor.ndim == 2


def _product(given: Tensor, matrix: Tensor, store: Deferred, is_transposed: bool) -> Tensor:
    out = _Product.apply(given, matrix, store, is_transposed)
    assert isinstance(out, Tensor), "what forward gives"
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, matrix: Tensor, store: Deferred, is_transposed: bool) -> Tensor:
        ctx.save_for_backward(given)
        # the parameter itself, whose `.grad` is to be set: a recomputed layer would give back another tensor
        ctx.matrix, ctx.store, ctx.is_transposed = matrix, store, is_transposed
        return given @ matrix if is_transposed else F.linear(given, matrix)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (given,), matrix = ctx.saved_tensors, ctx.matrix
        ctx.store.add(matrix, given.detach(), gradient, ctx.is_transposed)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return gradient @ (matrix.t() if ctx.is_transposed else matrix), None, None, None
