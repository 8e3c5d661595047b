import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from trainmaster.api import experiment_file
from trainmaster.api.errors import ConfigError
from trainmaster.api.experiment_file import read_experiment_file

EXPERIMENT = """
from trainmaster import SFT, Dataset, Layout, Model, RunOptions

experiment = SFT(
    model=Model(config={"model_type": "qwen2", "hidden_size": 8}, tokenizer="tokenizer", layout=Layout(pp=2)),
    dataset=Dataset(path="train.jsonl"),
    batch_size=8,
)
"""


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    """An experiment file leaves its folder on the path and its neighbours among the modules."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("trainmaster_experiment", "neighbour")):
            del sys.modules[name]


def write(folder: Path, text: str = EXPERIMENT, name: str = "experiment.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_is_read_and_compiled(tmp_path: Path):
    loaded = read_experiment_file(write(tmp_path)).resolve()
    assert loaded.compiled.num_workers == 2
    assert loaded.overrides == ()
    assert loaded.experiment.batch_size == 8


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"FILE = '.*none\.py': there is no such file\. Give the path"):
        read_experiment_file(tmp_path / "none.py")


def test_a_file_that_is_not_python_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"FILE = '.*a\.yaml': an experiment is a Python file\. Give a path that"):
        read_experiment_file(write(tmp_path, name="a.yaml"))


def test_a_file_that_raises_names_its_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"FILE = '.*experiment\.py:3': the file raised ZeroDivisionError: .*zero"):
        read_experiment_file(write(tmp_path, "a = 1\n\na / 0\n"))


def test_a_relative_path_names_its_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "a = 1\n\na / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"FILE = 'experiment\.py:3': the file raised ZeroDivisionError"):
        read_experiment_file(Path("experiment.py"))


def test_a_syntax_error_names_its_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"FILE = '.*experiment\.py:2': the file raised SyntaxError"):
        read_experiment_file(write(tmp_path, "a = 1\nb = = 2\n"))


def test_an_error_of_ours_passes_as_it_is(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^Layout\.dp = 0: input should be greater than 0"):
        read_experiment_file(write(tmp_path, EXPERIMENT.replace("pp=2", "dp=0")))


@pytest.mark.parametrize("text", ["", "experiment = 3\n"])
def test_a_file_without_an_experiment_is_refused(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match=r"FILE = '.*': it must assign `experiment`\. Add for example"):
        read_experiment_file(write(tmp_path, text))


def test_nested_overrides(tmp_path: Path):
    file = read_experiment_file(write(tmp_path))
    overrides = ["--model.layout.dp", "3", "--run.name", "second", "--batch-size", "6", "--dataset.no-shuffle"]
    loaded = file.resolve(overrides)
    assert (loaded.experiment.model.layout.dp, loaded.experiment.model.layout.pp) == (3, 2)
    assert (loaded.experiment.run.name, loaded.experiment.batch_size) == ("second", 6)
    assert loaded.experiment.dataset.shuffle is False
    assert loaded.overrides == tuple(overrides)
    assert loaded.compiled.num_workers == 6
    assert file.experiment.batch_size == 8


def test_an_optional_part_can_be_added_by_an_override(tmp_path: Path):
    loaded = read_experiment_file(write(tmp_path)).resolve(["--run.steps", "7", "--minibatch-size", "4"])
    assert (loaded.experiment.run.steps, loaded.experiment.minibatch_size) == (7, 4)


def test_a_key_of_the_models_config_can_be_overridden(tmp_path: Path):
    loaded = read_experiment_file(write(tmp_path)).resolve(["--model.config.hidden-size", "16"])
    assert loaded.experiment.model.config == {"model_type": "qwen2", "hidden_size": 16}


@pytest.mark.parametrize(
    "option", [["--model", "mine"], ["--model=mine"], ["--model.path", "mine"], ["--model.path=mine"]]
)
def test_a_checkpoint_takes_the_place_of_random_weights(tmp_path: Path, option: list[str]):
    file = read_experiment_file(write(tmp_path))
    model = file.resolve([*option, "--model.layout.dp", "2"]).experiment.model
    assert (model.path, model.config, model.tokenizer) == (Path("mine"), {}, None)
    assert (model.layout.dp, model.layout.pp) == (2, 2)
    assert file.resolve([*option, "--model.tokenizer", "other"]).experiment.model.tokenizer == Path("other")
    assert file.experiment.model.config == {"model_type": "qwen2", "hidden_size": 8}


def test_another_checkpoint_leaves_the_files_tokenizer(tmp_path: Path):
    text = EXPERIMENT.replace('config={"model_type": "qwen2", "hidden_size": 8}', 'path="first"')
    model = read_experiment_file(write(tmp_path, text)).resolve(["--model", "second"]).experiment.model
    assert (model.path, model.tokenizer) == (Path("second"), Path("tokenizer"))


def test_an_override_that_breaks_a_rule_is_a_config_error(tmp_path: Path):
    file = read_experiment_file(write(tmp_path))
    with pytest.raises(ConfigError, match=r"batch_size = 8: must be a multiple of minibatch_size \(3\)"):
        file.resolve(["--minibatch-size", "3"])
    with pytest.raises(ConfigError, match=r"Layout\.tp = 2: this version runs 1 only"):
        file.resolve(["--model.layout.tp", "2"])


def test_an_unknown_override_exits_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        read_experiment_file(write(tmp_path)).resolve(["--model.layuot.dp", "3"], prog="trainmaster run x.py")
    assert caught.value.code == 2
    assert "--model.layuot.dp" in capsys.readouterr().err


def test_the_code_digest_follows_the_file(tmp_path: Path):
    first = read_experiment_file(write(tmp_path)).code_digest
    assert read_experiment_file(write(tmp_path)).code_digest == first
    assert read_experiment_file(write(tmp_path, EXPERIMENT + "# more\n")).code_digest != first


def test_the_code_digest_does_not_depend_on_the_folder(tmp_path: Path):
    digests = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        digests.add(read_experiment_file(write(tmp_path / name)).code_digest)
    assert len(digests) == 1


def test_the_code_digest_follows_a_neighbour_module(tmp_path: Path):
    neighbour = write(tmp_path, "VALUE = 1\n", "neighbour_of_digest.py")
    path = write(tmp_path, "import neighbour_of_digest\n" + EXPERIMENT)
    first = read_experiment_file(path).code_digest
    neighbour.write_text("VALUE = 2\n")
    assert read_experiment_file(path).code_digest != first


def test_the_code_digest_follows_a_neighbour_package(tmp_path: Path):
    package = tmp_path / "neighbour_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("VALUE = 1\n")
    path = write(tmp_path, "import neighbour_package.part\n" + EXPERIMENT)
    first = read_experiment_file(path).code_digest
    (package / "part.py").write_text("VALUE = 2\n")
    assert read_experiment_file(path).code_digest != first


@pytest.mark.parametrize(
    "place", ["trainmaster/system/extra.py", "python/lib/extra.py", "v/lib/site-packages/extra.py"]
)
def test_the_code_digest_leaves_out_what_is_installed_below_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """A clone of ours, Python or its packages may lie below; master and worker import different parts of them."""
    monkeypatch.setattr(experiment_file, "__file__", str(tmp_path / "trainmaster" / "api" / "experiment_file.py"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "python"))
    path = write(tmp_path)
    first = read_experiment_file(path).code_digest
    extra = tmp_path / place
    extra.parent.mkdir(parents=True)
    extra.write_text("")
    name = "trainmaster.system.extra" if place.startswith("trainmaster") else "extra"
    module = ModuleType(name)
    module.__file__ = str(extra)
    monkeypatch.setitem(sys.modules, name, module)
    assert read_experiment_file(path).code_digest == first


def test_the_experiment_digest_follows_the_values(tmp_path: Path):
    file = read_experiment_file(write(tmp_path))
    first = file.resolve().experiment_digest
    assert file.resolve(["--batch-size", "8"]).experiment_digest == first
    assert file.resolve(["--batch-size", "16"]).experiment_digest != first
    assert file.resolve(["--batch-size", "16"]).code_digest == file.code_digest


def test_prepare_is_called_with_the_overridden_experiment(tmp_path: Path):
    prepare = "\n\ndef prepare(experiment):\n    calls.append(experiment.batch_size)\n"
    file = read_experiment_file(write(tmp_path, "calls = []\n" + EXPERIMENT + prepare))
    assert file.prepare is not None
    calls = file.prepare.__globals__["calls"]
    assert calls == []
    file.resolve(["--batch-size", "4"])
    assert calls == [4]


def test_a_prepare_that_raises_names_its_line(tmp_path: Path):
    file = read_experiment_file(write(tmp_path, f"{EXPERIMENT}\ndef prepare(experiment):\n    raise OSError('full')\n"))
    line = len(EXPERIMENT.splitlines()) + 3
    with pytest.raises(ConfigError, match=rf"experiment\.py:{line}': prepare raised OSError: full\. Correct it there"):
        file.resolve()


def test_a_neighbour_is_found_in_the_files_folder(tmp_path: Path):
    write(tmp_path, "SIZE = 5\n", "neighbour_of_import.py")
    path = write(
        tmp_path, "from neighbour_of_import import SIZE\n" + EXPERIMENT.replace("batch_size=8", "batch_size=SIZE")
    )
    assert read_experiment_file(path).resolve().experiment.batch_size == 5
