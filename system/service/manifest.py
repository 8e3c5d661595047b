"""What files a checkpoint was written with: their sizes and digests, so that whoever reads them can tell.

    manifest.json   {"format": 1, "files": {"model-00001-of-00002.safetensors": {"size_bytes": 1, "sha256": ...}, ...}}

Files of tensors only: what people edit (config.json) is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from ...api.errors import ModelError
from ...api.record import record

INDEX = "model.safetensors.index.json"
"""Hugging Face's: which file has which tensor, where there are several files."""
MANIFEST = "manifest.json"


@record
class WrittenFile:
    """As it was when it was written."""

    size_bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@record
class Manifest:
    format: Literal[1] = 1
    files: dict[str, WrittenFile]
    """By path within the checkpoint."""


_MANIFESTS: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def write_manifest(directory: Path, files: Mapping[str, WrittenFile]) -> None:
    text = json.dumps(_MANIFESTS.dump_python(Manifest(files=dict(files)), mode="json"), indent=2)
    (directory / MANIFEST).write_text(text + "\n")


def read_manifest(directory: Path) -> Mapping[str, WrittenFile]:
    """Of a directory that has one; empty for another's. Raises ModelError if it cannot be read."""
    path = directory / MANIFEST
    if not path.is_file():
        return {}
    try:
        return _MANIFESTS.validate_json(path.read_bytes()).files
    except ValidationError as error:
        raise ModelError(
            f"{path} is no manifest ({error.errors()[0]['msg']}); restore it, or remove it if it is not ours"
        ) from error
