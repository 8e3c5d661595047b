"""LoRA: trained products of low rank beside frozen linear modules, in place.

    q_proj  (nn.Linear, or transformers' Conv1D)      y = W x + b + scale * B A dropout(x)
      weight, bias       as they were, frozen
      lora_A.weight      [r, in]    random, from run's seed and name: the same in any layout
      lora_B.weight      [out, r]   zeros

A module keeps its class and the names of its parameters; only its `forward` is another. So stages, ties and split
gradients know nothing of adapters: `lora_A` and `lora_B` are linear modules like any other. Names and first values are
peft's (0.21, `tuners/lora/layer.py`).

Invariants: an adapter that was never trained changes no output; `off()` leaves the model without adapters, to the bit.

Does not: read or write files (`adapter_files`), or decide what is trained (`trained`).

Shapes: r the rank, in and out the features of a module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..api.config import ALL_LINEAR, LoRA
from ..api.errors import ConfigError
from .models import hf_compat
from .seeding import seed_of

A, B = "lora_A", "lora_B"
_TAKEN_FOR_EXPERTS: Mapping[str | None, frozenset[str]] = {
    "mixtral": frozenset(("gate", "w1", "w2", "w3")),
    "qwen2_moe": frozenset(("gate", "gate_proj", "up_proj", "down_proj")),
}
"""By the type that a model is converted like: ends of names that peft (0.21, `_MOE_TARGET_MODULE_MAPPING`) reads as
those of experts, which are fused now, wherever they stand: in dense layers and in shared experts, too."""


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is an adapter's."""
    return name.endswith((f".{A}.weight", f".{B}.weight"))


class Adapters:
    """The adapters of one shard, over all of its stages. `find`, then `attach` for each stage.

    `targets`: names of modules of the whole model that have one; `target_modules`: what finds the same for peft;
    `fan_in_fan_out`: whether these keep their matrices as `[in, out]` (peft's word).
    """

    def __init__(self, lora: LoRA, field: str, seed: int) -> None:
        """`field`: the model's, for errors; `seed`: the run's."""
        self.lora, self._field, self._seed = lora, field, seed
        self._are_on = True
        self.targets: frozenset[str] = frozenset()
        self.target_modules = lora.target_modules
        self.fan_in_fan_out = False

    def find(self, model: PreTrainedModel) -> None:
        """Choose the targets in a whole model. Raises ConfigError for what finds none, or what can have no adapter."""
        modules = dict(model.named_modules())
        self.targets = frozenset(self._chosen(model, modules))
        tied = hf_compat.tied_names(model)
        for name in sorted(self.targets):
            kind = type(modules[name]).__name__
            if not _is_linear(modules[name]):
                raise self._refusal(name, f"is a {kind}, and adapters are for linear modules", "name others")
            if name.rpartition(".")[2] in _experts(model):
                rule = "has a name that peft takes for an expert's in models of this type: it would misread the adapter"
                raise self._refusal(name, rule, "leave it out")
            if f"{name}.weight" in tied:
                rule = "is tied to the embedding, which an adapter would part it from"
                raise self._refusal(name, rule, "leave it out")
        kinds = {isinstance(modules[name], Conv1D) for name in self.targets}
        if len(kinds) > 1:
            raise self._refusal("both Linear and Conv1D", "peft's format has one kind in a model", "name those of one")
        self.fan_in_fan_out = True in kinds
        if self.lora.target_modules == ALL_LINEAR:  # peft's also takes modules that make more of a linear one
            ends = {name.rpartition(".")[2] for name in self.targets}
            alike = {name for name in modules if any(_is_called(name, end) for end in ends)}
            self.target_modules = tuple(sorted(ends if alike == self.targets else self.targets))

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Of adapters, by their names, for those targets that a model holds: it may be on the meta device."""
        shapes = {}
        for name, module in self._held(model):
            rows, columns = module.get_parameter("weight").shape
            num_in, num_out = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
            shapes[f"{name}.{A}.weight"] = (self.lora.r, num_in)
            shapes[f"{name}.{B}.weight"] = (num_out, self.lora.r)
        return shapes

    def attach(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Put adapters, float32, beside the targets that a model holds: with these values, or as they begin."""
        shapes = self.shapes(model)
        for name, module in list(self._held(model)):
            for part in (A, B):
                full_name = f"{name}.{part}.weight"
                num_out, num_in = shapes[full_name]
                linear = skip_init(nn.Linear, num_in, num_out, bias=False)
                value = values[full_name] if full_name in values else self._start(full_name, shapes[full_name])
                with torch.no_grad():
                    linear.weight.copy_(value)
                module.add_module(part, linear.to(module.get_parameter("weight").device))
            # an attribute of the instance: the module keeps its class, its name and its parameters
            module.forward = partial(self._run, module, module.forward)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is as it would be without adapters."""
        before, self._are_on = self._are_on, False
        try:
            yield
        finally:
            self._are_on = before

    @torch.no_grad()
    def merged(self, model: nn.Module) -> dict[str, Tensor]:
        """The state of a model without adapters that computes the same: `W + scale * B A` for W."""
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if not is_adapter(name)}
        for name, module in self._held(model):
            low, high = (module.get_parameter(f"{part}.weight") for part in (A, B))
            change = self.lora.scale * (high @ low)
            state[f"{name}.weight"] += change.t() if isinstance(module, Conv1D) else change
        return state

    def _run(self, module: nn.Module, forward: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        out = forward(given)
        if not self._are_on:
            return out
        if module.training and self.lora.lora_dropout:
            given = F.dropout(given, self.lora.lora_dropout)
        low = module.get_submodule(A)(given)  # [..., r]; float32 in a head of half precision
        added: Tensor = module.get_submodule(B)((self.lora.scale * low).to(given.dtype))
        return out + added

    def _held(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Targets that a model holds; what another stage owns is no linear module here."""
        for name, module in model.named_modules():
            if name in self.targets and _is_linear(module):
                yield name, module

    def _start(self, name: str, shape: tuple[int, int]) -> Tensor:
        values = torch.zeros(shape)
        if name.endswith(f".{A}.weight"):
            generator = torch.Generator().manual_seed(seed_of(self._seed, name))
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        return values

    def _chosen(self, model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> list[str]:
        """Names of targets, at least one."""
        wanted = self.lora.target_modules
        if wanted == ALL_LINEAR:
            decoder = set(hf_compat.decoder_of(model).modules())  # the model without its head
            linear = [name for name, each in modules.items() if each in decoder and _is_linear(each)]
            found = [name for name in linear if name.rpartition(".")[2] not in _experts(model)]
        elif isinstance(wanted, str):
            found = [name for name in modules if re.fullmatch(wanted, name)]
        else:
            found = [name for name in modules if any(_is_called(name, each) for each in wanted)]
            for each in wanted:
                if not any(_is_called(name, each) for name in found):
                    raise self._refusal(each, "no module of the model has this name", "correct it, or leave it out")
        if not found:
            cure = "correct it: one text is a pattern for the whole name; of several names, each may be its end"
            raise self._refusal(wanted, "no module of the model has such a name", cure)
        return found

    def _refusal(self, value: object, rule: str, cure: str) -> ConfigError:
        cure += " (names are those of the model's modules in transformers, such as model.layers.0.self_attn.q_proj)"
        return ConfigError(f"{self._field}.lora.target_modules", value, rule, cure)


def _is_linear(module: nn.Module) -> bool:
    """And computes no more than that: a router may be a linear module with a forward of its own."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _experts(model: PreTrainedModel) -> frozenset[str]:
    return _TAKEN_FOR_EXPERTS.get(hf_compat.conversion_type(model.config), frozenset())


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
