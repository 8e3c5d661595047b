"""deploy/two_hosts.sh, the walk-through of docs/services.md: what it shows is so, and it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import what_is_missing
from workbench import Workbench

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "two_hosts.sh"
TAKES_S = 240.0
"""The whole of it, on a busy machine; a minute on an idle one."""


@pytest.fixture(autouse=True)
def namespaces() -> None:
    if (reason := what_is_missing()) is not None:
        pytest.skip(reason)


def start(workbench: Workbench, *arguments: str) -> subprocess.Popen[str]:
    """The script, with this Python's `trainmaster` first in its PATH and a folder of its own for what is temporary."""
    program, temporary = workbench.folder / "bin" / "trainmaster", workbench.folder / "tmp"
    program.parent.mkdir()
    temporary.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m trainmaster "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [str(SCRIPT), *arguments],
        env=os.environ | {"TRAINMASTER_TEST": workbench.mark, "PATH": path, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workbench.started.append(process)
    return process


def what_is_left(workbench: Workbench, script: subprocess.Popen[str]) -> list[str]:
    """Processes, namespaces and a temporary folder that the script made."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    found = [f"process {pid}" for pid in workbench.wait_until_gone(2.0)]
    found += [line for line in listed.splitlines() if line.startswith(f"two-hosts-{script.pid}-")]
    return found + [str(path) for path in (workbench.folder / "tmp").glob("tmp.*")]  # torch leaves a folder of its own


def losses(directory: Path) -> list[float]:
    entries = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [entry["train/loss"] for entry in entries if "train/loss" in entry]


@pytest.mark.fault
def test_a_stranger_can_follow_it(workbench: Workbench) -> None:
    folder = workbench.folder / "hosts"
    script = start(workbench, str(folder))
    out, err = script.communicate(timeout=TAKES_S)
    print(out, err)
    assert script.returncode == 0
    # what the run was at, at each step
    seen = [(state, int(step)) for state, step in re.findall(r"^the run is (\w+), at step (\d+)$", out, re.MULTILINE)]
    (first, began), (second, paused), (third, went_on) = seen
    assert (first, second, third) == ("running", "paused", "running")
    assert 20 <= began <= paused
    assert f"two seconds later: paused {paused}\n" in out
    assert went_on >= paused + 20
    for shown in (r"^arithmetic-sft: running for ", r"^train/loss ", r"^0 +(one|two) ", r"^1 +(one|two) "):
        assert re.search(shown, out, re.MULTILINE), "status -f"
    assert re.findall(r"the (\w+)(?: on (\w+))? ended with 0\n", out) == [
        ("master", ""),
        ("worker", "one"),
        ("worker", "two"),
    ]
    # what came of it
    run, one_command = folder / "shared" / "arithmetic-sft", folder / "shared" / "one-command"
    num_steps = len(losses(run))
    assert num_steps >= went_on
    assert losses(run) == losses(one_command)
    assert f"all {num_steps} losses are equal\n" in out
    assert (run / "checkpoints" / f"step-{num_steps}" / "config.json").is_file()
    assert json.loads((run / "service.json").read_text())["state"] == "stopped"
    # the other machine got one key and no other, and nothing stayed
    assert [path.name for path in (folder / "two").rglob("*.key")] == ["worker-1.key"]
    assert not list((folder / "shared").rglob("*.key"))
    assert what_is_left(workbench, script) == []


@pytest.mark.fault
def test_it_leaves_nothing_when_it_is_cut_short(workbench: Workbench) -> None:
    script = start(workbench)
    assert script.stdout is not None
    assert any(line.startswith("the run is running") for line in script.stdout), script.communicate()
    assert len(workbench.pids_of("worker")) == 2
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=30)
    assert script.returncode == 128 + signal.SIGTERM
    assert what_is_left(workbench, script) == []
