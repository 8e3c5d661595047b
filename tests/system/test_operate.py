"""What a person sees of a run that is followed, on a terminal and elsewhere, and how that ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.text import Text
from trainmaster.api.errors import RunError
from trainmaster.system import operate
from trainmaster.system.rpc.inquiries import RunStatus, WorkerStatus
from trainmaster.system.service.claims import claim
from trainmaster.system.service.lifecycle import Life, State

HOST = "a-host-with-a-long-name.in.the.cluster.example.com"
VALUES = {"train/loss": 1.5, "train/gradient_norm": 1.1, "train/learning_rate": 0.001, "performance/tokens_per_s": 5165}


def status(step: int) -> RunStatus:
    worker = WorkerStatus(rank=0, host=HOST, pid=7, state="busy", call="call train", call_s=1.0, heard_s=0.1)
    return RunStatus(
        run="test",
        state="running",
        state_s=1.0,
        up_s=2.0,
        epoch=1,
        host=HOST,
        pid=6,
        num_workers=1,
        workers=(worker,),
        step=step,
        num_steps=10,
        values=VALUES,
    )


class Master:
    """Answers twice, a step further each time; then it ends as it is told to, and is gone."""

    def __init__(self) -> None:
        self.end: Callable[[], None] = lambda: None
        self._step = 0

    def ask(self, *_: object, **__: object) -> RunStatus:
        self._step += 1
        if self._step <= 2:
            return status(self._step)
        self.end()
        raise RunError("no master answered at ipc:///nowhere within 3 s")


@pytest.fixture
def master(monkeypatch: pytest.MonkeyPatch) -> Master:
    made = Master()
    monkeypatch.setattr(operate, "ask", made.ask)
    monkeypatch.setattr(operate, "_REFRESH_S", 0.0)
    return made


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    """Of the run `test` in the folder, whose process is this one."""
    directory = tmp_path / "test"
    directory.mkdir()
    with claim(directory):
        yield Life(directory, "test", "ipc:///nowhere")


def stop(life: Life, reason: str = "") -> None:
    life.enter(State.STOPPING)
    life.enter(State.STOPPED, reason)


def follow(run: str, directory: Path, *, as_json: bool = False) -> None:
    operate.status(run, directory, None, True, as_json)


def test_elsewhere_than_on_a_terminal_each_status_is_a_block(
    master: Master, life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[str] = []
    monkeypatch.setattr(operate.time, "sleep", lambda _: seen.append(capsys.readouterr().out))
    master.end = lambda: stop(life)
    follow("test", tmp_path)
    assert [block.splitlines()[0] for block in seen] == [
        f"test: running for 1.0 s, step {step} of 10 (up 2.0 s, pid 6 on {HOST})" for step in (1, 2)
    ]
    assert all(block.endswith(" ago\n\n") and f"0       {HOST}  7" in block for block in seen), "whole, at once"
    assert capsys.readouterr().out == "test: stopped\n"


def test_for_programs_each_status_is_a_line_and_so_is_the_end(
    master: Master, life: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    master.end = lambda: stop(life, "stopped before its end")
    follow("test", tmp_path, as_json=True)
    *found, end = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["state"], each["step"]) for each in found] == [("running", 1), ("running", 2)]
    assert (end["run"], end["state"], end["reason"]) == ("test", "stopped", "stopped before its end")


def test_nothing_is_cut_at_the_width_of_a_terminal(
    master: Master, life: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "70")
    master.end = lambda: stop(life)
    follow("test", tmp_path)
    shown = Text.from_ansi(capsys.readouterr().out).plain
    assert max(map(len, shown.splitlines())) <= 70
    assert f"pid 6 on \n{HOST})" in shown
    assert "train/learning_rate 0.001  \nperformance/tokens_per_s 5165\n" in shown
    assert "\u2026" not in shown
    assert shown.splitlines()[-1] == "test: stopped"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_failure_is_an_error_with_its_reason(
    as_json: bool, master: Master, life: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    master.end = lambda: life.enter(State.FAILED, "worker 1 (pid 7 on here) closed its connection")
    with pytest.raises(RunError, match=r"^test: failed: worker 1 \(pid 7 on here\) closed its connection$"):
        follow("test", tmp_path, as_json=as_json)
    assert ('"state":"failed"' in capsys.readouterr().out) == as_json


def test_a_run_whose_process_is_gone_is_lost(master: Master, tmp_path: Path):
    (tmp_path / "test").mkdir()
    process = claim(tmp_path / "test")
    Life(tmp_path / "test", "test", "ipc:///nowhere")
    master.end = process.close
    with pytest.raises(RunError, match=r"^test: lost: its process is gone and has not said how it ended$"):
        follow("test", tmp_path)


@pytest.mark.parametrize("run", ["tcp://10.0.0.1:5555", "test"])
@pytest.mark.usefixtures("master", "life")
def test_where_nothing_says_how_it_ended_its_master_is_gone(run: str, tmp_path: Path):
    """By an address; or by a directory that says that it goes on."""
    with pytest.raises(RunError, match=r"^test: its master is gone, or does not answer any more \(no master answered"):
        follow(run, tmp_path)
