"""Publishing checkpoints: workers write their files aside, the master adds index and manifest, and renames.

    RUN/checkpoints/.step-40.partial/      while workers write
    RUN/checkpoints/step-40/               an ordinary Hugging Face directory, or peft's of adapters, complete

A directory without the dot is whole: it was synced to disk before it got its name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..api.errors import RunError
from .rpc.commands import ShardFile
from .service.adapter import WEIGHTS, is_part, join
from .service.files import digest_of, sync
from .service.manifest import INDEX, WrittenFile, write_manifest


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, run_directory: Path) -> None:
        self._folder = run_directory / "checkpoints"

    def begin(self, step: int) -> Path:
        """Makes the directory that workers write into. All hosts must see it."""
        partial = self._folder / f".step-{step}.partial"
        partial.mkdir(parents=True)
        return partial

    def publish(self, step: int, files: Sequence[ShardFile]) -> Path:
        """Completes and renames what workers wrote. Raises `RunError` if a file did not get here."""
        partial = self._folder / f".step-{step}.partial"
        written = sorted((file for file in files if file.file), key=lambda file: file.file)
        for file in written:
            if not (partial / file.file).is_file():
                raise RunError(
                    f"a worker wrote {file.file} for step {step}, but the master does not see it in {partial}: "
                    "run.directory must be on a disk that all hosts share"
                )
        written = _with_whole_adapter(partial, written)
        weights = [file for file in written if file.tensors]
        if len(weights) > 1:
            index = {
                "metadata": {"total_size": sum(file.size_bytes for file in weights)},
                "weight_map": {name: file.file for file in weights for name in file.tensors},
            }
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        manifest = {
            file.file: WrittenFile(size_bytes=(partial / file.file).stat().st_size, sha256=file.sha256)
            for file in written
        }
        write_manifest(partial, manifest)
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        final = self._folder / f"step-{step}"
        partial.rename(final)
        sync(self._folder)
        return final


def _with_whole_adapter(directory: Path, written: Sequence[ShardFile]) -> list[ShardFile]:
    """With one file in place of the parts of an adapter, if there are any."""
    parts = [file for file in written if is_part(file.file)]
    if not parts:
        return list(written)
    whole = directory / WEIGHTS
    join([directory / part.file for part in parts], whole)
    for part in parts:
        (directory / part.file).unlink()
    size_bytes = sum(part.size_bytes for part in parts)
    joined = replace(parts[0], file=WEIGHTS, size_bytes=size_bytes, sha256=digest_of(whole))
    return sorted([joined, *(file for file in written if file not in parts)], key=lambda file: file.file)
