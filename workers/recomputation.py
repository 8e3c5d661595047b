"""Layers that compute their activations again in the backward instead of keeping them.

    none         all that autograd saves is kept
    selective    outputs of products and of attention are kept; norms, activation functions, rotations are made again
    full         a layer's input is kept; the backward runs one layer at a time again

`Recompute.STAGE` is none of this module's: it is a pass over the pipeline's program (`pipeline/lowering.py`).

Invariants: a recomputation draws the random numbers of its forward, and stands under the same torch-function modes
(those of `pipeline/apart.py`); nothing changes in the results, nor where no gradients are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..api.config import Recompute
from ..api.errors import ModelError

_PRODUCTS = frozenset(
    ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "aten::_grouped_mm")
)
_Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]
"""Of the forward, and of its recomputation."""


def recompute_layers(layers: Sequence[nn.Module], recompute: Recompute) -> None:
    """Has a stage's layers recompute what they do not keep, from now on, whenever they are trained.

    Raises ModelError if there are none: of a model whose layers are in no list, or in several.
    """
    if recompute in (Recompute.NONE, Recompute.STAGE):
        return
    if not layers:
        raise ModelError(
            f"layout.recompute = {recompute.value}: this model has not one list of layers, as others have, so none "
            "could compute again; set layout.recompute to none or stage"
        )
    for layer in layers:
        # an attribute of the instance: the layer keeps its class, its names and its parameters
        layer.forward = partial(_run, layer.forward, recompute is Recompute.SELECTIVE)


def _run(forward: Callable[..., Any], is_selective: bool, *args: Any, **kwargs: Any) -> Any:  # a foreign layer's
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, is_selective), **kwargs)


def _contexts(is_selective: bool) -> _Contexts:
    modes = tuple(_get_current_function_mode_stack())
    if not is_selective:
        return ExitStack(), _under(modes)
    first, again = create_selective_checkpoint_contexts(_policy)
    return first, _under(modes, again)


@contextmanager
def _under(modes: Sequence[TorchFunctionMode], *others: AbstractContextManager[object]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in (*modes, *others):
            stack.enter_context(context)
        yield


def _policy(_context: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # any operator's
    name = operator.name().split(".")[0]
    is_kept = name in _PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
