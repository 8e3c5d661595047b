"""Is a checkpoint on this disk what was written? Asked before a byte of it becomes a weight.

Every file of tensors is opened: its header says how long it must be, so one that was cut short is found at once. Where
the directory has a manifest, sizes and SHA-256 digests must agree with it. Who reads a model in parts shares the
hashing: part `index` of `num_parts` hashes every `num_parts`-th file, so all parts together have seen all bytes.

Does not: know of models. Whether the tensors are those that a model wants is found when they are loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...api.errors import ModelError
from ...system.service.files import digest_of
from ...system.service.manifest import INDEX, MANIFEST, read_manifest

_AGAIN = "copy the checkpoint once more, or take another"


def check(directory: Path, index: int = 0, num_parts: int = 1, folder: str = ".") -> None:
    """Checks the files of tensors in a folder of the checkpoint `directory`: by default those of weights.

    Raises ModelError for a file that is missing, cut short, or not as it was written.
    """
    for file in _indexed(directory / folder):
        if not file.is_file():
            raise ModelError(f"{directory / INDEX} names {file.name}, which is not there; {_AGAIN}")
    for file in sorted((directory / folder).glob("*.safetensors")):
        _open(file)
    manifest = {name: file for name, file in read_manifest(directory).items() if Path(name).parent == Path(folder)}
    for name, written in sorted(manifest.items()):
        file = directory / name
        if not file.is_file():
            raise ModelError(f"{directory / MANIFEST} names {name}, which is not there; {_AGAIN}")
        if (size := file.stat().st_size) != written.size_bytes:
            raise ModelError(f"{file} has {size:,} bytes where {MANIFEST} says {written.size_bytes:,}; {_AGAIN}")
    for name in sorted(manifest)[index::num_parts]:
        if (digest := digest_of(directory / name)) != manifest[name].sha256:
            raise ModelError(
                f"{directory / name} is not as it was written: its SHA-256 is {digest} where {MANIFEST} says "
                f"{manifest[name].sha256}; {_AGAIN}, or remove {MANIFEST} if you changed the file yourself"
            )


def _open(file: Path) -> None:
    """Raises ModelError for what is no safetensors file, or not the whole of one."""
    try:
        with safe_open(file, "pt"):
            return
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is no whole safetensors file ({error}); {_AGAIN}") from error


def _indexed(directory: Path) -> list[Path]:
    """Files that the index names; none without one."""
    path = directory / INDEX
    if not path.is_file():
        return []
    try:
        return sorted({directory / name for name in json.loads(path.read_text())["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is no index of tensors ({error!r}); {_AGAIN}") from error
