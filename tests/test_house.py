"""Promises about the house as a whole: packages, what an import costs, public names, set-up commands."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import trainmaster

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("api", "system", "workers")


def fresh_interpreter(script: str) -> str:
    """Runs the script apart from everything that this process has imported."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_of(*folders: str) -> list[str]:
    names = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(("trainmaster", *(parts[:-1] if parts[-1] == "__init__" else parts))))
    return names


def test_the_package_list_equals_the_tree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    inits = [path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("__init__.py")]
    tree = {"trainmaster"} | {".".join(("trainmaster", *path.parent.relative_to(ROOT).parts)) for path in inits}
    assert set(project["tool"]["setuptools"]["packages"]) == tree
    assert len(project["tool"]["setuptools"]["packages"]) == len(tree)


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_no_init_file_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_api_system_and_the_command_line_are_torch_free_at_import():
    names = [*modules_of("api", "system"), "trainmaster.__main__"]
    assert "trainmaster.system.rpc.server" in names
    assert "trainmaster.api.experiments.sft" in names
    out = fresh_interpreter(
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "print([name for name in ('torch', 'transformers', 'tensorboardX', 'datasets') if name in sys.modules])\n"
    )
    assert out.strip() == "[]"


def test_a_command_of_operators_imports_little():
    """It is imports that such a command takes its time for."""
    out = fresh_interpreter(
        "import sys, trainmaster.system.operate\n"
        "print([name for name in ('numpy', 'asyncio', 'trainmaster.system.rpc.commands') if name in sys.modules])\n"
    )
    assert out.strip() == "[]"


def test_importing_the_package_imports_nothing_of_ours():
    out = fresh_interpreter(
        "import sys, trainmaster\nprint([name for name in sys.modules if name.startswith('trainmaster.')])"
    )
    assert out.strip() == "[]"


@pytest.mark.parametrize("name", trainmaster.__all__)
def test_every_public_name_resolves(name: str):
    assert getattr(trainmaster, name).__name__ == name


def test_public_names_are_listed():
    assert dir(trainmaster) == sorted(trainmaster.__all__)
    assert set(trainmaster._HOME) == set(trainmaster.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trainmaster' has no attribute 'Layuot'"):
        _ = trainmaster.Layuot


def test_the_readme_sets_up_with_two_commands():
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None, "README.md has no bash block"
    commands = [line.split("#")[0].strip() for line in block[1].splitlines()]
    assert [command for command in commands if command] == ["make demo", "make test"]


def test_the_set_up_commands_are_make_targets():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_no_module_is_longer_than_five_hundred_lines():
    paths = [path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in paths if len(path.read_text().splitlines()) > 500]
