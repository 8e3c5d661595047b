"""Does a stage keep packed sequences apart? Asked of every stage before it is used, exactly and in a moment.

A row of two short sequences runs through the stage, and autograd says what depends on what. A dependence that must not
be is a gradient that is not *exactly* zero, so there is no tolerance to choose:

    second sequence on first        convolutions, recurrences, attention that ignores the batch
    token on a later token          attention that is not causal
    anything on an absent module    per-layer inputs from embeddings, a wrong plan, layers that read other layers

Also asks that every layer attends through us and gives a plain tensor. Does not see positions (a model that ignores
them passes): the tests of each model type compare with whole models for that.

The cost is a forward pass and two backward passes to the inputs (not to the parameters) over nine tokens.

Shapes: T = 9 tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...api.errors import ModelError
from .attention import PackedBatch, PackedPass
from .cut import Absent, Inlet, Outlet
from .stage import Stage

NUM_FIRST, NUM_SECOND = 5, 4


def check(stage: Stage) -> None:
    """Raise ModelError, with the model type and the reason, if `stage` cannot run packed sequences.

    Leaves modes, gradients and random number generators as they were.
    """
    name = f"model type {stage.config.model_type!r}"
    modes = {module: module.training for module in stage.modules()}
    stage.eval()
    try:
        reason = _fault(stage)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        cure = "; set model.layout.pp to 1" if stage.num_stages > 1 else ""
        raise ModelError(f"{name} cannot run as stage {stage.index} of {stage.num_stages}: {error}{cure}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if reason is not None:
        raise ModelError(f"{name} {reason}")


def _fault(stage: Stage) -> str | None:
    """What is wrong, as the end of a sentence that begins with the model's name."""
    parameter = next(stage.parameters())
    current = PackedPass(PackedBatch((NUM_FIRST, NUM_SECOND), parameter.device))
    num_tokens = current.batch.num_tokens
    ids = (torch.arange(num_tokens) % stage.config.get_text_config().vocab_size)[None].to(parameter.device)  # [1, T]
    source = torch.Generator().manual_seed(0)
    hidden = None
    if not stage.is_first:  # [1, T, H]
        hidden = torch.randn(1, num_tokens, stage.hidden_size, generator=source).to(parameter).requires_grad_()
    with torch.enable_grad(), _watch(stage) as (embedded, stand_ins, layer_types):
        out = stage.run(ids, current, hidden)
    if others := layer_types - {Tensor}:
        return f"has layers that give {others.pop().__name__}, not a tensor; such layers cannot be cut"
    if current.num_calls.total() < len(stage.cut.layers):
        return "has layers that do not attend through transformers' attention interface: they could not be packed"
    inputs = embedded if hidden is None else [hidden]
    if _reaches(out[:, NUM_FIRST:], inputs, slice(0, NUM_FIRST)):
        return "carries state from one packed sequence into the next; use a model of attention layers only"
    if _reaches(out[:, NUM_FIRST : NUM_FIRST + 1], inputs, slice(NUM_FIRST + 1, None)):
        return "is not causal: its tokens see later ones; use a decoder"
    for name, outputs in stand_ins.items():
        if _reaches(out, outputs, slice(None)):
            where = f"stage {stage.index} of {stage.num_stages}"
            return f"needs {name} on {where}, which another stage owns; set model.layout.pp to 1"
    return None


def _reaches(out: Tensor, inputs: list[Tensor], tokens: slice) -> bool:
    """Whether any of `out` depends on these tokens of the inputs [1, T, ...]. NaN in the weights counts as no."""
    if not inputs or not out.requires_grad:
        return False
    gradients = torch.autograd.grad(out.float().sum(), inputs, allow_unused=True, retain_graph=True)
    return any(grad is not None and bool(grad[:, tokens].nan_to_num().any()) for grad in gradients)


@contextmanager
def _watch(stage: Stage) -> Iterator[tuple[list[Tensor], dict[str, list[Tensor]], set[type]]]:
    """Make visible to autograd: embeddings (as leaves), and by name what passes through modules of other stages.

    Third come the types that the stage's layers give.
    """
    embedded: list[Tensor] = []
    stand_ins: dict[str, list[Tensor]] = {}
    layer_types: set[type] = set()

    def as_leaf(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1].clone()  # some models scale it in place

    def as_alias(name: str) -> Any:  # a hook's type is torch's affair
        def hook(_module: nn.Module, _args: object, out: Tensor | None) -> Tensor | None:
            if out is None:
                return None
            alias = out.clone() if out.requires_grad else out.detach().requires_grad_()
            stand_ins.setdefault(name, []).append(alias)
            return alias.clone()

        return hook

    def note_type(_module: nn.Module, _args: object, out: object) -> None:
        layer_types.add(type(out))

    with ExitStack() as hooks:
        for name, module in stage.model.named_modules():
            if isinstance(module, Absent) and not isinstance(module, Inlet | Outlet):
                hooks.callback(module.register_forward_hook(as_alias(name)).remove)
        if stage.is_first:
            embedding = stage.model.get_input_embeddings()
            hooks.callback(embedding.register_forward_hook(as_leaf).remove)
        for layer in stage.cut.layers:
            hooks.callback(layer.register_forward_hook(note_type).remove)
        yield embedded, stand_ins, layer_types
