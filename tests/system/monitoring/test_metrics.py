import json
import subprocess
import sys
from pathlib import Path

import pytest
from trainmaster.system.monitoring import metrics as module
from trainmaster.system.monitoring.metrics import MetricsLog

SCRIPT = """
import sys
from pathlib import Path
from trainmaster.system.monitoring.metrics import MetricsLog

log = MetricsLog(Path(sys.argv[1]))
log.add(1, {"train/loss": 0.5, "performance/tokens": 7})
log.add(2, {"train/loss": 0.25})
log.close()
assert "torch" not in sys.modules, "tensorboardX brought torch in"
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after a master's process has written its metrics (apart from ours, which has torch)."""
    folder = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_step_is_one_object_on_its_line(written: Path):
    lines = (written / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train/loss": 0.5, "performance/tokens": 7},
        {"step": 2, "train/loss": 0.25},
    ]


def test_an_event_file_holds_the_names(written: Path):
    (events,) = (written / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert content.count(b"train/loss") == 2
    assert content.count(b"performance/tokens") == 1


class FakeWriter:
    """In place of tensorboardX's."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.scalars.append(("closed", 0.0, 0))


def test_close_waits_until_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = FakeWriter()
    monkeypatch.setattr(module, "_summary_writer", lambda _: writer)
    log = MetricsLog(tmp_path)
    for step in range(100):
        log.add(step, {"a": step})
    log.close()
    assert writer.scalars == [*(("a", step, step) for step in range(100)), ("closed", 0.0, 0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100


def test_values_are_taken_as_they_are_when_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = FakeWriter()
    monkeypatch.setattr(module, "_summary_writer", lambda _: writer)
    log, values = MetricsLog(tmp_path), {"a": 1.0}
    log.add(1, values)
    values["a"] = 2.0
    log.close()
    assert writer.scalars[0] == ("a", 1.0, 1)


def test_a_second_log_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_summary_writer", lambda _: FakeWriter())
    for step in (1, 2):
        log = MetricsLog(tmp_path)
        log.add(step, {"a": 1.0})
        log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
