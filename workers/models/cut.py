"""Cutting any transformers causal language model into pipeline stages, in place and without code per family.

A stage runs the *whole* forward of the original decoder class, with the modules of other stages replaced:

    stage 1 of 3    embed    layer 0  layer 1   layer 2  layer 3   layer 4  layer 5   norm    lm_head
                    Absent   Absent   Inlet     (own)    (own)     Outlet   Absent    Absent  Absent
                                      hands out                    keeps what
                                      received hidden              comes in, to send

so whatever a family does around its layers (scaled embeddings, learned positions, final norm) stays where its author
put it, and nothing is hooked.

Invariants: names of modules and parameters are those of the whole model; a module is kept by exactly one stage, except
a tied embedding (first and last) and what every stage keeps (`Cut.shared`): modules outside of the author's plan and,
where layers read embeddings, the embeddings. Where layers are cut depends on the model, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...api.errors import ConfigError, ModelError
from . import hf_compat


class Absent(nn.Module):
    """Stands for a module that another stage owns.

    Keeps the plain attributes that some models read from their layers, and its parameters with nothing in them, for
    models that read a dtype or a device there. Passes its first float tensor through; an absent embedding, which gets
    none, gives zeros of the right shape, dtype and device.
    """

    tuple_size: int = 0
    """Of a layer: it gives a tuple of so many, of which the first is the hidden states; 0: it gives these alone."""
    embedding: str | None = None
    """Of an absent embedding: the name of its weight, [0, H]."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        plain = (str, int, float, tuple, type(None))
        own = set(self.__dict__)
        self.__dict__.update({k: v for k, v in old.__dict__.items() if isinstance(v, plain) and k not in own})
        for name, parameter in old.named_parameters(recurse=False):
            self.register_buffer(name, parameter.detach().new_empty(0, *parameter.shape[1:]), persistent=False)
        embedding = next((module for module in old.modules() if isinstance(module, nn.Embedding)), None)
        if embedding is not None:
            self.embedding = "weight"
            empty = embedding.weight.detach().new_empty(0, embedding.embedding_dim)
            self.register_buffer(self.embedding, empty, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...] | None:  # stands for any module
        return self.as_layer(self.passed(*args, **kwargs))

    def passed(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """What goes through, by itself."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor
        if not tensors or self.embedding is None:
            return None
        weight = self.get_buffer(self.embedding)
        return weight.new_zeros(*tensors[0].shape, weight.shape[1])

    def as_layer(self, hidden: Tensor | None) -> Tensor | tuple[Tensor | None, ...] | None:
        """Given as the layers of this model give it."""
        if self.tuple_size == 0:
            return hidden
        return (hidden,) + (None,) * (self.tuple_size - 1)


class Inlet(Absent):
    """The absent layer just before a stage's first: its output is the hidden states that were received."""

    received: Tensor | None = None

    def passed(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """[1, T, H]"""
        return self.received


class Outlet(Absent):
    """The absent layer just after a stage's last: its input is what to send on."""

    captured: Tensor | None = None

    def passed(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """[1, T, H]"""
        self.captured = super().passed(*args, **kwargs)
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
    stand_ins: list[Absent]
    """For layers of other stages."""
    inlet: Inlet | None
    outlet: Outlet | None
    shared: list[str]
    """Prefixes (within the model) of parameters that every stage keeps."""
    has_tied_embedding: bool
    """The model's head is its embedding, and this stage holds that embedding."""

    def layers_give(self, tuple_size: int) -> None:
        """Have stand-ins give what the layers around them give: see `Absent.tuple_size`."""
        for stand_in in self.stand_ins:
            stand_in.tuple_size = tuple_size

    def is_shared(self, name: str) -> bool:
        """Whether the parameter of this name (within the model) is one that every stage keeps."""
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in self.shared)


def balanced_split(costs: Sequence[int], num_stages: int, head_cost: int = 0) -> list[tuple[int, int]]:
    """Half-open layer ranges for which the costliest stage is as cheap as can be.

    `costs` are those of the layers, `head_cost` that of what the last stage computes besides. Of several such splits
    it takes the most even one, and of these the one with longer stages first. Raises ConfigError if a stage would have
    no layer.

        balanced_split([1] * 7, 3) == [(0, 3), (3, 5), (5, 7)]
        balanced_split([1] * 8, 2, head_cost=4) == [(0, 6), (6, 8)]
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        rule = f"must be between 1 and the model's {num_layers} layers, for every stage (pp * chunks) needs one"
        raise ConfigError("model.layout.pp", num_stages, rule, f"set it to {num_layers} or less")
    sums = list(accumulate(costs, initial=0))
    sums[-1] += head_cost
    limit = _least(sums, num_stages)
    # best[end]: of all splits of the layers before `end` into the stages so far, the sum of squared costs, and bounds
    best: list[tuple[int, tuple[int, ...]] | None]
    best = [(cost * cost, (0, end)) if end > 0 and cost <= limit else None for end, cost in enumerate(sums)]
    for _ in range(1, num_stages):
        longer: list[tuple[int, tuple[int, ...]] | None] = [None] * (num_layers + 1)
        for end in range(num_layers + 1):
            for start in range(end - 1, 0, -1):
                before, cost = best[start], sums[end] - sums[start]
                if cost > limit:
                    break
                known = longer[end]
                if before is not None and (known is None or before[0] + cost * cost < known[0]):
                    longer[end] = (before[0] + cost * cost, (*before[1], end))
        best = longer
    chosen = best[num_layers]
    assert chosen is not None, "the limit was found by a split"
    return list(pairwise(chosen[1]))


def _least(sums: Sequence[int], num_stages: int) -> int:
    """The cost of the costliest stage, at its least; `sums` are of the layers before each place."""
    num_layers = len(sums) - 1
    least = list(sums)
    for stages in range(2, num_stages + 1):
        least = [
            min((max(least[start], sums[end] - sums[start]) for start in range(stages - 1, end)), default=sums[-1])
            for end in range(num_layers + 1)
        ]
    return least[num_layers]


def layer_costs(layers: Sequence[nn.Module], others: Sequence[nn.Module], num_active: int | None) -> list[int]:
    """Weights that one token is multiplied with: of each layer, then of all the `others` together.

    That is half of the floating-point operations of a token's forward pass, less those of attention scores, which
    layers of one kind share alike. Of stacked experts only the `num_active` that a token is sent to count.
    """

    def cost(module: nn.Module) -> int:
        total = 0
        for parameter in module.parameters():
            size = parameter.numel()
            if parameter.dim() == 3 and num_active is not None:  # [experts, ...]
                size = size // parameter.shape[0] * min(num_active, parameter.shape[0])
            total += size if parameter.dim() > 1 else 0
        return total

    return [cost(layer) for layer in layers] + [sum(cost(module) for module in others)]


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
            f"{type(decoder).__name__} has {len(lists)} lists of layers ({', '.join(lists) or 'none'}) where other "
            "decoders have one; set layout.pp and chunks to 1"
        )
    place = order.index(lists[0])
    before, after = order[:place], order[place + 1 :]
    if not plan:  # opt creates its final norm before its layers
        before = [name for name in before if any(isinstance(m, nn.Embedding) for m in children[name].modules())]
    unplanned = [name for name in with_parameters if name not in (*before, lists[0], *after)]
    unplanned += [name for name, _ in decoder.named_parameters(recurse=False)]
    return Anatomy(decoder, before, lists[0], after, unplanned)


def prune(model: PreTrainedModel, index: int, num_stages: int, embeds_everywhere: bool = False) -> Cut:
    """Replace, in place, what stage `index` of `num_stages` does not own. Works on any device, also meta.

    `embeds_everywhere`: every stage keeps what comes before the layers, for layers that read it.
    """
    if num_stages == 1:
        return _whole(model)
    anatomy = anatomy_of(model)
    decoder, layers = anatomy.decoder, getattr(anatomy.decoder, anatomy.layers)
    heads = [(name, child) for name, child in model.named_children() if all(m is not decoder for m in child.modules())]
    after = [getattr(decoder, name) for name in anatomy.after]
    costs = layer_costs(layers, [*after, *(head for _, head in heads)], hf_compat.num_active_experts(model.config))
    first_layer, end_layer = balanced_split(costs[:-1], num_stages, costs[-1])[index]
    is_first, is_last = index == 0, index == num_stages - 1
    embedding = model.get_input_embeddings()
    is_tied = _ties_head_to(embedding, model)
    if not is_first and not embeds_everywhere:
        for name in anatomy.before:
            _remove(decoder, name, embedding if is_last and is_tied else None)
    for place, layer in enumerate(layers):
        if not first_layer <= place < end_layer:
            stand_in = {first_layer - 1: Inlet, end_layer: Outlet}.get(place, Absent)
            layers[place] = stand_in(layer)
    if not is_last:
        for name in anatomy.after:
            setattr(decoder, name, Absent(getattr(decoder, name)))
        for name, head in heads:
            setattr(model, name, Absent(head))
        hf_compat.untie(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    shared = anatomy.unplanned + (anatomy.before if embeds_everywhere else [])
    return Cut(
        decoder=decoder,
        layers=list(layers[first_layer:end_layer]),
        stand_ins=[layer for layer in layers if isinstance(layer, Absent)],
        inlet=None if is_first else layers[first_layer - 1],
        outlet=None if is_last else layers[end_layer],
        shared=[f"{prefix}.{name}" for name in shared],
        has_tied_embedding=is_tied and (is_first or is_last) and not embeds_everywhere,
    )


def _remove(parent: nn.Module, name: str, kept: nn.Module | None) -> None:
    """Have a stand-in for a child; for what is beside `kept`, if that is in the child."""
    child = getattr(parent, name)
    if child is kept:
        return
    if kept is not None and any(module is kept for module in child.modules()):
        for inner, _ in list(child.named_children()):
            _remove(child, inner, kept)
    else:
        setattr(parent, name, Absent(child))


def _whole(model: PreTrainedModel) -> Cut:
    """Nothing is replaced, so nothing needs to be understood but what the decoder is."""
    decoder = hf_compat.decoder_of(model)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return Cut(
        decoder=decoder,
        layers=list(lists[0]) if len(lists) == 1 else [],
        stand_ins=[],
        inlet=None,
        outlet=None,
        shared=[],
        has_tied_embedding=_name_of(model.get_input_embeddings(), model) in hf_compat.tied_names(model).values(),
    )


def replace_head(model: PreTrainedModel) -> None:
    """Have a model end in `score`, a linear map to one number, as its type's sequence classification does."""
    decoder = hf_compat.decoder_of(model)
    for name, child in list(model.named_children()):
        if all(module is not decoder for module in child.modules()):
            delattr(model, name)
    size, like = model.config.get_text_config().hidden_size, next(decoder.parameters())
    model.score = nn.Linear(size, 1, bias=False, device=like.device, dtype=like.dtype)
    hf_compat.untie(model)


def _ties_head_to(embedding: nn.Module, model: PreTrainedModel) -> bool:
    """Whether the model's head is its embedding. Raises ModelError for any other tie, which a cut would break."""
    ties = hf_compat.tied_names(model)
    if not ties:
        return False
    source = _name_of(embedding, model)
    if set(ties.values()) != {source}:
        tied, to = next((name, value) for name, value in ties.items() if value != source)
        raise ModelError(
            f"{type(model).__name__} ties {tied} to {to}, which may be on another stage; set layout.pp and chunks to 1"
        )
    return True


def _name_of(embedding: nn.Module, model: PreTrainedModel) -> str | None:
    """The name of an embedding's weight."""
    return next((f"{name}.weight" for name, module in model.named_modules() if module is embedding), None)
