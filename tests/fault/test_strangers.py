"""Whole runs with keys on an address that others reach, by the commands that people type, with others at the door.

Hosts are network namespaces: the master's with one worker, another with the second worker, and one for strangers.
Each test prints what it measured. The door itself is attacked in `test_security`.
"""

from __future__ import annotations

import fcntl
import json
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import strangers
from namespaces import Host, hosts_on_a_switch, start_python, what_is_missing
from trainmaster.system.rpc.client import EXIT_MASTER_LOST, EXIT_RUN_FAILED
from trainmaster.system.rpc.drops import INTERVAL_S
from trainmaster.system.rpc.zap import REREAD_S
from trainmaster.system.service.inquiry import ANSWER_S
from trainmaster.system.service.keys import load_operator_keys
from workbench import Workbench, wait_for_step

PORT, HEALTH_PORT = 5555, 9100
PIPELINE, ENDLESS = ("--model.layout.pp", "2"), ("--run.steps", "100000")
ATTACK_S = 9.0
"""Longer than a stranger may idle: all of them come twice."""
NUM_QUIET_STEPS = 60
"""Before the attack."""
MAX_SLOWDOWN = 4.0
"""Of a step. The crowd works on the cores that train."""
COUNTED_S, REVOKED_S = 5.0, 5.0
METRICS = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{HEALTH_PORT}/metrics').read().decode())"
Process = subprocess.Popen[str]


@dataclass(frozen=True, slots=True)
class Run:
    """A run without end that trains with keys, and where others may come from."""

    workbench: Workbench
    master: Process
    workers: tuple[Process, Process]
    hosts: list[Host]

    @property
    def address(self) -> str:
        return f"tcp://{self.hosts[0].address}:{PORT}"

    @property
    def keys(self) -> Path:
        return self.workbench.folder / "runs" / "test" / "keys"

    def start(self, *arguments: str, host: int = 0) -> Process:
        return start_python(self.workbench, self.hosts[host], "-m", "trainmaster", *arguments)

    def say(self, *arguments: str, host: int = 0) -> tuple[int, str, str]:
        """A command to its end: its exit code, and what it says."""
        process = self.start(*arguments, host=host)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def num_refused(self) -> int:
        out, err = start_python(self.workbench, self.hosts[0], "-c", METRICS).communicate(timeout=30)
        found = re.search(r"^trainmaster_connections_refused_total\S* (\d+)", out, re.MULTILINE)
        assert found, out + err
        return int(found[1])

    def log(self) -> str:
        return (self.workbench.folder / "runs" / "test" / "logs" / "master.log").read_text()

    def equals_one_command(self) -> bool:
        """Asserts that the run, which is over, took the same steps as one that nothing came near."""
        losses = self.workbench.series("train/loss")
        self.workbench.run_undisturbed(*PIPELINE, "--run.steps", str(len(losses)))
        return losses == self.workbench.series("train/loss", "undisturbed")


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if (reason := what_is_missing()) is not None:
        pytest.skip(reason)
    with hosts_on_a_switch(3) as made:
        yield made


@pytest.fixture
def run(hosts: list[Host], workbench: Workbench) -> Run:
    file, address = str(workbench.file), f"tcp://{hosts[0].address}:{PORT}"
    made = workbench.start("keys", file, *PIPELINE)
    assert made.wait(30) == 0, made.communicate()
    keys = workbench.folder / "runs" / "test" / "keys"
    bind = ("--bind", address, "--health-port", str(HEALTH_PORT))
    master = start_python(workbench, hosts[0], "-m", "trainmaster", "master", file, *bind, *PIPELINE, *ENDLESS)
    assert master.stdout is not None
    fcntl.fcntl(master.stdout, fcntl.F_SETPIPE_SZ, 2**20)  # a line a step, and nobody reads while others act
    first, second = [
        start_python(
            workbench,
            hosts[at],
            *("-m", "trainmaster", "worker", file, "--master", address, "--keys", str(keys / f"worker-{at}.key")),
        )
        for at in range(2)
    ]
    return Run(workbench, master, (first, second), hosts)


@pytest.mark.fault
def test_a_crowd_of_strangers_changes_nothing_for_a_run_that_trains(run: Run) -> None:
    wait_for_step(run.master, NUM_QUIET_STEPS)
    public = load_operator_keys(run.keys).master
    begun = len(run.workbench.series("train/loss"))
    crowd = start_python(run.workbench, run.hosts[2], strangers.__file__, run.address, public, str(ATTACK_S))
    time.sleep(1.0)
    answered_s = []
    for _ in range(3):
        start_s = time.monotonic()
        code, _, err = run.say("status", "test")
        answered_s.append(time.monotonic() - start_s)
        assert code == 0, err
    assert run.master.stdout is not None
    assert any(crowd.poll() is not None for _ in run.master.stdout), "it goes on until the crowd is gone"
    ended = len(run.workbench.series("train/loss"))
    out, err = crowd.communicate()
    assert crowd.returncode == 0, err
    seen = json.loads(out)
    num_came, end_s = sum(seen["came"].values()), time.monotonic() + COUNTED_S
    while (num_refused := run.num_refused()) < num_came:
        assert time.monotonic() < end_s, f"{num_refused} of {num_came} were counted"
    num_lines = run.log().count("dropped a message")
    run.say("stop", "test")
    _, err = run.master.communicate(timeout=60)
    assert run.master.returncode == 0, err
    assert [worker.wait(10) for worker in run.workers] == [0, 0]
    steps_s = run.workbench.series("seconds/step")
    quiet_s, beside_s = statistics.median(steps_s[10:begun]), statistics.median(steps_s[begun:ended])
    print(
        f"{seen['came']} in {seen['took_s']:.1f} s: {num_refused} refused, {num_lines} line(s) in the log; step "
        f"{1e3 * quiet_s:.1f} ms before, {1e3 * beside_s:.1f} ms beside them (x{beside_s / quiet_s:.2f}, worst "
        f"{1e3 * max(steps_s[begun:ended]):.0f} ms); status {', '.join(f'{each:.2f}' for each in answered_s)} s"
    )
    assert all(seen["came"][kind] > number for kind, number in strangers.NUM_STRANGERS.items())
    assert seen["num_heard"] == 0
    assert num_refused == pytest.approx(num_came, rel=0.05)
    assert 1 <= num_lines <= 1 + seen["took_s"] / INTERVAL_S
    assert max(answered_s) < ANSWER_S
    assert beside_s < MAX_SLOWDOWN * quiet_s
    assert run.equals_one_command()


@pytest.mark.fault
def test_who_has_no_good_key_steers_nothing(run: Run) -> None:
    """Strangers, and holders of keys that are good for something else. What they type is refused, and says why."""
    wait_for_step(run.master, 3)
    file = str(run.workbench.file)
    worker, operator, others = run.keys / "worker-1.key", run.keys / "operator.key", run.workbench.folder / "other"
    assert run.say("keys", str(others), "--workers", "2")[0] == 0
    join = ("worker", file, "--master", run.address)
    impatient = run.workbench.folder / "impatient.py"
    deadlines = "threads=1, deadlines=Deadlines(register_s=3)"
    text = run.workbench.file.read_text().replace("threads=1", deadlines)
    impatient.write_text(text.replace("import SFT", "import SFT, Deadlines"))
    wait = ("worker", str(impatient), "--master", run.address)
    tries = {
        "no key, to stop": (("stop", run.address, "--now"), "asks for keys, and none were given"),
        "another run's key, to stop": (("stop", run.address, "--keys", str(others)), "is likely of another run"),
        "a worker's key, to stop": (("stop", run.address, "--keys", str(worker)), "is the key of worker-1"),
        "an operator's key, to work": ((*join, "--keys", str(operator)), "is the key of operator"),
        "another worker's key, to work": ((*wait, "--keys", str(worker)), "the key worker-1 is in use by worker"),
    }
    for name, (arguments, reason) in tries.items():
        code, out, err = run.say(*arguments, host=2)
        print(f"{name}: {code}: {(out + err).strip().splitlines()[-1]}")
        assert code == 2, out + err
        assert reason in err
    run.say("stop", "test")
    _, err = run.master.communicate(timeout=60)
    assert run.master.returncode == 0, err
    assert [each.wait(10) for each in run.workers] == [0, 0]
    assert run.equals_one_command()


@pytest.mark.fault
def test_a_worker_whose_key_is_revoked_is_lost_to_its_run(run: Run) -> None:
    wait_for_step(run.master, 3)
    start_s = time.monotonic()
    code, out, _ = run.say("keys", str(run.keys), "--revoke", "worker-1")
    assert (code, "worker-1 is revoked" in out) == (0, True)
    _, err = run.master.communicate(timeout=30)
    took_s = time.monotonic() - start_s
    print(f"revoked: the run had ended after {took_s:.2f} s: {err.strip()}")
    assert run.master.returncode == 1
    assert re.search(r"^error: worker \d \(pid .* on .*\) had its key revoked( during [^:]*)?$", err, re.MULTILINE)
    assert "\nlikely: somebody ran `trainmaster keys --revoke`" in err
    assert "out of memory" not in err
    assert run.workers[1].wait(10) == EXIT_MASTER_LOST
    assert run.workers[0].wait(10) == EXIT_RUN_FAILED
    assert took_s < REREAD_S + REVOKED_S
