"""Stages of half precision, of the types that transformers' own `from_pretrained(dtype=...)` gives.

    read in the model's type                            a checkpoint that is not trained, or has adapters that are
    made in float32 --> rounded to the model's type     all others; gradients stay float32
                    \\-> float32 masters                 of what is trained

Invariants: parameters and buffers that a model's author keeps in float32 stay so (rotary frequencies, routing biases),
all others are of the model's type; weights are those of the float32 model, rounded; gradients of rounded parameters are
accumulated in float32 over microbatches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..api.config import Precision
from .models import hf_compat
from .models.cut import Absent
from .models.stage import Stage


def type_of(precision: Precision) -> torch.dtype:
    """As torch calls it."""
    return {Precision.FLOAT32: torch.float32, Precision.BFLOAT16: torch.bfloat16}[precision]


def round_to(stage: Stage, dtype: torch.dtype, keeps_masters: bool) -> dict[nn.Parameter, Tensor]:
    """Rounds what of a stage is float32, in place. Returns the values before, for `keeps_masters`, by trained
    parameter."""
    masters = {}
    types = hf_compat.tensor_types(stage.model, dtype)
    for name, parameter in stage.model.named_parameters():
        wanted = types.get(name, dtype)  # an adapter is in no model of transformers
        if parameter.dtype is wanted:
            continue
        if keeps_masters and parameter.requires_grad:
            masters[parameter] = parameter.data
        parameter.data = parameter.data.to(wanted)
        parameter.grad_dtype = torch.float32
    for module_name, module in stage.model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                full_name = f"{module_name}.{name}" if module_name else name
                # a stand-in has empty parameters of what it stands for, whose type models go by
                wanted = dtype if isinstance(module, Absent) else types.get(full_name, buffer.dtype)
                setattr(module, name, buffer.to(wanted))
    stage.config.dtype = dtype
    return masters
