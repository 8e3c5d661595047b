"""The files of an adapter's directory, as peft names them, and one file of tensors out of those of several stages.

    adapter_config.json                               peft's
    adapter_model-00001-of-00002.safetensors, ...     a stage's each, while a checkpoint is written
    adapter_model.safetensors                         all of them: peft reads one file only

Does not: know of models, or import torch: the master joins the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PART = "adapter_model-"


def name_of_part(part: str) -> str:
    """`part`: "00001-of-00003"."""
    return f"{_PART}{part}.safetensors"


def is_part(name: str) -> bool:
    """Whether a file of this name is a stage's part of an adapter."""
    return name.startswith(_PART)


def join(parts: Sequence[Path], whole: Path) -> None:
    """Write the tensors of several safetensors files, which have different names and are float32, into one."""
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for part in parts:
        found = load_file(part)
        assert not found.keys() & tensors.keys(), f"{part} has tensors that another stage wrote"
        tensors |= found
    save_file(tensors, whole, {"format": "pt"})
