"""Is a checkpoint on this disk what was written? Asked before a byte of it becomes a weight.

Every file of tensors is opened: its header says how long it must be, so one that was cut short is found at once. Where
the directory has a manifest, sizes and SHA-256 digests must agree with it.

    check             every file is there, whole, and of the size that was written    by its header: costs nothing
    check_digests     these files are what was written                                reads all of them

Invariant: each process hashes every file that it takes a tensor from, by itself: others may run on hosts with copies of
their own.

Does not: know of models. Whether the tensors are those that a model wants is found when they are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...api.errors import ModelError
from ...system.service.files import digest_of
from ...system.service.manifest import INDEX, MANIFEST, read_manifest

_AGAIN = "copy the checkpoint once more, or take another"


def check(directory: Path, folder: str = ".") -> None:
    """Checks the files of tensors in a folder of the checkpoint `directory`: by default those of weights.

    Raises ModelError for a file that is missing, cut short, or of another size than was written.
    """
    for file in _indexed(directory / folder):
        if not file.is_file():
            raise ModelError(f"{directory / INDEX} names {file.name}, which is not there; {_AGAIN}")
    for file in sorted((directory / folder).glob("*.safetensors")):
        names_in(file)
    for name, written in sorted(read_manifest(directory).items()):
        file = directory / name
        if file.parent != directory / folder:
            continue
        if not file.is_file():
            raise ModelError(f"{directory / MANIFEST} names {name}, which is not there; {_AGAIN}")
        if (size := file.stat().st_size) != written.size_bytes:
            raise ModelError(f"{file} has {size:,} bytes where {MANIFEST} says {written.size_bytes:,}; {_AGAIN}")


def check_digests(directory: Path, files: Iterable[Path]) -> None:
    """Hashes those of these files that the checkpoint's manifest names. Raises ModelError for one that has changed."""
    manifest = read_manifest(directory)
    for file in sorted(set(files)):
        name = file.relative_to(directory).as_posix()
        if name in manifest and (digest := digest_of(file)) != manifest[name].sha256:
            raise ModelError(
                f"{file} is not as it was written: its SHA-256 is {digest} where {MANIFEST} says "
                f"{manifest[name].sha256}; {_AGAIN}, or remove {MANIFEST} if you changed the file yourself"
            )


def files_with(directory: Path, names: Collection[str]) -> list[Path]:
    """The files of weights in `directory` that hold any of these tensors.

    All of them if a tensor is in none: it may stand there under another name.
    """
    found = {file: names_in(file).intersection(names) for file in sorted(directory.glob("*.safetensors"))}
    if set().union(*found.values()) != set(names):
        return list(found)
    return [file for file, held in found.items() if held]


def names_in(file: Path) -> frozenset[str]:
    """Of tensors. Raises ModelError for what is no safetensors file, or not the whole of one."""
    try:
        with safe_open(file, "pt") as opened:
            return frozenset(opened.keys())
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
