"""Where services log: standard error, and a file of each service in the run directory once there is one.

Every line says where it was: run, service, step, call. A thread or task says so with `at`; what it starts inherits it.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar, Token
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

MAX_FILE_BYTES, NUM_OLD_FILES = 16 * 2**20, 4
"""A full file becomes `NAME.log.1`, which becomes `NAME.log.2`, and so on."""


@dataclass(frozen=True, slots=True)
class Where:
    """What a line belongs to; 0 and empty where that does not apply."""

    run: str = ""
    service: str = ""
    step: int = 0
    call: str = ""

    def __str__(self) -> str:
        step = f"step {self.step}" if self.step else ""
        return " ".join(part for part in (self.run, self.service, step, self.call) if part)


_where: ContextVar[tuple[int, str]] = ContextVar("where", default=(0, ""))
"""Step and call."""


class at:
    """Lines that are logged inside belong to this step, this call. As cheap as can be: it surrounds every request."""

    __slots__ = ("_call", "_step", "_token")
    _token: Token[tuple[int, str]]

    def __init__(self, *, step: int | None = None, call: str | None = None) -> None:
        self._step, self._call = step, call

    def __enter__(self) -> None:
        step, call = _where.get()
        self._token = _where.set(
            (step if self._step is None else self._step, call if self._call is None else self._call)
        )

    def __exit__(self, *_: object) -> None:
        _where.reset(self._token)


class _Service(logging.Filter):
    """Says where each record was; never drops one."""

    def __init__(self, run: str, service: str) -> None:
        super().__init__()
        self._run, self._service = run, service

    def filter(self, record: logging.LogRecord) -> bool:
        step, call = _where.get()
        record.where = Where(self._run, self._service, step, call)
        return True


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(where)s] %(name)s: %(message)s")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        where: Where = record.__dict__["where"]
        line: dict[str, str | int] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "run": where.run,
            "service": where.service,
            "step": where.step,
            "call": where.call,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Stderr:
    """Whatever `sys.stderr` is at the moment: while a progress line moves, that puts lines above it."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def log_to_stderr(level: int = logging.INFO) -> None:
    """Called once by each service at its start. Files get everything from INFO on, whatever the level here."""
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=_Stderr(), force=True)
    logging.getLogger().handlers[0].setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def log_to_file(path: Path, run: str, *, as_json: bool) -> None:
    """Also logs to this file, whose stem is the service's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8")
    handler.setFormatter(_Json() if as_json else _Text())
    handler.addFilter(_Service(run, path.stem))
    logging.getLogger().addHandler(handler)
