"""Hosts that lose each other: both sides know in time, what was asked before counts no longer, and nothing runs twice.

Hosts are network namespaces. In whole runs, workers train; in tests of the control plane alone, a small master asks
small workers for echoes all the time, and all of them write down what they do and when, on one clock.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar  # Any: what a diary's lines hold

import pytest
from namespaces import Host, hosts_on_a_switch, start_python, what_is_missing
from trainmaster.system.rpc.client import EXIT_MASTER_LOST, EXIT_RUN_FAILED
from wire import free_address
from workbench import Workbench, logged_s, wait_for_step

PORT = 5555
SILENCE_S = 5.0
"""What `run.deadlines.silence_s` is by default."""
MARGIN_S = 1.0
"""On top of a deadline."""
ORPHAN_S = 1.0
"""What `run.deadlines.orphan_s` is by default."""
PARTITION_S, INTERRUPTION_S = 12.0, 2.0
PIPELINE, ENDLESS = ("--model.layout.pp", "2"), ("--run.steps", "100000")
START_S = 60.0
"""For processes to start and to import what they need."""
T = TypeVar("T")
Process = subprocess.Popen[str]

MASTER = """
import asyncio, json, sys, time
from pathlib import Path
import numpy as np
from trainmaster.system.rpc.commands import Echo
from trainmaster.system.rpc.messages import Welcome
from trainmaster.system.rpc.server import Server

address, diary, options = sys.argv[1], open(sys.argv[2], "a"), json.loads(sys.argv[3])
epoch, num_workers, deadline_s = options["epoch"], options["num_workers"], options["deadline_s"]

def note(event, **facts):
    diary.write(json.dumps({"event": event, "at_s": time.monotonic(), **facts}) + "\\n")
    diary.flush()

def welcome(rank):
    return Welcome(
        run="test", epoch=epoch, rank=rank, num_workers=num_workers, num_local_workers=1, overrides=(),
        experiment_digest="", log_directory="", orphan_s=options["orphan_s"], silence_s=5.0,
    )

lost = set()

def ask(server, rank, number):
    def settled(future):
        error = "" if future.cancelled() else str(future.exception() or "")
        content = -1 if error or future.cancelled() else int(future.result()[rank].success.result.content[0][0])
        note("settled", number=number, rank=rank, error=error, content=content)
        if "it died or was cut off" in error and rank not in lost:
            lost.add(rank)
            note("lost", rank=rank, error=error)

    echo = Echo(content=(np.array([number]),))
    note("submitted", number=number, rank=rank)
    server.ask({rank: echo}, name=f"echo {number}", deadline_s=deadline_s).add_done_callback(settled)

async def main():
    server = Server(address, "test", epoch, num_workers, "digest", 5.0, Path.cwd())
    async with server:
        await server.workers(60)
        server.welcome(welcome)
        note("welcomed")
        end_s, number = time.monotonic() + options["life_s"], 0
        while time.monotonic() < end_s:
            for rank in range(num_workers):
                if number < options["num_requests"] and rank not in lost:
                    number += 1
                    ask(server, rank, number)
            await asyncio.sleep(0.1)

asyncio.run(main())
"""
"""Asks every worker for an echo ten times a second, up to `num_requests` in all, in a life of `life_s`."""

WORKER = """
import json, logging, os, socket, sys, threading, time
from trainmaster.api.errors import TrainmasterError
from trainmaster.system.rpc.client import Client
from trainmaster.system.rpc.commands import Echoed
from trainmaster.system.rpc.messages import Lane, Register, Reply, Success

address, diary, options = sys.argv[1], open(sys.argv[2], "a"), json.loads(sys.argv[3])
writing = threading.Lock()

def note(event, **facts):
    with writing:
        diary.write(json.dumps({"event": event, "at_s": time.monotonic(), **facts}) + "\\n")
        diary.flush()

class Diary(logging.Handler):
    def emit(self, record):
        note("log", text=record.getMessage())

logging.basicConfig(level=logging.INFO, handlers=[Diary()])
next_epoch = threading.Event()
threading.Event().wait(options["wait_s"])
client = Client(address, Register(
    host=socket.gethostname(), pid=os.getpid(), incarnation=f"{socket.gethostname()}-{os.getpid()}",
    address=address, versions={}, code_digest="digest",
), 5.0)
client.on_epoch = next_epoch.set
note("welcomed", rank=client.welcome(60.0).rank)
while (asked := client.next_request(Lane.COMPUTE)) is not None:
    request, _ = asked
    number = int(request.command.content[0][0])
    note("began", number=number, epoch=request.epoch)
    if request.epoch == 1:
        next_epoch.wait(options["takes_s"])
    content = (request.command.content[0] + 1000 * request.epoch,)
    client.reply(Reply(
        run=request.run, epoch=request.epoch, id=request.id, seconds={},
        outcome=Success(result=Echoed(content=content)),
    ))
client.close()
note("over")
"""
"""Answers echoes, each after `takes_s` or when epoch 1 is over, with their number and 1000 times the epoch."""


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Where the master is, and another. To be asked for before the workbench, which clears the processes away."""
    if (reason := what_is_missing()) is not None:
        pytest.skip(reason)
    with hosts_on_a_switch(2) as (here, there):
        yield here, there


def wait_for(what: Callable[[], T | None], deadline_s: float) -> T:
    """The first result that is not None, False or empty."""
    end_s = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < end_s, f"nothing within {deadline_s} s"
        time.sleep(0.02)
    return found


# -- whole runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """A run with a worker on either host, in its third step or later."""

    master: Process
    here: Process
    there: Process
    logs: Path

    def logged_s(self, service: str, pattern: str) -> float | None:
        return logged_s(self.logs / f"{service}.log", pattern)


def start_run(workbench: Workbench, hosts: tuple[Host, Host], *overrides: str) -> Run:
    here, _ = hosts
    address, file = f"tcp://{here.address}:{PORT}", str(workbench.file)
    bind = ("--bind", address, "--insecure-plain-tcp")
    master = start_python(workbench, here, "-m", "trainmaster", "master", file, *bind, *PIPELINE, *overrides)
    nearby, remote = [
        start_python(workbench, host, "-m", "trainmaster", "worker", file, "--master", address) for host in hosts
    ]
    wait_for_step(master, 3)
    return Run(master, nearby, remote, workbench.folder / "runs" / "test" / "logs")


@pytest.mark.fault
def test_a_partition_ends_the_run_on_both_sides(hosts: tuple[Host, Host], workbench: Workbench) -> None:
    run = start_run(workbench, hosts, *ENDLESS)
    hosts[1].cut_off()
    start_s = time.time()
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.there.wait(PARTITION_S)
    time.sleep(max(0.0, start_s + PARTITION_S - time.time()))
    hosts[1].join()
    for process in (run.there, run.here, run.master):
        process.wait(10)
    worker = [run.logged_s(f"worker-{rank}", "the master .* this worker ends") for rank in range(2)]
    master_s = (run.logged_s("master", " ERROR .* sent no sign of life") or math.inf) - start_s
    worker_s = min(each for each in (*worker, math.inf) if each is not None) - start_s
    print(f"partition: master knew after {master_s:.2f} s, worker ended after {worker_s:.2f} s")
    assert run.master.returncode == 1
    assert run.there.returncode == EXIT_MASTER_LOST
    assert workbench.wait_until_gone(1.0) == []
    assert master_s < SILENCE_S + MARGIN_S
    assert worker_s < SILENCE_S + ORPHAN_S + MARGIN_S


@pytest.mark.fault
def test_a_host_that_vanishes_is_known_within_the_silence(hosts: tuple[Host, Host], workbench: Workbench) -> None:
    run = start_run(workbench, hosts, *ENDLESS)
    hosts[1].vanish()
    start_s = time.time()
    _, err = run.master.communicate(timeout=20)
    seen_s = (run.logged_s("master", " ERROR .* sent no sign of life") or math.inf) - start_s
    print(f"host gone: master knew after {seen_s:.2f} s")
    assert run.master.returncode == 1
    assert re.search(r"worker \d \(pid .*\) sent no sign of life for \d s \(run\.deadlines\.silence_s\)", err)
    assert seen_s < SILENCE_S + MARGIN_S
    assert run.here.wait(5) == EXIT_RUN_FAILED


@pytest.mark.fault
@pytest.mark.parametrize("how", ["silence", "closed"])
def test_a_run_goes_on_after_an_interruption(hosts: tuple[Host, Host], workbench: Workbench, how: str) -> None:
    steps = ("--run.steps", "150")
    workbench.run_undisturbed(*PIPELINE, *steps)
    run = start_run(workbench, hosts, *steps)
    interrupt(hosts[1], how)
    num_steps, start_s = len(workbench.series("train/loss")), time.monotonic()
    _, err = run.master.communicate(timeout=60)
    print(f"{how}: {num_steps} of 150 steps before it, over {time.monotonic() - start_s:.2f} s after it")
    assert run.master.returncode == 0, err
    assert (run.here.wait(5), run.there.wait(5)) == (0, 0)
    assert num_steps < 150
    for key in ("train/loss", "train/gradient_norm"):
        assert workbench.series(key) == workbench.series(key, "undisturbed"), key


def interrupt(host: Host, how: str) -> None:
    """Cuts a host off for two seconds, or closes its connections to the master."""
    if how == "silence":
        host.cut_off()
        time.sleep(INTERRUPTION_S)
        host.join()
    elif host.close_connections(PORT) == 0:
        pytest.skip("this kernel does not close connections on demand (CONFIG_INET_DIAG_DESTROY)")


# -- the control plane alone ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Plane:
    """A master here, a worker beside it, and others there; what they did, by their diaries."""

    workbench: Workbench
    address: str
    workers: list[str] = field(default_factory=list)

    def start_master(self, host: Host | None, name: str = "master", **options: float) -> Process:
        defaults = {"epoch": 1, "num_workers": 1, "orphan_s": 60.0, "deadline_s": 60.0, "num_requests": 10_000}
        return self._start(host, MASTER, name, defaults | options)

    def start_worker(self, host: Host | None, name: str, takes_s: float, wait_s: float = 0.0) -> Process:
        self.workers.append(name)
        return self._start(host, WORKER, name, {"takes_s": takes_s, "wait_s": wait_s})

    def _start(self, host: Host | None, script: str, name: str, options: dict[str, float]) -> Process:
        arguments = ("-c", script, self.address, str(self.workbench.folder / name), json.dumps(options))
        return start_python(self.workbench, host, *arguments)

    def events(self, name: str, event: str, contains: str = "") -> list[dict[str, Any]]:
        path = self.workbench.folder / name
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        found = [json.loads(line) for line in lines if contains in line]
        return [each for each in found if each["event"] == event]

    def began(self) -> dict[int, list[float]]:
        """When each request began, as often as it did."""
        times = defaultdict(list)
        for name in self.workers:
            for each in self.events(name, "began"):
                times[each["number"]].append(each["at_s"])
        return times

    def settled(self) -> dict[int, dict[str, Any]]:
        return {each["number"]: each for each in self.events("master", "settled")}


@pytest.fixture
def plane(hosts: tuple[Host, Host], workbench: Workbench) -> Plane:
    return Plane(workbench, f"tcp://{hosts[0].address}:{PORT}")


def start_plane(plane: Plane, hosts: tuple[Host, Host], **options: float) -> list[Process]:
    """A master and a worker here, three workers there. Returns all when every worker has begun its first request."""
    names = ["w0", "w1", "w2", "w3"]
    processes = [plane.start_master(hosts[0], num_workers=len(names), **options)]
    for at, name in enumerate(names):  # at different moments of a second: ZeroMQ's pings keep to that
        processes.append(plane.start_worker(hosts[at > 0], name, takes_s=0.05, wait_s=0.27 * at))
    for name in names:
        wait_for(lambda name=name: plane.events(name, "began"), START_S)
    return processes


def wait_all(processes: list[Process]) -> None:
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err


@pytest.mark.fault
@pytest.mark.parametrize("num_requests", [4, 10_000], ids=["idle", "busy"])
def test_both_sides_know_of_a_partition(hosts: tuple[Host, Host], plane: Plane, num_requests: int) -> None:
    processes = start_plane(plane, hosts, num_requests=num_requests, orphan_s=0.0, life_s=24.0)
    hosts[1].cut_off()
    start_s = time.monotonic()
    time.sleep(PARTITION_S)
    hosts[1].join()
    for process in processes[2:]:
        process.wait(20)
    ended_s = [plane.events(f"w{at}", "log", "this worker ends")[0]["at_s"] - start_s for at in (1, 2, 3)]
    lost_s = [each["at_s"] - start_s for each in plane.events("master", "lost")]
    print(
        f"partition of 12 s: master knew after {', '.join(f'{each:.2f}' for each in lost_s)} s, "
        f"workers after {', '.join(f'{each:.2f}' for each in ended_s)} s"
    )
    assert [process.returncode for process in processes[2:]] == [EXIT_MASTER_LOST] * 3
    assert len(lost_s) == 3
    assert max(lost_s) < SILENCE_S + MARGIN_S
    assert max(ended_s) < SILENCE_S + MARGIN_S


@pytest.mark.fault
def test_after_a_partition_nothing_old_is_executed(hosts: tuple[Host, Host], plane: Plane) -> None:
    deadline_s = 3.0
    processes = start_plane(plane, hosts, deadline_s=deadline_s, orphan_s=60.0, life_s=30.0)
    hosts[1].cut_off()
    start_s = time.monotonic()
    time.sleep(PARTITION_S)
    hosts[1].join()
    healed_s = time.monotonic()
    for process in processes[2:]:
        process.wait(20)
    refused_s = [plane.events(f"w{at}", "log", "it was given up as lost")[0]["at_s"] - healed_s for at in (1, 2, 3)]
    wait_all(processes)
    submitted = {each["number"]: each["at_s"] for each in plane.events("master", "submitted")}
    settled = plane.settled()
    late, unwanted = {}, {}
    for number, (at_s, *again) in plane.began().items():
        assert again == [], f"echo {number} was executed {len(again)} times more"
        if at_s > submitted[number] + deadline_s:
            late[number] = round(at_s - submitted[number], 2)
        if settled[number]["error"] and at_s > settled[number]["at_s"]:
            unwanted[number] = round(at_s - start_s, 2)
    print(
        f"partition of 12 s: workers refused {', '.join(f'{each:.2f}' for each in refused_s)} s after it ended; "
        f"{len(late)} began after their deadlines, {len(unwanted)} after the master had given them up"
    )
    assert [process.returncode for process in processes] == [0, 0, *[EXIT_MASTER_LOST] * 3]
    assert late == {}
    assert unwanted == {}


@pytest.mark.fault
@pytest.mark.parametrize("how", ["silence", "closed"])
def test_an_interruption_loses_and_repeats_nothing(hosts: tuple[Host, Host], plane: Plane, how: str) -> None:
    processes = start_plane(plane, hosts, num_requests=200, life_s=12.0)
    interrupt(hosts[1], how)
    wait_all(processes)
    began, settled = plane.began(), plane.settled()
    slowest_s = max(settled[each["number"]]["at_s"] - each["at_s"] for each in plane.events("master", "submitted"))
    print(f"{how}: the slowest of {len(began)} echoes took {slowest_s:.2f} s")
    assert [process.returncode for process in processes] == [0] * 5
    assert sorted(began) == sorted(settled) == list(range(1, 201))
    assert [number for number, times in began.items() if len(times) > 1] == []
    assert [each for number, each in settled.items() if each["content"] != number + 1000] == []


@pytest.mark.fault
def test_what_expires_in_an_interruption_is_not_executed_after_it(hosts: tuple[Host, Host], plane: Plane) -> None:
    processes = start_plane(plane, hosts, num_requests=200, deadline_s=0.5, life_s=12.0)
    interrupt(hosts[1], "silence")
    wait_all(processes)
    settled = plane.settled()
    unwanted = {
        number: round(max(times) - settled[number]["at_s"], 2)
        for number, times in plane.began().items()
        if settled[number]["error"] and max(times) > settled[number]["at_s"]
    }
    print(f"silence of 2 s: {len(unwanted)} of 200 requests with 0.5 s began after the master had given them up")
    assert unwanted == {}


# -- masters that go away ---------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("orphan_s", [1.0, 3.0])
def test_workers_of_a_killed_master_wait_as_long_as_they_are_told(workbench: Workbench, orphan_s: float) -> None:
    overrides = () if orphan_s == ORPHAN_S else ("--run.deadlines.orphan_s", str(orphan_s))
    master, workers = start_local_run(workbench, free_address(), *overrides)
    master.kill()
    start_s = time.monotonic()
    ended_s = []
    for worker in workers:
        worker.wait(orphan_s + 10)
        ended_s.append(time.monotonic() - start_s)
    print(f"master SIGKILL, orphan_s {orphan_s:g}: workers gone after {', '.join(f'{s:.2f}' for s in ended_s)} s")
    assert [worker.returncode for worker in workers] == [EXIT_MASTER_LOST] * 2
    for rank in range(2):
        log = (workbench.folder / "runs" / "test" / "logs" / f"worker-{rank}.log").read_text()
        assert re.search(r" ERROR .*the master closed its connection.* and did not come back: this worker ends", log)
    assert workbench.wait_until_gone(1.0) == []
    assert orphan_s <= max(ended_s) < orphan_s + MARGIN_S


@pytest.mark.fault
def test_waiting_workers_outlive_a_second_master_that_is_refused(workbench: Workbench) -> None:
    """Until runs resume: the run's directory exists, so a second master of the same run does not begin."""
    address = free_address()
    master, workers = start_local_run(workbench, address, "--run.deadlines.orphan_s", "30")
    master.kill()
    master.wait(10)
    second = workbench.start("master", str(workbench.file), "--bind", address, *PIPELINE)
    _, err = second.communicate(timeout=60)
    print(f"second master: exit code {second.returncode}: {err.strip()}")
    assert second.returncode == 2
    assert "the run directory" in err
    assert "exists already" in err
    assert [worker.poll() for worker in workers] == [None, None]


@pytest.mark.fault
def test_waiting_workers_do_not_serve_the_master_of_another_run(workbench: Workbench) -> None:
    """They end, and its own workers train as if nothing had been."""
    workbench.run_undisturbed(*PIPELINE)
    address = free_address()
    master, workers = start_local_run(
        workbench, address, "--run.deadlines.orphan_s", "30", "--optimizer.learning_rate", "0.03"
    )
    master.kill()
    master.wait(10)
    options = ("--run.name", "other", "--run.deadlines.setup_s", "15")
    other = workbench.start("master", str(workbench.file), "--bind", address, *PIPELINE, *options)
    start_s = time.monotonic()
    assert [worker.wait(10) for worker in workers] == [EXIT_MASTER_LOST] * 2
    print(f"another run's master: workers gone after {time.monotonic() - start_s:.2f} s")
    for worker in workers:
        assert worker.stderr is not None
        assert "it belongs to the run test, and this master's is other" in worker.stderr.read()
    own = [workbench.start("worker", str(workbench.file), "--master", address) for _ in workers]
    _, err = other.communicate(timeout=60)
    assert other.returncode == 0, err
    assert [worker.wait(10) for worker in own] == [0, 0]
    assert workbench.series("train/loss", "other") == workbench.series("train/loss", "undisturbed")


def start_local_run(workbench: Workbench, address: str, *overrides: str) -> tuple[Process, list[Process]]:
    file = str(workbench.file)
    master = workbench.start("master", file, "--bind", address, *PIPELINE, *ENDLESS, *overrides)
    workers = [workbench.start("worker", file, "--master", address) for _ in range(2)]
    wait_for_step(master, 3)
    return master, workers


@pytest.mark.fault
def test_a_waiting_worker_joins_the_next_epoch(workbench: Workbench) -> None:
    plane = Plane(workbench, free_address())
    first = plane.start_master(None, "first", life_s=60.0, num_requests=2)
    worker = plane.start_worker(None, "worker", takes_s=60.0)
    wait_for(lambda: plane.events("worker", "began"), START_S)
    first.kill()
    first.wait(10)
    second = plane.start_master(None, "master", epoch=2, life_s=3.0, num_requests=1)
    (welcomed,) = wait_for(lambda: plane.events("master", "welcomed"), START_S)
    wait_all([second, worker])
    began = [(each["epoch"], each["number"]) for each in plane.events("worker", "began")]
    took_s = plane.events("worker", "began")[-1]["at_s"] - welcomed["at_s"]
    print(f"second master: first request of epoch 2 began {1000 * took_s:.0f} ms after the welcome")
    assert (second.returncode, worker.returncode) == (0, 0)
    assert began == [(1, 1), (2, 1)], "the request that waited in epoch 1 is dropped"
    assert {number: each["content"] for number, each in plane.settled().items()} == {1: 2001}, "not epoch 1's answer"
