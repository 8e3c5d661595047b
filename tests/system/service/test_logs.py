import json
import logging
import sys
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from trainmaster.system.service import logs

logger = logging.getLogger("trainmaster.here")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.setLevel(logging.INFO)
    yield
    for handler in [each for each in root.handlers if each not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_a_line_says_where_it_was(tmp_path: Path):
    logs.log_to_file(tmp_path / "logs" / "worker-1.log", "first", as_json=False)
    logger.info("before")
    with logs.at(step=3):
        logger.info("in a step")
        with logs.at(call="train"):
            logger.info("in a call")
    logger.info("after")
    lines = (tmp_path / "logs" / "worker-1.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO [first worker-1] trainmaster.here: before",
        "INFO [first worker-1 step 3] trainmaster.here: in a step",
        "INFO [first worker-1 step 3 train] trainmaster.here: in a call",
        "INFO [first worker-1] trainmaster.here: after",
    ]


def test_json_lines(tmp_path: Path):
    logs.log_to_file(tmp_path / "master.log", "first", as_json=True)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        with logs.at(step=2, call="generate"):
            logger.exception("it failed")
    (line,) = (tmp_path / "master.log").read_text().splitlines()
    found = json.loads(line)
    assert {key: found[key] for key in ("level", "run", "service", "step", "call", "message")} == {
        "level": "ERROR",
        "run": "first",
        "service": "master",
        "step": 2,
        "call": "generate",
        "message": "it failed",
    }
    assert found["exception"].endswith("ValueError: two\nlines")


def test_lines_go_to_whatever_standard_error_is_then(monkeypatch: pytest.MonkeyPatch):
    """A progress line takes its place while it moves, and puts what is said above itself."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    logs.log_to_stderr()
    progress, before = StringIO(), sys.stderr
    monkeypatch.setattr(sys, "stderr", progress)
    logger.error("it failed")
    monkeypatch.setattr(sys, "stderr", before)
    assert progress.getvalue().endswith(" ERROR trainmaster.here: it failed\n")


def test_threads_have_places_of_their_own(tmp_path: Path):
    logs.log_to_file(tmp_path / "worker-0.log", "first", as_json=False)

    def work(step: int) -> None:
        with logs.at(step=step):
            barrier.wait()
            logger.info("here %d", step)

    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=work, args=(step,)) for step in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "worker-0.log").read_text().splitlines()
    assert all(f"step {line[-1]}]" in line for line in lines)
    assert len(lines) == 4


def test_full_files_are_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(logs, "NUM_OLD_FILES", 2)
    logs.log_to_file(tmp_path / "master.log", "first", as_json=False)
    for number in range(100):
        logger.info("line %d", number)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["master.log", "master.log.1", "master.log.2"]
    assert all((tmp_path / name).stat().st_size <= 1000 for name in files)
    assert "line 99" in (tmp_path / "master.log").read_text()
