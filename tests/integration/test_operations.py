"""A run that is operated from outside: seen, paused, stopped."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from typing import Any  # what JSON holds

from workbench import Workbench

LAYOUT = ("--model.layout.pp", "2")


def call(workbench: Workbench, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = workbench.start(*arguments)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def status(workbench: Workbench) -> dict[str, Any]:
    done = call(workbench, "status", "test", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def until(workbench: Workbench, state: str, step: int = 0) -> dict[str, Any]:
    end_s = time.monotonic() + 60
    while True:
        found = status(workbench)
        if found["state"] == state and found["step"] >= step:
            return found
        assert time.monotonic() < end_s, found


def test_a_run_is_started_seen_paused_and_stopped(workbench: Workbench) -> None:
    done = workbench.run("--run.name", "undisturbed", *LAYOUT, "--run.steps", "40")
    assert done.returncode == 0, done.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--detach", "--health-host", "127.0.0.1", "--health-port", str(port))
    starter = workbench.start("run", str(workbench.file), *LAYOUT, "--run.steps", "100000", *flags)
    out, err = starter.communicate(timeout=60)
    assert starter.returncode == 0, err
    assert "test runs as process" in out
    until(workbench, "running", step=3)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
        assert answer.read() == b"ok\n"
    assert "test: pauses after the step" in call(workbench, "pause", "test").stdout
    paused = until(workbench, "paused")
    assert [worker["state"] for worker in paused["workers"]] == ["idle", "idle"]
    again = status(workbench)
    assert (again["state"], again["step"]) == ("paused", paused["step"])
    listed = call(workbench, "ps").stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["test", "paused"], ["undisturbed", "stopped"]]
    shown = call(workbench, "status", "test").stdout
    assert f"step {paused['step']} of 100000" in shown
    assert "train/loss" in shown
    call(workbench, "unpause", "test")
    until(workbench, "running", step=paused["step"] + 1)
    follower = workbench.start("status", "test", "-f", "--json")
    assert follower.stdout is not None
    assert json.loads(follower.stdout.readline())["state"] == "running"
    assert "stops and saves after the step" in call(workbench, "stop", "test").stdout
    followed, err = follower.communicate(timeout=30)
    assert follower.returncode == 0, err
    assert json.loads(followed.splitlines()[-1])["state"] == "stopped"
    assert workbench.wait_until_gone(20.0) == []
    losses = workbench.series("train/loss")
    assert (workbench.folder / "runs" / "test" / "checkpoints" / f"step-{len(losses)}" / "config.json").is_file()
    assert losses[:40] == workbench.series("train/loss", "undisturbed")[: len(losses)]
    logs = call(workbench, "logs", "test").stdout
    assert "master " in logs.splitlines()[0]
    assert "asked to stop" in logs
    ended = call(workbench, "status", "test")
    assert ended.returncode == 2
    assert "it is stopped" in ended.stderr


def test_a_run_that_hangs_can_be_seen_and_ended(workbench: Workbench) -> None:
    process = workbench.start("run", str(workbench.file), *LAYOUT, TRAINMASTER_FAILPOINT="worker.train_step@1=spin")
    end_s = time.monotonic() + 60
    while not (workbench.folder / "runs" / "test" / "service.json").exists():
        assert time.monotonic() < end_s
        time.sleep(0.02)
    until(workbench, "running", step=1)
    while (found := status(workbench))["workers"][1]["state"] != "unresponsive":
        assert time.monotonic() < end_s, found
    assert found["workers"][1]["call"] == "call train"
    assert found["workers"][1]["call_s"] > 2
    call(workbench, "stop", "test", "--now")
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert workbench.wait_until_gone(5.0) == []
