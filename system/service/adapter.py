"""The files of an adapter's directory, as peft names them, and one file of tensors out of those of several stages.

    adapter_config.json                               peft's
    adapter_model-00001-of-00002.safetensors, ...     a stage's each, while a checkpoint is written
    adapter_model.safetensors                         all of them: peft reads one file only

Does not: know of models, or what a tensor holds (files are joined byte by byte, without torch).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PART = "adapter_model-"
_ALIGNMENT = 8
"""Of the tensors in a safetensors file, in bytes."""


def name_of_part(part: str) -> str:
    """`part`: "00001-of-00003"."""
    return f"{_PART}{part}.safetensors"


def is_part(name: str) -> bool:
    """Whether a file of this name is a stage's part of an adapter."""
    return name.startswith(_PART)


def join(parts: Sequence[Path], whole: Path) -> None:
    """Write the tensors of several safetensors files, which have different names, into one."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Any: entries of the format's header
    bodies: list[tuple[Path, int]] = []
    end = 0
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert name not in entries, f"{name} was written by two stages"
            entries[name] = {**entry, "data_offsets": [end + offset for offset in entry["data_offsets"]]}
        bodies.append((part, 8 + length))
        end += part.stat().st_size - 8 - length
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with whole.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part, start in bodies:
            with part.open("rb") as source:
                source.seek(start)
                shutil.copyfileobj(source, file)
