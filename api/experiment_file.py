"""Loading a user's experiment file: the same way in the launcher, the master and every worker.

The file is plain Python that assigns `experiment`. It may also define `prepare(experiment)`, which is called on every
service before anything starts and makes what the experiment names but is not there yet (a tokenizer, say); it must be
idempotent and safe to run in several processes at once. The wire never carries code: master and workers load the file
each for itself and compare `code_digest` and `experiment_digest`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from .config import Model
from .errors import ConfigError, TrainmasterError
from .experiments.base import CompiledExperiment, Experiment

_MODULE_NAME = "trainmaster_experiment"


@dataclass(frozen=True, slots=True)
class LoadedExperiment:
    """An experiment with its overrides applied."""

    file: Path
    overrides: tuple[str, ...]
    experiment: Experiment
    compiled: CompiledExperiment
    code_digest: str
    """Of the file and of every module that it imported from its own folder."""
    experiment_digest: str
    """Of the resolved experiment's values."""


@dataclass(frozen=True, slots=True)
class ExperimentFile:
    """An experiment file that has been executed once."""

    file: Path
    experiment: Experiment
    prepare: Callable[[Experiment], None] | None
    code_digest: str

    def resolve(self, overrides: Sequence[str] = (), prog: str = "trainmaster") -> LoadedExperiment:
        """The experiment with command-line overrides (`--model.layout.pp 2`), prepared.

        `--model DIR` is short for `--model.path DIR`. It takes the place of random weights that the file asks for.

        Raises `ConfigError`; an unknown field prints the near matches and exits with 2.
        """
        from pydantic import TypeAdapter

        experiment = _override(self.experiment, overrides, prog)
        compiled = experiment.compile()
        if self.prepare is not None:
            with _user_code(self.file, "prepare"):
                self.prepare(experiment)
        canonical = TypeAdapter(type(experiment)).dump_json(experiment)
        canonical = canonical.replace(str(self.file.resolve().parent).encode(), b".")  # hosts may keep it elsewhere
        return LoadedExperiment(
            file=self.file,
            overrides=tuple(overrides),
            experiment=experiment,
            compiled=compiled,
            code_digest=self.code_digest,
            experiment_digest=hashlib.sha256(canonical).hexdigest(),
        )


def read_experiment_file(file: Path) -> ExperimentFile:
    """Executes the file. Raises `ConfigError` if it is missing, fails, or assigns no experiment."""
    if not file.is_file():
        raise ConfigError("FILE", str(file), "there is no such file", "give the path of an experiment file")
    spec = importlib.util.spec_from_file_location(_MODULE_NAME, file)
    if spec is None or spec.loader is None:
        raise ConfigError("FILE", str(file), "an experiment is a Python file", "give a path that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE_NAME] = module
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python FILE` does, so that the file can import its neighbours
    with _user_code(file, "the file"):
        spec.loader.exec_module(module)
    experiment = getattr(module, "experiment", None)
    if not callable(getattr(experiment, "compile", None)):
        raise ConfigError(
            "FILE",
            str(file),
            "it must assign `experiment`",
            "add for example `experiment = SFT(model=..., dataset=...)`",
        )
    return ExperimentFile(
        file=file,
        experiment=experiment,  # type: ignore[arg-type]  # a user's object, checked above by shape
        prepare=getattr(module, "prepare", None),
        code_digest=_digest(file, module),
    )


def _override(experiment: Experiment, overrides: Sequence[str], prog: str) -> Experiment:
    import tyro

    if not overrides:
        return experiment
    values = {each.name: getattr(experiment, each.name) for each in fields(experiment)}  # type: ignore[arg-type]
    models = {name: value for name, value in values.items() if isinstance(value, Model)}
    arguments = [part for argument in overrides for part in _path_spelt_out(argument, models)]
    drawn = {name: model for name, model in models.items() if model.config}
    for flag, directory in pairwise(arguments):
        name = flag.removeprefix("--").removesuffix(".path")
        if name in drawn and flag == f"--{name}.path":
            checkpoint = replace(drawn[name], path=Path(directory), config={}, tokenizer=None)
            experiment = replace(experiment, **{name: checkpoint})  # type: ignore[type-var]  # a record of its own class
    return tyro.cli(
        type(experiment),
        default=experiment,
        args=arguments,
        prog=prog,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
    )


def _path_spelt_out(argument: str, models: Collection[str]) -> list[str]:
    """`--model` and `--model=DIR`, where `model` is a model, as options of its path; all else as it is."""
    flag, equals, value = argument.partition("=")
    name = flag.removeprefix("--").removesuffix(".path")
    if name not in models or flag not in (f"--{name}", f"--{name}.path"):
        return [argument]
    return [f"--{name}.path", value] if equals else [f"--{name}.path"]


def _digest(file: Path, module: ModuleType) -> str:
    """Of the file and of all modules in its folder and below, but for installed ones."""
    folder = file.resolve().parent
    below = [Path(root).resolve() for root in (Path(__file__).parents[1], sys.prefix, sys.base_prefix)]
    below = [root for root in below if root.is_relative_to(folder)]
    is_below = cache(lambda name: Path(name).resolve().is_relative_to(folder))  # modules are thousands, folders few
    paths = {file.resolve()}
    for other in list(sys.modules.values()):
        origin = getattr(other, "__file__", None)
        if other is module or origin is None or not os.path.isabs(origin):  # torch makes up relative ones
            continue
        if not is_below(os.path.dirname(origin)) and not os.path.islink(origin):
            continue
        path = Path(origin).resolve()
        installed = "site-packages" in path.parts or any(path.is_relative_to(root) for root in below)
        if path.is_relative_to(folder) and path.is_file() and not installed:
            paths.add(path)
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _user_code:
    """Turns whatever a user's own code raises into one `ConfigError` that names the line."""

    def __init__(self, file: Path, what: str) -> None:
        self.file, self.what = file, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, TrainmasterError) or not isinstance(error, Exception):
            return
        own = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == self.file.resolve()
        ]
        line = own[-1].lineno if own else getattr(error, "lineno", None)
        raise ConfigError(
            "FILE",
            f"{self.file}:{line}" if line else str(self.file),
            f"{self.what} raised {type(error).__name__}: {error}",
            "correct it there",
        ) from error
