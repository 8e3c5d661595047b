"""Cutting any transformers causal language model into pipeline stages, in place and without code per family.

A stage runs the *whole* forward of the original decoder class, with the modules of other stages replaced:

    stage 1 of 3    embed    layer 0  layer 1   layer 2  layer 3   layer 4  layer 5   norm    lm_head
                    Absent   Absent   Inlet     (own)    (own)     Outlet   Absent    Absent  Absent
                                      hands out                    keeps what
                                      received hidden              comes in, to send

so whatever a family does around its layers (scaled embeddings, learned positions, final norm) stays where its author
put it, and nothing is hooked.

Invariants: names of modules and parameters are those of the whole model; a module is kept by exactly one stage, except
a tied embedding (first and last) and modules outside of the author's plan, which every stage keeps (`Cut.shared`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...api.errors import ConfigError, ModelError
from . import hf_compat


class Absent(nn.Module):
    """Stands for a module that another stage owns.

    Keeps the plain attributes that some models read from their layers. Passes its first float tensor through; an absent
    embedding, which gets none, gives zeros of the right shape, dtype and device.
    """

    weight: Tensor
    """Of an absent embedding: [0, H], for models that read its dtype or device."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        plain = (str, int, float, tuple, type(None))
        own = set(self.__dict__)
        self.__dict__.update({k: v for k, v in old.__dict__.items() if isinstance(v, plain) and k not in own})
        embedding = next((module for module in old.modules() if isinstance(module, nn.Embedding)), None)
        if embedding is not None:
            self.register_buffer(
                "weight", embedding.weight.detach().new_empty(0, embedding.embedding_dim), persistent=False
            )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:  # stands for any module
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor
        if not tensors or "weight" not in self._buffers:
            return None
        return self.weight.new_zeros(*tensors[0].shape, self.weight.shape[1])


class Inlet(Absent):
    """The absent layer just before a stage's first: its output is the hidden states that were received."""

    received: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """[1, T, H]"""
        return self.received


class Outlet(Absent):
    """The absent layer just after a stage's last: its input is what to send on."""

    captured: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """[1, T, H]"""
        self.captured = super().forward(*args, **kwargs)
        return self.captured


@dataclass(frozen=True)
class Anatomy:
    """What a decoder consists of, by names of its children."""

    decoder: PreTrainedModel
    before: list[str]
    """Modules that come before the layers, with parameters: embeddings."""
    layers: str
    """The list of layers."""
    after: list[str]
    """Modules that come after the layers: the final norm."""
    unplanned: list[str]
    """Children and parameters outside of the author's plan: used nobody knows when, so every stage keeps them."""


@dataclass(frozen=True)
class Cut:
    """A pruned model: what `Stage` needs to run it. Holds modules without owning them."""

    decoder: PreTrainedModel
    layers: list[nn.Module]
    """This stage's own."""
    inlet: Inlet | None
    outlet: Outlet | None
    shared: list[str]
    """Prefixes (within the model) of parameters that every stage keeps."""
    has_tied_embedding: bool
    """The model's head is its embedding, and this stage holds that embedding."""

    def is_shared(self, name: str) -> bool:
        """Whether the parameter of this name (within the model) is one that every stage keeps."""
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in self.shared)


def balanced_split(num_layers: int, num_stages: int) -> list[tuple[int, int]]:
    """Half-open layer ranges of equal size, the first ones longer by one where it does not divide.

    The last stage also computes the head, so it is never among the longer ones. Raises ConfigError if a stage would
    have no layer.

        balanced_split(7, 3) == [(0, 3), (3, 5), (5, 7)]
    """
    if not 1 <= num_stages <= num_layers:
        rule = f"must be between 1 and the model's {num_layers} layers, for every stage (pp * chunks) needs one"
        raise ConfigError("model.layout.pp", num_stages, rule, f"set it to {num_layers} or less")
    short, num_longer = divmod(num_layers, num_stages)
    bounds = [stage * short + min(stage, num_longer) for stage in range(num_stages + 1)]
    return list(pairwise(bounds))


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Find the layers and what is around them: from the author's pipeline plan, else from the order of children."""
    decoder = hf_compat.decoder_of(model)
    children = dict(decoder.named_children())
    with_parameters = [name for name, child in children.items() if next(child.parameters(), None) is not None]
    plan = [name for name in hf_compat.pipeline_plan(decoder) if name in children]
    order = plan or with_parameters
    lists = [name for name in order if isinstance(children[name], nn.ModuleList)]
    if len(lists) != 1:
        raise ModelError(
            f"{type(decoder).__name__} has {len(lists)} lists of layers ({', '.join(lists) or 'none'}) where a "
            "decoder-only model has one, so it cannot be cut into stages"
        )
    place = order.index(lists[0])
    before, after = order[:place], order[place + 1 :]
    if not plan:  # opt creates its final norm before its layers
        before = [name for name in before if any(isinstance(m, nn.Embedding) for m in children[name].modules())]
    unplanned = [name for name in with_parameters if name not in (*before, lists[0], *after)]
    unplanned += [name for name, _ in decoder.named_parameters(recurse=False)]
    return Anatomy(decoder, before, lists[0], after, unplanned)


def prune(model: PreTrainedModel, index: int, num_stages: int) -> Cut:
    """Replace, in place, what stage `index` of `num_stages` does not own. Works on any device, also meta."""
    anatomy = anatomy_of(model)
    decoder, layers = anatomy.decoder, getattr(anatomy.decoder, anatomy.layers)
    first_layer, end_layer = balanced_split(len(layers), num_stages)[index]
    is_first, is_last = index == 0, index == num_stages - 1
    embedding = model.get_input_embeddings()
    is_tied = _ties_head_to(embedding, model)
    if not is_first:
        for name in anatomy.before:
            child = getattr(decoder, name)
            if not (is_last and is_tied and any(module is embedding for module in child.modules())):
                setattr(decoder, name, Absent(child))
    for place, layer in enumerate(layers):
        if not first_layer <= place < end_layer:
            stand_in = {first_layer - 1: Inlet, end_layer: Outlet}.get(place, Absent)
            layers[place] = stand_in(layer)
    if not is_last:
        for name in anatomy.after:
            setattr(decoder, name, Absent(getattr(decoder, name)))
        for name, child in list(model.named_children()):  # the head
            if all(module is not decoder for module in child.modules()):
                setattr(model, name, Absent(child))
        hf_compat.untie(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return Cut(
        decoder=decoder,
        layers=list(layers[first_layer:end_layer]),
        inlet=None if is_first else layers[first_layer - 1],
        outlet=None if is_last else layers[end_layer],
        shared=[f"{prefix}.{name}" for name in anatomy.unplanned],
        has_tied_embedding=is_tied and (is_first or is_last),
    )


def _ties_head_to(embedding: nn.Module, model: PreTrainedModel) -> bool:
    """Whether the model's head is its embedding. Raises ModelError for any other tie, which a cut would break."""
    ties = hf_compat.tied_names(model)
    if not ties:
        return False
    source = next((f"{name}.weight" for name, module in model.named_modules() if module is embedding), None)
    if set(ties.values()) != {source}:
        raise ModelError(f"{type(model).__name__} ties {ties}; only a head that is tied to the embedding can be cut")
    return True
