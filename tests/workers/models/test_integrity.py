"""A checkpoint that is not what was written is refused, and the file is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from trainmaster.api.errors import ModelError
from trainmaster.system.service.files import digest_of
from trainmaster.system.service.manifest import INDEX, MANIFEST, WrittenFile, write_manifest
from trainmaster.workers.models import integrity

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for at, name in enumerate(FILES):
        save_file({f"t{at}": torch.arange(100.0)}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"t0": FILES[0], "t1": FILES[1]}}))
    written = {}
    for name in FILES:
        path = tmp_path / name
        written[name] = WrittenFile(size_bytes=path.stat().st_size, sha256=digest_of(path))
    write_manifest(tmp_path, written)
    return tmp_path


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_what_was_written_passes(checkpoint: Path):
    integrity.check(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_by_whose_part_the_file_is_and_the_file_is_named(checkpoint: Path, name: str):
    flip(checkpoint / name, -1)
    with pytest.raises(ModelError, match=rf"{name} is not as it was written: .* copy the checkpoint once more"):
        integrity.check(checkpoint)
    assert sum(is_refused(checkpoint, index, 2) for index in range(2)) == 1
    assert sum(is_refused(checkpoint, index, 5) for index in range(5)) == 1


def is_refused(checkpoint: Path, index: int, num_parts: int) -> bool:
    try:
        integrity.check(checkpoint, index, num_parts)
    except ModelError:
        return True
    return False


def test_a_file_that_was_cut_short_is_named_with_and_without_a_manifest(checkpoint: Path):
    path = checkpoint / FILES[1]
    path.write_bytes(path.read_bytes()[:-4])
    for _ in range(2):
        with pytest.raises(ModelError, match=rf"{FILES[1]} is no whole safetensors file .*; copy"):
            integrity.check(checkpoint, 0, 2)
        (checkpoint / MANIFEST).unlink(missing_ok=True)


def test_a_file_of_another_size_is_named(checkpoint: Path):
    save_file({"t0": torch.arange(101.0)}, checkpoint / FILES[0])
    with pytest.raises(ModelError, match=rf"{FILES[0]} has \d+ bytes where manifest\.json says \d+"):
        integrity.check(checkpoint, 1, 2)


def test_a_missing_file_is_named_by_the_index_or_the_manifest(checkpoint: Path):
    (checkpoint / FILES[0]).unlink()
    with pytest.raises(ModelError, match=rf"index\.json names {FILES[0]}, which is not there"):
        integrity.check(checkpoint)
    (checkpoint / INDEX).unlink()
    with pytest.raises(ModelError, match=rf"manifest\.json names {FILES[0]}, which is not there"):
        integrity.check(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_named(checkpoint: Path, content: str):
    (checkpoint / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"index\.json is no index of tensors"):
        integrity.check(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2, "files": {}}', '{"files": {"a": {"size_bytes": 3}}}'])
def test_a_manifest_that_is_none_is_named(checkpoint: Path, content: str):
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(ModelError, match=r"manifest\.json is no manifest"):
        integrity.check(checkpoint)
