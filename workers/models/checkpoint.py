"""Writing stages as an ordinary Hugging Face directory, every stage's process its own file.

    stage 0, 1, ...  write_stage   -> model-00001-of-00003.safetensors, ...    and a StageFile each
    stage 0          write_config  -> config.json, generation_config.json
    the master, from the StageFiles -> model.safetensors.index.json            (not here: the master has no torch)

Invariants: every tensor is in one file; names and shapes are those that transformers itself would save; files are
synced to disk before a call returns. Files are written in place: give a new directory, and rename it when complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...system.service.files import sync
from . import hf_compat
from .stage import Stage


@dataclass(frozen=True, kw_only=True)
class StageFile:
    """What one stage wrote: its part of the checkpoint's index."""

    name: str
    """The file, within the directory."""
    tensors: tuple[str, ...]
    """Their names in the checkpoint."""
    total_size_bytes: int
    """Of the tensors."""


def write_stage(stage: Stage, directory: Path) -> StageFile:
    """Write the tensors of one stage into `directory`, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "model.safetensors"
    if stage.num_stages > 1:
        name = f"model-{stage.index + 1:05d}-of-{stage.num_stages:05d}.safetensors"
    tensors = stage_tensors(stage)
    save_file(tensors, directory / name, metadata={"format": "pt"})
    sync(directory / name)
    sync(directory)
    return StageFile(
        name=name, tensors=tuple(tensors), total_size_bytes=sum(tensor.nbytes for tensor in tensors.values())
    )


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
    left_out = hf_compat.names_not_saved(model) | set(ties)
    if not stage.is_first:
        left_out |= set(ties.values()) | {name for name, _ in stage.replicated}
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in left_out}
    saved = hf_compat.checkpoint_format(model, tensors)
    return {name: tensor.cpu().contiguous() for name, tensor in saved.items()}
