"""What of a model is trained: all of it, the parameters of some names, or adapters beside it.

    survey    the whole model, on the meta device     does each pattern find a parameter, each target a module?
    need      a stage of it, on the meta device       how many parameters will there be, and how many trained?
    apply     a stage, loaded                         freezes what is not trained; attaches adapters

Invariants: what is not trained has no gradient, no master and no moments, and its values never change. That is so
of parameters that a model's author never trains (`requires_grad=False`: biases of routers), whatever is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..api.errors import ConfigError
from ..api.experiments.base import PlacedModel
from .adapter_files import check_names, read_adapters
from .adapters import Adapters
from .memory import Need
from .models import hf_compat
from .models.stage import Stage


class Trained:
    """The predicate of one shard. `adapters`: of all of its stages, also if they are not trained; None without."""

    def __init__(self, placed: PlacedModel, seed: int) -> None:
        self._placed, lora = placed, placed.model.lora
        self._patterns = [re.compile(pattern) for pattern in placed.model.trainable]
        self.adapters = None if lora is None else Adapters(lora, placed.field, seed)

    def survey(self, model: PreTrainedModel) -> None:
        """Raises ConfigError for what finds nothing in the whole model; ModelError for the adapters of another."""
        tied = hf_compat.tied_names(model)
        names = [name for name, each in model.named_parameters() if name not in tied and each.requires_grad]
        for index, pattern in enumerate(self._patterns):
            if not any(pattern.search(name) for name in names):
                raise ConfigError(
                    f"{self._placed.field}.trainable[{index}]",
                    pattern.pattern,
                    "no parameter that the model can train has such a name",
                    "correct it (names are those of transformers, such as model.layers.0.self_attn.q_proj.weight; a "
                    "tied head has its embedding's), or take it out",
                )
        if self.adapters is not None:
            self.adapters.find(model)
            if self.adapters.lora.path is not None:
                check_names(self.adapters.lora.path, self.adapters.shapes(model))

    def need(self, model: PreTrainedModel, dtype: torch.dtype) -> Need:
        """Of a stage's model, before it is there."""
        tied = hf_compat.tied_names(model)  # not yet one with the embedding
        named = [pair for pair in model.named_parameters() if pair[0] not in tied]
        num_base = sum(parameter.numel() for _, parameter in named)
        if self.adapters is None:
            num_trained = sum(parameter.numel() for name, parameter in named if self._is_trained(name, parameter))
            return Need.of(dtype, num_base, num_trained)
        num_added = sum(rows * columns for rows, columns in self.adapters.shapes(model).values())
        return Need.of(dtype, num_base + num_added, 0 if self._placed.optimizer is None else num_added)

    def apply(self, stage: Stage) -> None:
        """`stage` is float32 if anything of it but adapters is trained."""
        if self._placed.optimizer is not None:
            for name, parameter in stage.model.named_parameters():
                parameter.requires_grad_(self.adapters is None and self._is_trained(name, parameter))
        if self.adapters is not None:
            path, names = self.adapters.lora.path, self.adapters.shapes(stage.model)
            values = {} if path is None else read_adapters(path, tuple(names))
            self.adapters.attach(stage.model, values)

    def _is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        """Of a model's own, as its author made it."""
        if self._placed.optimizer is None or not parameter.requires_grad:
            return False
        return not self._patterns or any(pattern.search(name) for pattern in self._patterns)


def trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of them that take a gradient."""
    return [parameter for parameter in parameters if parameter.requires_grad]
