"""Does a stage keep packed sequences apart? Asked of every stage before it is used, exactly and in a moment.

A row of two short sequences runs through the stage, and autograd says what depends on what. A dependence that must not
be is a gradient that is not *exactly* zero, so there is no tolerance to choose:

    second sequence on first        convolutions, recurrences, attention that ignores the batch
    token on a later token          attention that is not causal
    anything on an absent module    per-layer inputs from embeddings, a wrong plan, layers that read other layers

Where one sequence a call is run, only the last two are asked. Also asks that rows are attended to through us, and
learns what layers give, a tensor or a tuple, so that stand-ins give the same; a tuple may hand on nothing but hidden
states. Does not see positions (a model that ignores them passes): the support table compares with whole models.

The cost is a forward pass and two backward passes to the inputs (not to the parameters) over nine tokens.

Shapes: T = 9 tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...api.errors import ModelError
from ...api.model_support import Packing
from .attention import PackedBatch, PackedMask, PackedPass
from .cut import Absent, Inlet, Outlet
from .stage import Stage

NUM_FIRST, NUM_SECOND = 5, 4
_LONGEST_TUPLE = 3
"""The longest that layers of a type of transformers give."""
_OTHER_OUTPUTS = "has layers that give"
_MISFITS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What foreign code raises where it gets other things than it expects."""


def check(stage: Stage) -> None:
    """Raise ModelError, with the model type and the reason, if `stage` cannot run packed sequences.

    Leaves modes, gradients and random number generators as they were.
    """
    name = f"model type {stage.config.model_type!r}"
    modes = {module: module.training for module in stage.modules()}
    stage.eval()
    try:
        reason = _fault_of_what_runs(stage)
    except _MISFITS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if PackedMask.__name__ in str(error):
            raise ModelError(f"{name} computes with its attention mask, of which packed documents have none") from error
        cure = "; set layout.pp and chunks to 1" if stage.num_stages > 1 else ""
        raise ModelError(f"{name} cannot run as stage {stage.index} of {stage.num_stages}: {error}{cure}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if reason is not None:
        raise ModelError(f"{name} {reason}")


def _fault_of_what_runs(stage: Stage) -> str | None:
    """As `_fault`, with stand-ins that give what the layers give: first a tensor, then a tuple of one, of two, ..."""
    if not stage.cut.stand_ins:
        return _fault(stage)
    first_error: Exception | None = None
    first_reason: str | None = None
    for size in range(_LONGEST_TUPLE + 1):
        stage.cut.layers_give(size)
        try:
            reason = _fault(stage)
        except _MISFITS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            first_error = first_error or error
        else:
            if reason is None or not reason.startswith(_OTHER_OUTPUTS):
                return reason
            first_reason = first_reason or reason
    stage.cut.layers_give(0)
    if first_reason is None and first_error is not None:
        raise first_error
    return first_reason


def _fault(stage: Stage) -> str | None:
    """What is wrong, as the end of a sentence that begins with the model's name."""
    device = next(stage.parameters()).device
    current = PackedPass(_batch(stage, device))
    num_tokens = current.batch.num_tokens
    ids = (torch.arange(num_tokens) % stage.config.get_text_config().vocab_size)[None].to(device)  # [1, T]
    source = torch.Generator().manual_seed(0)
    hidden = None
    if not stage.is_first:  # [1, T, H]
        dtype = stage.config.dtype  # not a parameter's: its author may keep that in float32
        assert isinstance(dtype, torch.dtype), "set when a stage is made"
        hidden = torch.randn(1, num_tokens, stage.hidden_size, generator=source).to(device, dtype)
        hidden.requires_grad_()
    with torch.enable_grad(), _watch(stage) as seen:
        out = stage.run(ids, current, hidden)
    if stage.num_stages > 1 and (reason := _misfit(stage, seen, out, ids, hidden)):
        return reason
    if stage.packing is Packing.ROW and current.num_calls.total() < max(1, len(stage.cut.layers)):
        return "has layers that do not attend through transformers' attention interface: they could not be packed"
    inputs = seen.embedded if hidden is None else [hidden]
    if any(each.shape[:2] != ids.shape for each in inputs):
        return "holds tokens in another order than one row after another"
    if stage.packing is Packing.ROW and _reaches(out[:, NUM_FIRST:], inputs, slice(0, NUM_FIRST)):
        return "carries state from one packed sequence into the next; use a model of attention layers only"
    if _reaches(out[:, NUM_FIRST : NUM_FIRST + 1], inputs, slice(NUM_FIRST + 1, None)):
        return "is not causal: its tokens see later ones; use a decoder"
    for name, outputs in seen.stand_ins.items():
        if _reaches(out, outputs, slice(None)):
            where = f"stage {stage.index} of {stage.num_stages}"
            return f"needs {name} on {where}, which another stage owns; set layout.pp and chunks to 1"
    return None


def _batch(stage: Stage, device: torch.device) -> PackedBatch:
    lengths = (NUM_FIRST, NUM_SECOND) if stage.packing is Packing.ROW else (NUM_FIRST + NUM_SECOND,)
    return PackedBatch(lengths, device)


def _misfit(stage: Stage, seen: _Seen, out: Tensor, ids: Tensor, hidden: Tensor | None) -> str | None:
    """Whether layers give something else than stand-ins do, or hand on more than hidden states."""
    size = stage.cut.stand_ins[0].tuple_size
    for given in seen.layer_outputs:
        if type(given) not in ((tuple, list) if size else (Tensor,)):
            return f"{_OTHER_OUTPUTS} {type(given).__name__}, not a tensor; such layers cannot be cut"
        if size and len(given) != size:
            return f"{_OTHER_OUTPUTS} tuples of {len(given)}; such layers cannot be cut"
    if all(other is None for given in seen.layer_outputs for other in given[1:size]):
        return None

    def bare(_module: nn.Module, _args: object, given: tuple[object, ...]) -> tuple[object, ...]:
        return (given[0],) + (None,) * (size - 1)

    with ExitStack() as hooks, torch.no_grad():
        for layer in stage.cut.layers:
            hooks.callback(layer.register_forward_hook(bare).remove)
        try:
            again = stage.run(ids, PackedPass(_batch(stage, ids.device)), hidden)
        except _MISFITS:
            again = None
    if again is None or not torch.equal(again, out):
        return "has layers that hand on more than hidden states; such layers cannot be cut"
    return None


def _reaches(out: Tensor, inputs: list[Tensor], tokens: slice) -> bool:
    """Whether any of `out` depends on these tokens of the inputs [1, T, ...]. NaN in the weights counts as no."""
    if not inputs or not out.requires_grad:
        return False
    # at random: what a layer norm gives always has the same sum
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device)
    gradients = torch.autograd.grad((out.float() * weights).sum(), inputs, allow_unused=True, retain_graph=True)
    return any(grad is not None and bool(grad[:, tokens].nan_to_num().any()) for grad in gradients)


@dataclass
class _Seen:
    """What a forward pass showed."""

    embedded: list[Tensor]
    """Outputs of the first stage's embedding, as leaves."""
    stand_ins: dict[str, list[Tensor]]
    """By name, what passed through modules of other stages."""
    layer_outputs: list[Any]  # whatever a layer gives
    """Of the stage's own layers, in order."""


@contextmanager
def _watch(stage: Stage) -> Iterator[_Seen]:
    """Make a pass visible to autograd."""
    seen = _Seen([], {}, [])

    def as_leaf(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        seen.embedded.append(out.detach().requires_grad_())
        return seen.embedded[-1].clone()  # some models scale it in place

    def as_alias(name: str) -> Any:  # a hook's type is torch's affair
        def hook(module: Absent, _args: object, out: Tensor | tuple[Tensor | None, ...] | None) -> object:
            tensor = out[0] if isinstance(out, tuple) else out
            if tensor is None:
                return None
            alias = tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
            seen.stand_ins.setdefault(name, []).append(alias)
            return module.as_layer(alias.clone())

        return hook

    def note(_module: nn.Module, _args: object, out: object) -> None:
        seen.layer_outputs.append(out)

    with ExitStack() as hooks:
        for name, module in stage.model.named_modules():
            if isinstance(module, Absent) and not isinstance(module, Inlet | Outlet):
                hooks.callback(module.register_forward_hook(as_alias(name)).remove)
        if stage.is_first:
            embedding = stage.model.get_input_embeddings()
            hooks.callback(embedding.register_forward_hook(as_leaf).remove)
        for layer in stage.cut.layers:
            hooks.callback(layer.register_forward_hook(note).remove)
        yield seen
