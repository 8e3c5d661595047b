"""The model worker: one process, one device. Registers, then executes requests until the master says stop.

    rpc thread        heartbeats, requests in, replies out
    main thread       the compute lane: calls, and whatever belongs to a model
    transfer thread   the transfer lane: data in, data between workers, data out

A request that raises is answered with its traceback; the worker lives on, and the master decides.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, assert_never

from ..api.errors import ConfigError
from ..api.experiment_file import ExperimentFile
from ..system.rpc.client import Client
from ..system.rpc.commands import Redistribute, Save, ShardFile
from ..system.rpc.messages import PROTOCOL_VERSION, Failure, Lane, Register, Reply, Request, Success
from ..system.service.addresses import own_address
from ..system.service.failpoints import failpoint
from ..system.service.logs import log_to_file

if TYPE_CHECKING:
    from .handlers import Handlers

logger = logging.getLogger(__name__)
T = TypeVar("T")


def serve(file: ExperimentFile, master: str, advertise: str | None) -> None:
    """Runs a worker until its master ends the run. Raises `ConfigError` if the master refuses it."""
    failpoint("worker.register")
    register = Register(
        protocol=PROTOCOL_VERSION,
        host=socket.gethostname(),
        pid=os.getpid(),
        incarnation=uuid.uuid4().hex,
        address=advertise or own_address(master),
        code_digest=file.code_digest,
    )
    client = Client(master, register)
    from .handlers import Handlers  # torch and transformers, which take seconds: while the others register

    welcome = client.welcome(file.experiment.run.deadlines.register_s)
    log_to_file(Path(welcome.log_directory) / f"worker-{welcome.rank}.log")
    loaded = file.resolve(welcome.overrides)
    if loaded.experiment_digest != welcome.experiment_digest:
        raise ConfigError(
            "FILE",
            str(file.file),
            "its experiment comes out differently here than at the master",
            "see what it depends on",
        )
    Worker(client, Handlers(welcome, loaded, register.address)).run()
    client.close()


class Worker:
    """Executes the requests of both lanes."""

    def __init__(self, client: Client, handlers: Handlers) -> None:
        self._client, self._handlers = client, handlers

    def run(self) -> None:
        transfer = threading.Thread(target=self._serve, args=(Lane.TRANSFER,), name="transfer", daemon=True)
        transfer.start()
        self._serve(Lane.COMPUTE)
        transfer.join()

    def _serve(self, lane: Lane) -> None:
        while (request := self._client.next_request(lane)) is not None:
            self._client.reply(self._answer(request))

    def _answer(self, request: Request) -> Reply:
        seconds: dict[str, float] = {}
        outcome: Success | Failure
        try:
            outcome = self._execute(request, seconds)
        except Exception as error:
            logger.exception("%s failed", request.command.type)
            outcome = _failure(error)
        return Reply(run=request.run, epoch=request.epoch, id=request.id, outcome=outcome, seconds=seconds)

    def _execute(self, request: Request, seconds: dict[str, float]) -> Success:
        files: list[ShardFile] = []
        for hook in request.pre_hooks:
            self._run_hook(hook, files, seconds)
        result = _timed(request.command.type, seconds, lambda: self._handlers.execute(request.command))
        for hook in request.post_hooks:
            self._run_hook(hook, files, seconds)
        return Success(result=result, files=tuple(files))

    def _run_hook(self, hook: Redistribute | Save, files: list[ShardFile], seconds: dict[str, float]) -> None:
        match hook:
            case Redistribute():
                _timed(hook.type, seconds, lambda: self._handlers.redistribute(hook))
            case Save():
                files.append(_timed(hook.type, seconds, lambda: self._handlers.save(hook)))
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
