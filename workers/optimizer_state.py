"""The state of an optimizer as files in a checkpoint, and back into any layout.

    step-40/optimizer/00001-of-00002.safetensors, ...     a file a stage, by whoever wrote its weights
        model.norm.weight.exp_avg, .exp_avg_sq            AdamW's, shaped like the parameter
                         .step                            []; alone, and 0, if no gradient ever reached the parameter
                         .master                          float32, of a parameter of another type

Names are those of parameters in the whole model, so each stage of any cut finds its own. What several stages hold is
written by the first of them and read by all.

The version, in every file's metadata, is also all that there is to know of random numbers: a training draws them by
run's seed, model, version, replica, stage and microbatch (see `ModelShard.train`), and keeps none.

Shapes: those of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..api.errors import ModelError
from ..system.rpc.commands import ShardFile
from .models import integrity
from .models.checkpoint import part_of, write_tensors
from .models.stage import Stage
from .optimizer import ShardOptimizer

FOLDER = "optimizer"
_MASTER, _STEP, _VERSION = "master", "step", "version"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def write_state(stage: Stage, optimizer: ShardOptimizer, version: int, directory: Path) -> ShardFile:
    """Writes a stage's part into the checkpoint `directory`. `version`: optimizer steps behind the weights."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in stage.own_parameters():
        if parameter not in optimizer.masters:  # it is not trained
            continue
        master = optimizer.masters[parameter]
        kept = {_STEP: torch.zeros(()), **optimizer.adamw.state.get(master, {})}
        if master is not parameter:
            kept[_MASTER] = master
        tensors |= {f"{name}.{key}": tensor.detach().cpu().contiguous() for key, tensor in kept.items()}
    return write_tensors(tensors, directory, f"{FOLDER}/{part_of(stage)}.safetensors", {_VERSION: str(version)})


def read_state(stages: Sequence[Stage], optimizer: ShardOptimizer, directory: Path) -> int:
    """Gives an optimizer of these stages the state that is in the checkpoint `directory`. Returns its version.

    Raises ModelError for a directory that holds none, or another's, or is damaged, and for a parameter without a state
    of its shape.
    """
    integrity.check(directory, FOLDER)
    files = sorted((directory / FOLDER).glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{directory} holds no state of an optimizer ({FOLDER}/*.safetensors); take a checkpoint of a run with "
            "run.save_optimizer, or leave optimizer.state out"
        )
    kept, version = _keys_by_name(files)
    own = {name for stage in stages for name, _ in stage.model.named_parameters()}
    integrity.check_digests(directory, {file for name in own & kept.keys() for file in kept[name].values()})
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            if parameter not in optimizer.masters:
                continue
            if name not in kept:
                raise ModelError(
                    f"{directory / FOLDER} has no state of {name}: it was not trained there, or the model is another. "
                    "Train what was trained then (trainable, lora), or leave optimizer.state out"
                )
            _give(optimizer, name, parameter, kept[name])
    return version


def _keys_by_name(files: Sequence[Path]) -> tuple[dict[str, dict[str, Path]], int]:
    """By parameter: what is kept of it, and in which file. And the version."""
    kept: dict[str, dict[str, Path]] = {}
    versions = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            versions.add(_version_of(file, opened.metadata()))
            for full_name in opened.keys():  # noqa: SIM118  # no dict
                name, _, key = full_name.rpartition(".")
                kept.setdefault(name, {})[key] = file
    folder = files[0].parent
    if len(versions) > 1:
        raise ModelError(f"{folder} holds states after {sorted(versions)} steps: files of several checkpoints")
    num_parts = {int(file.stem.rpartition("-of-")[2]) for file in files}
    wanted = {f"{at:05d}-of-{number:05d}.safetensors" for number in num_parts for at in range(1, number + 1)}
    if missing := sorted(wanted - {file.name for file in files}):
        raise ModelError(f"{folder} lacks {', '.join(missing)}; copy the checkpoint once more, or take another")
    return kept, versions.pop()


def _version_of(file: Path, metadata: Mapping[str, str] | None) -> int:
    """Raises ModelError for a file that is not one of ours."""
    text = (metadata or {}).get(_VERSION, "")
    if not text.isdecimal() or re.fullmatch(r"\d+-of-\d+", file.stem) is None:
        raise ModelError(
            f"{file} is no stage's state of an optimizer: {_VERSION!r} in its metadata is {text!r} where a number of "
            "steps should be, or its name is no stage's; name a checkpoint of a run with run.save_optimizer"
        )
    return int(text)


def _give(optimizer: ShardOptimizer, name: str, parameter: nn.Parameter, kept: dict[str, Path]) -> None:
    tensors = {}
    for key, file in kept.items():
        with safe_open(file, "pt") as opened:
            tensors[key] = opened.get_tensor(f"{name}.{key}").clone()  # no view of the file
        if key != _STEP and tensors[key].shape != parameter.shape:
            shapes = f"shape {list(tensors[key].shape)} where the parameter has {list(parameter.shape)}"
            raise ModelError(f"{file}: {name}.{key} has {shapes}")
    wanted = (_STEP, *_MOMENTS) if tensors.get(_STEP, 1) else (_STEP,)
    if missing := [f"{name}.{key}" for key in wanted if key not in tensors]:
        folder = next(iter(kept.values())).parent
        raise ModelError(f"{folder} lacks {', '.join(missing)}; copy the checkpoint once more, or take another")
    master = optimizer.masters[parameter]
    if (value := tensors.pop(_MASTER, None)) is not None:
        with torch.no_grad():
            master.copy_(value)
            parameter.copy_(value)
    if tensors[_STEP]:
        is_fused = optimizer.adamw.defaults["fused"]
        optimizer.adamw.state[master] = {
            key: tensors[key].to(master.device if key != _STEP or is_fused else "cpu") for key in wanted
        }
