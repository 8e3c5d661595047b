"""What the control plane costs the master of thousands of workers: its processor time for a step of GRPO.

    python benchmarks/control_plane_scale.py --json

The master's side is that of a run: Server on its sockets, SampleStream, Executor, buffer, storage, planner, codec and
event loop. The workers are simulated (`control_plane_workers.py`), in processes of their own on the other cores: they
speak the protocol over TCP, one connection each, and answer at once with the seconds that a real one would have taken.
The graph is GRPO's with a reference on the actor's workers, dp = workers / 8 and pp = 8 on hosts of 8; 16 sequences a
worker and step in groups of 8; one minibatch, 8 microbatches. Each size runs in a master process of its own, on one
core.

`master_share`   the processor time that the master takes of ten seconds with one step in them, as a part of one core:
                 that of its event loop's thread, the first column of the table below, over 10: executor, buffer,
                 planner, codec, what is said to sockets, and all Python there is
`process_share`  the same of all threads of the master, all four figures: what ZeroMQ's own do for the connections is in
                 it. Where they have no other core, it is this that limits the master. Before 2026-11-22 this was called
                 `master_share`, and the other `loop_share`

                                      the event loop's thread        ZeroMQ's own threads
    a step, without heartbeats        `step_loop_s`                  `step_zeromq_s`
    ten seconds of nothing else       `heartbeats_loop_s_per_10s`    `heartbeats_zeromq_s_per_10s`

The first row is the median of steps after the first, each less what the second row says of the time that it took. The
second is heartbeats and pings, ours and ZeroMQ's, at a run's default deadlines, while nothing is asked. `step_cpu_s`
and `heartbeats_cpu_s_per_10s` are the sums of the rows.

`parts`          of one more step, with timers around functions, which themselves cost some 2 us a call: planning,
                 encoding, sending, receiving (sockets, links, futures), decoding, executor (the rest of the event
                 loop: executor, buffer, storage, asyncio), zeromq (its own threads); heartbeats of its time are in them
`messages`, `megabytes`   that were sent and received in that step; heartbeats and pings of its time too
`blocked_s`      the longest time in that step in which the event loop attended to nothing else
`step_s`         how long a step took beside simulators on the other cores: for orientation only
`registered_s`   how long it took until all workers had connected and registered

What is not measured: the workers' own side; redistributions and anything else that workers do among themselves;
checkpoints, evaluation, metrics, logs and the health server; encryption (there are no keys); a network with loss or
delay. As workers answer at once, replies come in bursts, and a burst is cheaper to read than as many single messages.
On loopback a send is charged with part of its receipt. If other programs want the cores, simulators answer late,
messages are sent again, and figures are too high: `messages` tells.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any  # of functions that are timed, any; and what JSON holds
from unittest.mock import patch

import control_plane_workers as simulated
from trainmaster.api.experiment_file import LoadedExperiment
from trainmaster.api.experiments.base import CompiledExperiment
from trainmaster.system import redistribution, requests
from trainmaster.system.cluster import Cluster
from trainmaster.system.executor import Executor
from trainmaster.system.master import collect_rarely
from trainmaster.system.rpc import codec
from trainmaster.system.rpc.port import Port
from trainmaster.system.rpc.server import Server
from trainmaster.system.storage import Storage
from trainmaster.system.stream import SampleStream

SIZES = (8, 32, 128, 256, 512, 1024, 2048, 4096)
STEP_S = 10.0
BARS = {"master_share_at_1024": 0.05}
TICK_S = 0.002
PARTS = ("planning", "encoding", "sending", "receiving", "decoding", "zeromq", "executor")
COLUMNS = (
    "master_share",
    "process_share",
    "step_loop_s",
    "step_zeromq_s",
    "heartbeats_loop_s_per_10s",
    "heartbeats_zeromq_s_per_10s",
    "blocked_s",
    "messages",
    "megabytes",
    "step_s",
)


# -- the run ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def simulators(address: str, num_workers: int, silence_s: float) -> Iterator[None]:
    """One process for each core but the first, which is this one's."""
    cores = sorted(os.sched_getaffinity(0))
    others = cores[1:]
    count = min(max(1, len(others)), num_workers // simulated.STAGES)
    bounds = [num_workers * at // count for at in range(count + 1)]
    started = []
    for at in range(count):
        arguments = (address, range(*bounds[at : at + 2]), num_workers, silence_s, set(others))
        started.append(get_context("spawn").Process(target=simulated.serve, args=arguments, daemon=True))
    for process in started:
        process.start()
    os.sched_setaffinity(0, cores[:1])
    try:
        yield
    finally:
        for process in started:
            process.join(timeout=5)
            process.kill()


@contextlib.asynccontextmanager
async def training(num_workers: int) -> AsyncIterator[tuple[Callable[[], Any], float]]:
    """A run whose workers are ready. Yields what takes a step, and how long all needed to register."""
    compiled = simulated.compiled_experiment(num_workers)
    deadlines, storage = compiled.run.deadlines, Storage()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(
            "tcp://127.0.0.1:*",
            run=compiled.run.name,
            epoch=time.time_ns() // 10**6,
            num_workers=num_workers,
            code_digest=simulated.CODE_DIGEST,
            silence_s=deadlines.silence_s,
            log_directory=folder,
        )
        with simulators(server.address, num_workers, deadlines.silence_s):
            async with server:
                start_s = time.perf_counter()
                await server.workers(deadlines.register_s)
                registered_s = time.perf_counter() - start_s
                cluster = Cluster(server, loaded(compiled))
                await set_up(cluster, compiled, folder)
                graph = compiled.training.graph
                stream = SampleStream(server, storage, graph.name, deadlines.call_s)
                executor = Executor(graph, compiled, server, storage, token_readers=cluster.token_readers)

                numbers = itertools.count(1)

                async def step() -> None:
                    """As `Trainer` takes one."""
                    number = next(numbers)
                    samples = await stream.take(number, graph.batch_size)
                    stream.prefetch(number + 1, graph.batch_size)
                    traversal = await executor.admit(number, samples)
                    assert traversal.num_tokens > len(samples), "prompts were answered"

                async with executor:
                    yield step, registered_s


async def set_up(cluster: Cluster, compiled: CompiledExperiment, folder: Path) -> None:
    await cluster.assemble(folder)
    await cluster.open_dataset(compiled.training)
    await cluster.open_functions()
    await cluster.load_models(1)


def loaded(compiled: CompiledExperiment) -> LoadedExperiment:
    return LoadedExperiment(
        file=Path("scale.py"),
        overrides=(),
        experiment=None,  # type: ignore[arg-type]  # the master runs what it compiled to
        compiled=compiled,
        code_digest=simulated.CODE_DIGEST,
        experiment_digest="none",
    )


class Meter:
    """Processor time from now on, of this thread, which is the event loop's, and of all others, which are ZeroMQ's."""

    def __init__(self) -> None:
        self._wall_s, self._all_s, self._loop_s = time.perf_counter(), time.process_time(), time.thread_time()

    def read(self) -> tuple[float, float, float]:
        """Seconds that passed, of the loop's thread, and of ZeroMQ's."""
        loop_s = time.thread_time() - self._loop_s
        return time.perf_counter() - self._wall_s, loop_s, time.process_time() - self._all_s - loop_s


async def measure(num_workers: int, num_steps: int, idle_s: float) -> dict[str, Any]:
    async with training(num_workers) as (step, registered_s):
        await step()  # warm
        await asyncio.sleep(1.0)
        meter = Meter()
        await asyncio.sleep(idle_s)
        passed_s, loop_s, zeromq_s = meter.read()
        idle_loop, idle_zeromq = loop_s / passed_s, zeromq_s / passed_s
        readings = []
        for _ in range(num_steps):
            meter = Meter()
            await step()
            readings.append(meter.read())
        profile = await profiled(step)
    figures = {
        "step_loop_s": statistics.median(loop_s - idle_loop * passed_s for passed_s, loop_s, _ in readings),
        "step_zeromq_s": statistics.median(zeromq_s - idle_zeromq * passed_s for passed_s, _, zeromq_s in readings),
        "heartbeats_loop_s_per_10s": idle_loop * STEP_S,
        "heartbeats_zeromq_s_per_10s": idle_zeromq * STEP_S,
    }
    loop_s = figures["step_loop_s"] + figures["heartbeats_loop_s_per_10s"]
    return {
        "workers": num_workers,
        "sequences": num_workers * simulated.SEQUENCES_PER_WORKER,
        "master_share": loop_s / STEP_S,
        "process_share": sum(figures.values()) / STEP_S,
        "step_cpu_s": figures["step_loop_s"] + figures["step_zeromq_s"],
        "heartbeats_cpu_s_per_10s": figures["heartbeats_loop_s_per_10s"] + figures["heartbeats_zeromq_s_per_10s"],
        **figures,
        "step_s": statistics.median(passed_s for passed_s, _, _ in readings),
        "registered_s": registered_s,
        **profile,
    }


# -- what a step is made of -------------------------------------------------------------------------------------------


class Stopwatch:
    """Processor time of the event loop's thread, by part; what a part spends in another counts for that one only."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._part, self._since_s = "executor", time.thread_time()

    def enter(self, part: str) -> str:
        """From now on. Returns the part before."""
        now_s = time.thread_time()
        self.seconds[self._part] += now_s - self._since_s
        before, self._part, self._since_s = self._part, part, now_s
        return before

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            before = self.enter(part)
            try:
                return function(*arguments, **keywords)
            finally:
                self.enter(before)

        return wrapper


async def profiled(step: Callable[[], Any]) -> dict[str, Any]:
    """One step, with timers around the functions of which the parts consist."""
    watch, count = Stopwatch(), Counter[str]()

    def counted(function: Callable[..., Any], frames_at: int) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            count["messages"] += 1
            count["bytes"] += sum(map(len, arguments[frames_at]))
            return function(*arguments)

        return wrapper

    with contextlib.ExitStack() as stack:
        for part, owner, name, function in (
            ("planning", redistribution, "plan_redistribution", None),
            ("planning", requests, "cut", None),
            ("planning", requests, "read_by", None),
            ("encoding", codec, "encode_body", None),
            ("decoding", codec, "decode_body", None),
            ("sending", Port, "send", counted(Port.send, 2)),
            ("receiving", Port, "drain", None),
            ("receiving", Port, "_awake", None),
            ("receiving", Server, "_take", counted(Server._take, 3)),
        ):
            original = getattr(owner, name)
            timed = watch.timed(part, function or original)
            for place in [owner, *users(name, original)]:
                stack.enter_context(patch.object(place, name, timed))
        cpu_s = time.process_time()
        thread_s = watch._since_s = time.thread_time()
        async with blocked() as longest:
            await step()
        watch.enter("executor")
        others_s = time.process_time() - cpu_s - (time.thread_time() - thread_s)
    watch.seconds["zeromq"] = others_s
    return {
        "parts": {part: watch.seconds[part] for part in PARTS},
        "messages": count["messages"],
        "megabytes": count["bytes"] / 1e6,
        "blocked_s": max(longest),
    }


def users(name: str, function: object) -> list[Any]:
    """Modules of ours that have imported a function by its name."""
    modules = [module for at, module in list(sys.modules.items()) if at.startswith("trainmaster.system.")]
    return [module for module in modules if getattr(module, name, None) is function]


@contextlib.asynccontextmanager
async def blocked() -> AsyncIterator[list[float]]:
    """Times by which the loop was late for something."""
    loop, late = asyncio.get_running_loop(), [0.0]

    def tick(due_s: float) -> None:
        nonlocal timer
        late.append(loop.time() - due_s)
        timer = loop.call_later(TICK_S, tick, loop.time() + TICK_S)

    timer = loop.call_later(TICK_S, tick, loop.time() + TICK_S)
    try:
        yield late
    finally:
        timer.cancel()


# -- all sizes --------------------------------------------------------------------------------------------------------


def run_size(num_workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--one", str(num_workers)]
    command += ["--steps", str(options.steps), "--idle-seconds", str(options.idle_seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(line(figures) + "\n")
    return figures


def line(figures: dict[str, Any]) -> str:
    columns = "  ".join(f"{name} {figures[name]:,.3f}" for name in COLUMNS)
    return f"{figures['workers']:5} workers  {columns}"


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    heads = ["workers", "sequences", *COLUMNS, *PARTS]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        numbers = [f"{row[name]:,}" for name in heads[:2]]
        numbers += [f"{(row | row['parts'])[name]:,.{0 if name == 'messages' else 3}f}" for name in heads[2:]]
        lines.append(f"| {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--workers", type=int, nargs="*", default=SIZES, help="multiples of 8")
    parser.add_argument("--steps", type=int, default=5, help="that are measured, after one to warm up")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="in which heartbeats are measured")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        simulated.raise_file_limit()
        logging.disable(logging.WARNING)  # simulators that get no processor are called unresponsive, thousands of them
        collect_rarely()
        print(json.dumps(asyncio.run(measure(options.one, options.steps, options.idle_seconds))))
        return
    rows = [run_size(num_workers, options) for num_workers in options.workers]
    shares = {f"{name}_at_{row['workers']}": row[name] for name in ("master_share", "process_share") for row in rows}
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if options.json:
        print(json.dumps({**shares, "sizes": rows, "steps": options.steps, "machine": machine}))
        return
    print(table(rows))
    for name, bar in BARS.items():
        if name in shares:
            print(f"{name} {shares[name]:.4f} (bar {bar})")


if __name__ == "__main__":
    main()
