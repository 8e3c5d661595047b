"""What fault tests share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stage import Stage


@pytest.fixture
def stage(tmp_path: Path, popen: type[subprocess.Popen[Any]]) -> Iterator[Stage]:
    with Stage(tmp_path, popen) as made:
        yield made
