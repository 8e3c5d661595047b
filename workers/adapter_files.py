"""Adapters as peft keeps them, so that `PeftModel.from_pretrained(base, directory)` reads ours and we read its.

    adapter_config.json          r, lora_alpha, target_modules, ...
    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, in]
                                 ...                                              lora_B.weight   [out, r]

Every stage writes a file of its own; the master makes one of them (`system.service.adapter`). Tensors are float32,
whatever the model's type: they are the masters, so going on from them loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..api.errors import ModelError
from ..system.rpc.commands import ShardFile
from ..system.service.adapter import CONFIG, WEIGHTS, name_of_part
from ..system.service.files import sync
from .adapters import Adapters, is_adapter
from .models import integrity
from .models.checkpoint import part_of, shown, write_tensors
from .models.stage import Stage

_PREFIX = "base_model.model."


def write_adapters(stage: Stage, masters: Mapping[nn.Parameter, Tensor], directory: Path) -> ShardFile:
    """Write a stage's adapters into `directory`; nothing, and an empty ShardFile, if it has none.

    `masters`: more exact values of some.
    """
    tensors = {
        _PREFIX + name: masters.get(parameter, parameter).detach().to("cpu", torch.float32).contiguous()
        for name, parameter in stage.own_parameters()
        if is_adapter(name)
    }
    if not tensors:
        return ShardFile()
    name = WEIGHTS if stage.num_stages == 1 else name_of_part(part_of(stage))
    return write_tensors(tensors, directory, name, {"format": "pt"})


def write_adapter_config(adapters: Adapters, base: Path | None, directory: Path) -> None:
    """Write what peft wants to know of adapters on the model in the directory `base`; None: it is in none."""
    lora = adapters.lora
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": adapters.target_modules,
        "fan_in_fan_out": adapters.fan_in_fan_out,
        "bias": "none",
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    sync(directory / CONFIG)


def check_names(directory: Path, wanted: Mapping[str, Sequence[int]]) -> None:
    """Raises ModelError unless the file in `directory` has these adapters, of these shapes, and no others.

    `wanted`: those of the whole model.
    """
    with _opened(directory) as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    names = {_PREFIX + name: list(shape) for name, shape in wanted.items()}
    faults = [f"{name} is missing" for name in names if name not in found]
    faults += [f"{name} is of no use to the model" for name in found if name not in names]
    faults += [
        f"{name} has shape {found[name]} where the model has {shape}"
        for name, shape in names.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise ModelError(
            f"{directory / WEIGHTS} does not fit the model and its lora: {shown(faults)}. Give lora the "
            f"r and the target_modules of {CONFIG} there, and the model the adapter's base"
        )


def read_adapters(directory: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Adapters of these names, float32, in memory of their own. The file is checked first (see `integrity`)."""
    integrity.check(directory)
    integrity.check_digests(directory, [directory / WEIGHTS])
    with _opened(directory) as file:
        return {name: file.get_tensor(_PREFIX + name).float().clone() for name in names}


def _opened(directory: Path) -> safe_open:
    try:
        return safe_open(directory / WEIGHTS, "pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory / WEIGHTS} cannot be read as peft's adapters: {error}") from error
