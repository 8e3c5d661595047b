"""Tiny models of several families, and what transformers itself computes with them, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_checks
import pytest
import torch
from architectures import CONFIGS, MODEL_TYPES
from model_checks import MakeStages, Reference, make_reference, stages_of
from trainmaster.api.model_support import Way
from trainmaster.workers.models.stage import Stage


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    chosen = {name for names in marks for name in ([names] if isinstance(names, str) else names)}
    for name, values in (("model_type", MODEL_TYPES), ("num_stages", [1, 2, 3])):
        if name in metafunc.fixturenames and name not in chosen:
            metafunc.parametrize(name, values)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def whole_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def make(model_type: str) -> Reference:
        if model_type not in made:
            made[model_type] = make_reference(CONFIGS[model_type], tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return make


@pytest.fixture
def whole(whole_of: Callable[[str], Reference], model_type: str) -> Reference:
    return whole_of(model_type)


@pytest.fixture(scope="session")
def stages_in_rows() -> Callable[[Reference], MakeStages]:
    """All stages of a model, which take packed rows, as many as asked for; made once, and not to be changed."""
    made: dict[Path, MakeStages] = {}

    def make(reference: Reference) -> MakeStages:
        return made.setdefault(reference.directory, stages_of(reference, Way()))

    return make


@pytest.fixture
def make_stages(stages_in_rows: Callable[[Reference], MakeStages], whole: Reference) -> MakeStages:
    """Those of `whole`."""
    return stages_in_rows(whole)


@pytest.fixture
def config(model_type: str) -> dict[str, Any]:
    return CONFIGS[model_type]


@pytest.fixture
def qwen2() -> dict[str, Any]:
    return CONFIGS["qwen2"]


@pytest.fixture
def write_checkpoint() -> Callable[[list[Stage], Path], None]:
    """What the processes of all stages and the master do together."""
    return model_checks.write_checkpoint
