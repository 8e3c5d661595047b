"""Publishing checkpoints: workers write their files aside, the master adds the index and renames.

    RUN/checkpoints/.step-40.partial/      while workers write
    RUN/checkpoints/step-40/               an ordinary Hugging Face directory, complete

A directory without the dot is whole: it was synced to disk before it got its name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..api.errors import RunError
from .rpc.commands import ShardFile
from .service.files import sync

INDEX = "model.safetensors.index.json"


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
        written = [file for file in files if file.file]
        for file in written:
            if not (partial / file.file).is_file():
                raise RunError(
                    f"a worker wrote {file.file} for step {step}, but the master does not see it in {partial}: "
                    "run.directory must be on a disk that all hosts share"
                )
        if len(written) > 1:
            index = {
                "metadata": {"total_size": sum(file.size_bytes for file in written)},
                "weight_map": {name: file.file for file in written for name in file.tensors},
            }
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        final = self._folder / f"step-{step}"
        partial.rename(final)
        sync(self._folder)
        return final
