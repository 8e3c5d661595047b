"""Fixtures that integration and fault tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from preloaded import preloaded_process
from workbench import Workbench, write_tiny_folder

settings.register_profile("busy", deadline=None)  # the machine is shared: one slow example says nothing
settings.load_profile("busy")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `Workbench` copies from."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_folder(folder)
    return folder


@pytest.fixture(scope="session")
def popen() -> Iterator[type[subprocess.Popen[str]]]:
    """Like `subprocess.Popen`, but faster: see `preloaded`."""
    with preloaded_process() as found:
        yield found


@pytest.fixture
def workbench(tiny_folder: Path, tmp_path: Path, popen: type[subprocess.Popen[str]]) -> Iterator[Workbench]:
    folder = tmp_path / "bench"
    shutil.copytree(tiny_folder, folder)
    bench = Workbench(folder, popen)
    yield bench
    for process in bench.started:
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait()
    left = bench.wait_until_gone()
    for pid in left:
        os.kill(pid, 9)
    assert not left, f"processes {left} were left behind"
