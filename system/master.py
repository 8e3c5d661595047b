"""The master: composition root of a run. Opens what the run needs, in order, and closes it.

bind -> workers register -> groups -> datasets -> models -> steps -> shut down
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..api.algorithms import Generation
from ..api.errors import Interrupted, first_cause
from ..api.experiment_file import LoadedExperiment
from ..api.experiments.base import CompiledExperiment
from ..api.graph import CallKind
from .cadence import Cadence, plan_cadence
from .cluster import Cluster
from .control import Control
from .describe import Foretell, schedule_of
from .dispatch import located
from .evaluation import Evaluator
from .monitoring.metrics import MetricsLog
from .monitoring.progress import ProgressLine
from .rpc.commands import DatasetOpened
from .rpc.server import Server
from .service.health import HealthServer, Latest
from .service.keys import MasterKeys
from .service.lifecycle import Life, State
from .service.logs import log_to_file
from .service.notify import notify
from .storage import Storage
from .trainer import Trainer

logger = logging.getLogger(__name__)

_REASON_CHARACTERS = 2000
_COLLECTED_AFTER = 100_000
"""New objects."""


async def run_master(
    loaded: LoadedExperiment,
    address: str,
    keys: MasterKeys | None,
    health: tuple[str, int] | None = None,
    foretell: Foretell | None = None,
    is_recorded: bool = False,
) -> None:
    """Runs an experiment to its end. The run directory exists and is ours. `health` is where to answer operators;
    `foretell` says of trainings what the log tells at the start. `is_recorded`: takes one step only, which workers
    record; nothing is evaluated or saved.

    Raises `ConfigError` for what only the workers could find wrong, `RunError` for what went wrong on the way, and
    `Interrupted` on SIGINT or SIGTERM.
    """
    interrupted: list[signal.Signals] = []
    task = asyncio.current_task()
    assert task is not None, "inside a running loop"

    def interrupt(number: signal.Signals) -> None:
        interrupted.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    try:
        with contextlib.ExitStack() as stack:
            latest = Latest()
            if health is not None:
                stack.enter_context(HealthServer(*health, latest))
            await _run(loaded, address, keys, latest, lambda: interrupt(signal.SIGTERM), foretell, is_recorded)
    except asyncio.CancelledError:
        if not interrupted:
            raise
        raise Interrupted(interrupted[0]) from None
    except BaseExceptionGroup as group:
        raise first_cause(group) from group


async def _run(
    loaded: LoadedExperiment,
    address: str,
    keys: MasterKeys | None,
    latest: Latest,
    end_now: Callable[[], object],
    foretell: Foretell | None,
    is_recorded: bool,
) -> None:
    compiled, directory = loaded.compiled, loaded.compiled.run.path.resolve()
    collect_rarely()
    log_to_file(directory / "logs" / "master.log", compiled.run.name, as_json=compiled.run.log_json)
    server = Server(
        address,
        run=compiled.run.name,
        epoch=time.time_ns() // 10**6,  # no two lives of a master share one
        num_workers=compiled.num_workers,
        code_digest=loaded.code_digest,
        silence_s=compiled.run.deadlines.silence_s,
        log_directory=directory / "logs",
        keys=keys,
    )
    life = Life(directory, compiled.run.name, server.address)
    control = Control(life, server, compiled.num_workers, end_now)
    metrics = MetricsLog(directory)
    try:
        with ProgressLine() as progress:
            async with server, asyncio.TaskGroup() as group:
                others = [group.create_task(_watch(server)), group.create_task(control.report(latest))]
                await run_epoch(loaded, server, directory, metrics, progress, control, foretell, is_recorded)
                life.enter(State.STOPPING)
                for task in others:
                    task.cancel()
        life.enter(State.STOPPED)
    except BaseException as error:
        _note_end(life, error)
        raise
    finally:
        notify("STOPPING=1")
        metrics.close()


def collect_rarely() -> None:
    """Metadata of sequences are many objects without cycles: to look through them for some, again and again, takes a
    fifth of the master's time with a thousand workers."""
    gc.freeze()
    gc.set_threshold(_COLLECTED_AFTER, 20, 100)


def _note_end(life: Life, error: BaseException) -> None:
    if isinstance(error, asyncio.CancelledError):  # told to, by a signal or by an order
        life.enter(State.STOPPING)
        life.enter(State.STOPPED, "stopped before its end")
    else:
        life.enter(State.FAILED, str(first_cause(error))[:_REASON_CHARACTERS])


async def _watch(server: Server) -> None:
    """Ends the run when a worker is lost, also while nothing is asked of it."""
    await asyncio.shield(server.lost)


async def run_epoch(
    loaded: LoadedExperiment,
    server: Server,
    directory: Path,
    metrics: MetricsLog,
    progress: ProgressLine,
    control: Control,
    foretell: Foretell | None = None,
    is_recorded: bool = False,
) -> None:
    """From workers that register to the last step. Raises `RunError` if a worker is lost on the way.

    `foretell`, `is_recorded`: see `run_master`.
    """
    compiled, storage = loaded.compiled, Storage()
    if is_recorded:
        compiled = replace(compiled, evaluations=())
    cluster = Cluster(server, replace(loaded, compiled=compiled), is_recorded)
    with located(server, lambda: f"set-up of run {compiled.run.name}"):
        progress.note(f"{compiled.run.name}: waiting for {compiled.num_workers} workers at {server.address}")
        control.life.enter(State.STARTING)
        workers = await cluster.assemble(directory / "logs")
        control.life.enter(State.READY)
        opened = await cluster.open_dataset(compiled.training)
        cadence = plan_cadence(compiled.run, opened.num_sequences, compiled.training.graph.batch_size)
        if is_recorded:
            cadence = replace(cadence, num_steps=1, is_saved=False)
        evaluators = [
            Evaluator(fed, await cluster.open_dataset(fed), compiled, server, storage, cluster.token_readers)
            for fed in compiled.evaluations
        ]
        await cluster.open_functions()
        num_parameters = await cluster.load_models(cadence.num_steps)
    for role, placed in compiled.models.items():
        layout = placed.model.layout
        trained = "" if placed.optimizer is None else f", {schedule_of(layout)},"
        progress.note(
            f"{role}: {num_parameters[role]:,} parameters, dp={layout.dp} pp={layout.pp}{trained} "
            f"on workers {', '.join(f'{rank} ({workers[rank].host})' for rank in placed.ranks)}"
        )
    _describe_batches(compiled, cadence, opened, progress, foretell)
    await Trainer(
        compiled, cadence, server, storage, evaluators, metrics, progress, control, cluster.token_readers
    ).run()


def _describe_batches(
    compiled: CompiledExperiment,
    cadence: Cadence,
    opened: DatasetOpened,
    progress: ProgressLine,
    foretell: Foretell | None,
) -> None:
    """Says what batch, minibatch and microbatch mean here, in sequences and tokens, and how full pipelines are."""
    fed, mean = compiled.training, opened.num_tokens / opened.num_sequences
    progress.note(
        f"{fed.dataset_field}: {opened.num_sequences:,} sequences, {opened.num_tokens:,} tokens, longest "
        f"{opened.longest} tokens ({opened.longest_id}); {cadence.num_steps:,} steps = "
        f"{cadence.num_steps * fed.graph.batch_size / opened.num_sequences:.2f} passes"
    )
    rows, pipelines = [], []
    for call in fed.graph.model_calls:
        layout, largest = compiled.models[call.model].model.layout, call.microbatching.max_tokens
        length = mean + call.settings.sampling.max_new_tokens if isinstance(call.settings, Generation) else mean
        share = call.minibatch_size * length / layout.dp
        num_microbatches = max(call.microbatching.min_count, -(-int(share) // largest))
        unit = "an optimizer step" if call.kind is CallKind.TRAIN_STEP else "a request"
        if foretell is not None and call.kind is CallKind.TRAIN_STEP and (told := foretell(layout, num_microbatches)):
            pipelines.append(f"{call.name}: about {num_microbatches} microbatches, {schedule_of(layout)}: {told}")
        for name, what, sequences in (
            ("batch", "a step", float(call.batch_size)),
            ("minibatch", unit, float(call.minibatch_size)),
            (f"microbatch (at most {largest:,} tokens)", "a pipeline slot", share / length / num_microbatches),
        ):
            rows.append((call.name, name, what, f"{sequences:,.1f}".removesuffix(".0"), f"{sequences * length:,.0f}"))
    progress.table("sizes", ("call", "unit", "is", "sequences", "tokens (about)"), rows)
    for line in pipelines:
        progress.note(line)
