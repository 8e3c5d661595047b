"""Writing stages as an ordinary Hugging Face directory, every stage's process its own file; what such a one holds.

    stage 0, 1, ...  write_stage    -> model-00001-of-00003.safetensors, ...    and a ShardFile each
    stage 0          write_config   -> config.json, generation_config.json
    the master, from the ShardFiles -> model.safetensors.index.json, manifest.json   (not here: it has no torch)

Invariants: every tensor is in one file; names and shapes are those that transformers itself would save; files are
synced to disk before a call returns. Files are written in place: give a new directory, and rename it when complete.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ...system.rpc.commands import ShardFile
from ...system.service.files import digest_of, sync
from ...system.service.manifest import INDEX
from . import hf_compat
from .stage import Stage

_SHOWN = 4
"""Names of tensors in an error."""


def tensor_shapes(directory: Path) -> dict[str, list[int]]:
    """Of all tensors of a checkpoint, by name; of no file but its index reads more than the header.

    Raises OSError or SafetensorError. The index is taken to be one: see `integrity`.
    """
    index = directory / INDEX
    files = {"model.safetensors"}
    if not (directory / "model.safetensors").is_file() and index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    shapes = {}
    for file in sorted(files):
        with safe_open(directory / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no dict
                shapes[name] = list(opened.get_slice(name).get_shape())
    return shapes


def shown(faults: Sequence[str]) -> str:
    """The first few, and how many more there are, for an error."""
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more


def write_stage(stage: Stage, directory: Path) -> ShardFile:
    """Write the tensors of one stage into `directory`, which is made if need be."""
    name = "model.safetensors"
    if stage.num_stages > 1:
        name = f"model-{part_of(stage)}.safetensors"
    tensors = stage_tensors(stage)
    return replace(write_tensors(tensors, directory, name, {"format": "pt"}), tensors=tuple(tensors))


def part_of(stage: Stage) -> str:
    """In names of files: "00001-of-00003" for the first of three stages."""
    return f"{stage.index + 1:05d}-of-{stage.num_stages:05d}"


def write_tensors(
    tensors: Mapping[str, torch.Tensor], directory: Path, name: str, metadata: Mapping[str, str]
) -> ShardFile:
    """Write a file of tensors, `name` within the checkpoint `directory`, with whatever folders that takes."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata=dict(metadata))
    sync(path)
    sync(path.parent)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return ShardFile(file=name, size_bytes=size_bytes, sha256=digest_of(path))


def write_config(stage: Stage, directory: Path) -> None:
    """Write what goes beside the weights: config.json and, for models that generate, generation_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    config = stage.config
    config.architectures = [type(stage.model).__name__]
    with hf_compat.quiet():
        config.save_pretrained(directory)
        sync(directory / "config.json")
        if stage.model.can_generate():  # not save_pretrained: it refuses settings that published models have
            stage.model.generation_config.to_json_file(directory / "generation_config.json")
            sync(directory / "generation_config.json")
    sync(directory)


def stage_tensors(stage: Stage) -> dict[str, torch.Tensor]:
    """The tensors that this stage saves, on the CPU, by their names in the checkpoint.

    A tied head is left to its embedding, and what several stages hold to the first of them.
    """
    model, ties = stage.model, hf_compat.tied_names(stage.model)
    left_out: set[str] = set()
    if not stage.is_first:
        left_out |= set(ties.values()) | {name for name, _ in stage.replicated}
    return {name: tensor.cpu().contiguous() for name, tensor in _in_checkpoint(model, left_out).items()}


def names_in_checkpoint(model: PreTrainedModel) -> set[str]:
    """Of the tensors that a stage's model takes from a checkpoint; it may be on the meta device."""
    return set(_in_checkpoint(model))


def _in_checkpoint(model: PreTrainedModel, left_out: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """A model's tensors, less these, as they stand in a checkpoint, where one that is tied to another is not."""
    never = hf_compat.names_not_saved(model) | set(hf_compat.tied_names(model)) | set(left_out)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in never}
    return hf_compat.checkpoint_format(model, tensors)
