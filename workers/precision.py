"""Stages of half precision: made in float32 and rounded, so that weights are those of the float32 model.

    made in float32 --> rounded to the model's type, gradients stay float32
                    \\-> float32 masters, for what is trained

Invariants: a parameter that its model's author keeps in float32 stays so, and so do all buffers (rotary frequencies
among them); gradients of rounded parameters are accumulated in float32 over microbatches.
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
    """Rounds a float32 stage in place. Returns the values before, for `keeps_masters`, by trained parameter."""
    masters = {}
    kept = hf_compat.float32_names(stage.model, dtype)
    for name, parameter in stage.model.named_parameters():
        if parameter.dtype is dtype or name in kept:
            continue
        if keeps_masters and parameter.requires_grad:
            masters[parameter] = parameter.data
        parameter.data = parameter.data.to(dtype)
        parameter.grad_dtype = torch.float32
    for module in stage.model.modules():
        if isinstance(module, Absent) and hasattr(module, "weight"):
            module.weight = module.weight.to(dtype)  # it stands for an embedding, whose type decoders go by
    stage.config.dtype = dtype
    return masters
