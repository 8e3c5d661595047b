"""A checkpoint that is not what was written is refused, and the file is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainmaster.api.errors import ModelError
from trainmaster.system.service.files import digest_of
from trainmaster.system.service.manifest import INDEX, MANIFEST, WrittenFile, write_manifest
from trainmaster.workers.models import integrity
from trainmaster.workers.models.loading import init_stage, load_stage

CPU = torch.device("cpu")
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


def files(checkpoint: Path) -> list[Path]:
    return [checkpoint / name for name in FILES]


def test_what_was_written_passes(checkpoint: Path):
    integrity.check(checkpoint)
    integrity.check_digests(checkpoint, files(checkpoint))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_the_file_is_named(checkpoint: Path, name: str):
    flip(checkpoint / name, -1)
    integrity.check(checkpoint)
    with pytest.raises(ModelError, match=rf"{name} is not as it was written: .* copy the checkpoint once more"):
        integrity.check_digests(checkpoint, files(checkpoint))
    integrity.check_digests(checkpoint, [file for file in files(checkpoint) if file.name != name])


def test_files_are_found_by_the_tensors_in_them_and_all_if_one_has_another_name(checkpoint: Path):
    first, second = files(checkpoint)
    assert integrity.files_with(checkpoint, {"t1"}) == [second]
    assert integrity.files_with(checkpoint, {"t0", "t1"}) == [first, second]
    assert integrity.files_with(checkpoint, {"t1", "module.t1"}) == [first, second]


def without_index(directory: Path, joined: Path) -> Path:
    """The same checkpoint in one file."""
    joined.mkdir()
    shutil.copy(directory / "config.json", joined)
    parts = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
    save_file(parts[0] | parts[1], joined / "model.safetensors", {"format": "pt"})
    return joined


def seal(directory: Path) -> None:
    """Gives it a manifest of what is there."""
    written = {
        path.name: WrittenFile(size_bytes=path.stat().st_size, sha256=digest_of(path))
        for path in directory.glob("*.safetensors")
    }
    write_manifest(directory, written)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "qwen3_moe"])
def test_each_stage_hashes_all_that_it_reads_whatever_others_hash(config, write_checkpoint, tmp_path):
    """Its host may have a copy of its own."""
    parts = tmp_path / "parts"
    write_checkpoint([init_stage(config, 7, index, 2, CPU) for index in range(2)], parts)
    one = without_index(parts, tmp_path / "one")
    for directory in (parts, one):
        seal(directory)
        flip(sorted(directory.glob("*.safetensors"))[-1], -1)
    load_stage(parts, 0, 2, CPU)  # which takes nothing from the second file
    for directory, index, num_stages in ((parts, 1, 2), (parts, 0, 1), (parts, 2, 3), (one, 0, 2), (one, 1, 2)):
        with pytest.raises(ModelError, match="is not as it was written"):
            load_stage(directory, index, num_stages, CPU)


def test_a_file_that_was_cut_short_is_named_with_and_without_a_manifest(checkpoint: Path):
    path = checkpoint / FILES[1]
    path.write_bytes(path.read_bytes()[:-4])
    for _ in range(2):
        with pytest.raises(ModelError, match=rf"{FILES[1]} is no whole safetensors file .*; copy"):
            integrity.check(checkpoint)
        (checkpoint / MANIFEST).unlink(missing_ok=True)


def test_a_file_of_another_size_is_named(checkpoint: Path):
    save_file({"t0": torch.arange(101.0)}, checkpoint / FILES[0])
    with pytest.raises(ModelError, match=rf"{FILES[0]} has \d+ bytes where manifest\.json says \d+"):
        integrity.check(checkpoint)


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
