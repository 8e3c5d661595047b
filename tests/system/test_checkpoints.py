import hashlib
import json
from pathlib import Path

import numpy
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from trainmaster.api.errors import RunError
from trainmaster.system.checkpoints import CheckpointFolder
from trainmaster.system.rpc.commands import ShardFile
from trainmaster.system.service.manifest import INDEX, MANIFEST, WrittenFile, read_manifest

SHA256 = "0" * 64


def write(folder: Path, name: str, *tensors: str) -> ShardFile:
    (folder / name).write_bytes(b"x" * len(tensors))
    return ShardFile(file=name, tensors=tensors, size_bytes=len(tensors), sha256=SHA256)


def test_a_checkpoint_of_one_file_has_no_index(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    file = write(folder.begin(5), "model.safetensors", "a", "b")
    path = folder.publish(5, [file, ShardFile()])
    assert path == tmp_path / "checkpoints" / "step-5"
    assert sorted(each.name for each in path.iterdir()) == [MANIFEST, "model.safetensors"]


def test_a_checkpoint_of_several_files_has_an_index_of_all_tensors(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    partial = folder.begin(5)
    files = [write(partial, "one.safetensors", "a", "b"), ShardFile(), write(partial, "two.safetensors", "c")]
    index = json.loads((folder.publish(5, files) / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 3},
        "weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
    }


def test_the_manifest_has_all_files_and_the_index_the_weights_alone(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    partial = folder.begin(5)
    (partial / "optimizer").mkdir()
    files = [write(partial, "optimizer/one.safetensors"), write(partial, "model.safetensors", "a")]
    path = folder.publish(5, files)
    assert not (path / INDEX).exists()
    assert read_manifest(path) == {
        "model.safetensors": WrittenFile(size_bytes=1, sha256=SHA256),
        "optimizer/one.safetensors": WrittenFile(size_bytes=0, sha256=SHA256),
    }


def test_the_directory_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = CheckpointFolder(tmp_path)
    partial = folder.begin(5)
    files = [write(partial, "one.safetensors", "a"), write(partial, "two.safetensors", "b")]
    seen = []
    rename = Path.rename

    def spy(self: Path, target: Path) -> Path:
        seen.append((sorted(each.name for each in self.iterdir()), target.exists()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", spy)
    folder.publish(5, files)
    assert seen == [([MANIFEST, INDEX, "one.safetensors", "two.safetensors"], False)]
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-5"]


def test_a_file_that_did_not_get_here_is_named_and_nothing_is_published(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    folder.begin(5)
    with pytest.raises(RunError, match=r"a worker wrote gone\.safetensors for step 5, .* run\.directory must be on a"):
        folder.publish(5, [ShardFile(file="gone.safetensors", tensors=("a",), size_bytes=1)])
    assert not (tmp_path / "checkpoints" / "step-5").exists()


def test_a_step_is_begun_once(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    folder.begin(5)
    with pytest.raises(FileExistsError, match=r"\.step-5\.partial"):
        folder.begin(5)


def test_a_published_checkpoint_is_not_overwritten(tmp_path: Path):
    folder = CheckpointFolder(tmp_path)
    for content in ("first", "second"):
        file = write(folder.begin(5), "model.safetensors", content)
        if content == "first":
            folder.publish(5, [file])
            (tmp_path / "checkpoints" / "step-5" / "model.safetensors").write_text("first")
    with pytest.raises(OSError, match="not empty"):
        folder.publish(5, [file])
    assert (tmp_path / "checkpoints" / "step-5" / "model.safetensors").read_text() == "first"


def test_the_parts_of_an_adapter_become_one_file_that_the_manifest_names(tmp_path: Path):
    """Byte by byte: checked by safetensors' own reader."""
    folder, written = CheckpointFolder(tmp_path), {}
    partial, files = folder.begin(5), []
    for at, shape in enumerate([(2, 3), (5,), (1, 1, 4)]):
        tensors = {f"{at}.{name}": numpy.full(shape, at + 0.5, dtype) for name, dtype in (("a", "f4"), ("b", "f2"))}
        path = partial / f"adapter_model-{at + 1:05d}-of-00003.safetensors"
        save_file(tensors, path, {"format": "pt"})
        files.append(ShardFile(file=path.name, size_bytes=sum(each.nbytes for each in tensors.values()), sha256=SHA256))
        written |= tensors
    path = folder.publish(5, [*files, ShardFile()])
    assert sorted(each.name for each in path.iterdir()) == ["adapter_model.safetensors", MANIFEST]
    with safe_open(path / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    assert set(found) == set(written)
    for name, tensor in found.items():
        numpy.testing.assert_array_equal(tensor, written[name])
        assert tensor.dtype == written[name].dtype
    content = (path / "adapter_model.safetensors").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert read_manifest(path) == {"adapter_model.safetensors": WrittenFile(size_bytes=len(content), sha256=sha256)}
