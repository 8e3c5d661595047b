"""The model worker: one process, one device. Registers, then executes requests until the master says stop.

    rpc thread        heartbeats, requests in, replies out
    main thread       the compute lane: calls, and whatever belongs to a model
    transfer thread   the transfer lane: data in, data between workers, data out

A request that raises is answered with its traceback; the worker lives on, and the master decides. One that takes longer
than its deadline ends the process (see `alarm`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import platform
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, assert_never

from ..api.errors import ConfigError
from ..api.experiment_file import ExperimentFile
from ..system.rpc.client import EXIT_RUN_FAILED, Client
from ..system.rpc.commands import (
    CallFunction,
    CallModel,
    Command,
    Hook,
    Offload,
    Reshard,
    Save,
    ShardFile,
)
from ..system.rpc.messages import Failure, Lane, Register, Reply, Request, Success, Welcome, stacks_name
from ..system.service.addresses import own_address
from ..system.service.failpoints import failpoint
from ..system.service.figures import health_of_worker
from ..system.service.health import HealthServer, Latest
from ..system.service.keys import ClientKeys
from ..system.service.logs import at, log_to_file
from ..system.service.notify import notify
from .alarm import Alarm
from .tally import Tally

if TYPE_CHECKING:
    from .handlers import Handlers

logger = logging.getLogger(__name__)
T = TypeVar("T")


def serve(
    file: ExperimentFile,
    master: str,
    advertise: str | None,
    keys: ClientKeys | None,
    health: tuple[str, int] | None = None,
) -> int:
    """Runs a worker until its master ends the run. `health` is where to answer operators.

    Returns an exit code; raises `ConfigError` if it is refused.
    """
    failpoint("worker.register")
    register = Register(
        host=socket.gethostname(),
        pid=os.getpid(),
        incarnation=uuid.uuid4().hex,
        address=advertise or own_address(master),
        devices=tuple(sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))),
        versions={"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        code_digest=file.code_digest,
    )
    latest = Latest()
    with contextlib.nullcontext() if health is None else HealthServer(*health, latest):
        client = Client(master, register, file.experiment.run.deadlines.silence_s, keys)
        return _serve(file, register, client, latest)


def _serve(file: ExperimentFile, register: Register, client: Client, latest: Latest) -> int:
    tally = Tally(client)

    def report() -> None:
        latest.post(health_of_worker(tally.figures()))
        notify("WATCHDOG=1")

    client.on_tick = report
    notify("READY=1")  # it looks for its master; the rest is up to that
    gc.disable()  # to look through what the imports make, again and again, takes a quarter of their time
    from .handlers import Handlers  # torch and transformers, which take seconds: while the others register

    gc.freeze()
    gc.enable()
    welcome = client.welcome(file.experiment.run.deadlines.register_s)
    log = Path(welcome.log_directory) / f"worker-{welcome.rank}.log"
    log_to_file(log, welcome.run, as_json=welcome.log_json)

    def set_up(welcome: Welcome) -> Handlers:
        loaded = file.resolve(welcome.overrides)
        if loaded.experiment_digest != welcome.experiment_digest:
            raise ConfigError(
                "FILE",
                str(file.file),
                f"the experiment comes out differently on worker {welcome.rank} ({register.host}) than at the master",
                "make the file independent of its host",
            )
        return Handlers(welcome, loaded, register.address)

    Worker(client, set_up, Alarm(Path(welcome.log_directory) / stacks_name(register)), tally).run()
    notify("STOPPING=1")
    client.close()
    return 0 if client.shutdown is not None and client.shutdown.is_done else EXIT_RUN_FAILED


class Worker:
    """Executes the requests of all lanes. Sets itself up at an epoch's first, so that the master hears of a failure."""

    def __init__(self, client: Client, set_up: Callable[[Welcome], Handlers], alarm: Alarm, tally: Tally) -> None:
        self._client, self._set_up, self._alarm, self._tally = client, set_up, alarm, tally
        self._handlers: Handlers | None = None
        self._epoch = 0
        self._setting_up = threading.Lock()
        client.on_epoch = self._abandon

    def run(self) -> None:
        lanes = [
            threading.Thread(target=self._serve, args=(lane,), name=lane, daemon=True)
            for lane in Lane
            if lane is not Lane.COMPUTE
        ]
        for thread in lanes:
            thread.start()
        self._serve(Lane.COMPUTE)
        for thread in lanes:
            thread.join()
        if self._handlers is not None:
            logger.info("%d values are left in the store", self._handlers.num_stored)

    def _abandon(self) -> None:
        """Has whatever waits for workers of an old epoch fail. Safe from any thread."""
        if (handlers := self._handlers) is not None:
            handlers.abandon()

    def _ready(self, epoch: int) -> Handlers:
        with self._setting_up:
            if self._handlers is None or self._epoch != epoch:
                welcome = self._client.current
                assert welcome is not None, "requests follow a welcome"
                if self._handlers is not None:
                    self._handlers.close()
                    self._handlers = None  # its memory is for those who follow
                self._handlers, self._epoch = self._set_up(welcome), epoch
            return self._handlers

    def _serve(self, lane: Lane) -> None:
        try:
            while (asked := self._client.next_request(lane)) is not None:
                self._answer(*asked)
        except BaseException:
            logger.exception("the %s lane broke down: this worker ends", lane)
            logging.shutdown()
            os._exit(1)

    def _answer(self, request: Request, left_s: float) -> None:
        seconds: dict[str, float] = {}
        with at(step=request.step, call=_name(request.command)):
            try:
                with self._alarm.within(left_s), self._tally.executing(request):
                    self._reply(request, self._execute(request, seconds), seconds)
            except Exception as error:
                logger.exception("%s failed", request.command.type)
                self._reply(request, _failure(error), seconds)

    def _reply(self, request: Request, outcome: Success | Failure, seconds: dict[str, float]) -> None:
        self._client.reply(
            Reply(
                run=request.run,
                epoch=request.epoch,
                id=request.id,
                outcome=outcome,
                seconds=seconds,
                is_unasked=request.is_silent,
            )
        )

    def _execute(self, request: Request, seconds: dict[str, float]) -> Success:
        handlers = self._ready(request.epoch)
        files: list[ShardFile] = []
        for hook in request.pre_hooks:
            _run_hook(handlers, hook, files, seconds)
        result = _timed(request.command.type, seconds, lambda: handlers.execute(request.command, request.step))
        for hook in request.post_hooks:
            _run_hook(handlers, hook, files, seconds)
        return Success(result=result, files=tuple(files))


def _name(command: Command) -> str:
    return command.call if isinstance(command, CallModel | CallFunction) else command.type


def _run_hook(handlers: Handlers, hook: Hook, files: list[ShardFile], seconds: dict[str, float]) -> None:
    match hook:
        case Save():
            files += _timed(hook.type, seconds, lambda: handlers.save(hook))
        case Reshard():
            _timed(hook.type, seconds, lambda: handlers.reshard(hook))
        case Offload():
            _timed(hook.type, seconds, lambda: handlers.offload(hook))
        case _:
            assert_never(hook)


def _timed(name: str, seconds: dict[str, float], action: Callable[[], T]) -> T:
    start = time.perf_counter()
    try:
        return action()
    finally:
        before = seconds.get(name, 0.0)
        seconds[name] = before + time.perf_counter() - start


def _failure(error: Exception) -> Failure:
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, ConfigError):
        return Failure(
            kind=type(error).__name__,
            message=str(error),
            traceback=trace,
            field=error.field,
            value=str(error.value),
            rule=error.rule,
            cure=error.cure,
        )
    return Failure(kind=type(error).__name__, message=str(error), traceback=trace)
