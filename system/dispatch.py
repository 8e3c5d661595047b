"""Sending a call to all workers of its model, and what their answers and failures mean together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..api.errors import PeerLost, RemoteError
from .rpc.peer import Answer
from .rpc.server import Server

_CAUSE_GRACE_S = 3.0


async def settle(server: Server, futures: Sequence[asyncio.Future[Answer]]) -> list[Answer]:
    """Waits for all answers, in order. At the first failure, raises its cause.

    When one worker dies, its neighbours fail too, and often report first: "connection closed by peer" is a symptom. So
    before such an error is raised, the worker that caused it gets a moment to be found out.
    """
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        errors = _errors(futures)
        if errors and all(_is_symptom(error) for error in errors):
            server.probe()
            await _wait_for_cause(server, futures)
            errors = _errors(futures)
        if errors:
            if server.lost.done():
                server.lost.result()
            raise min(errors, key=_is_symptom)
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def first_cause(error: BaseException) -> BaseException:
    """The first error in a (nested) group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextlib.contextmanager
def located(server: Server, where: Callable[[], str]) -> Iterator[None]:
    """Notes with an error where in the run it was, unless that was noted closer to it."""
    try:
        yield
    except BaseException as error:
        lost = server.lost  # who watches for a loss has had this cancelled, perhaps
        cause = (lost.exception() if lost.done() else None) or first_cause(error)
        if not getattr(cause, "__notes__", ()):
            cause.add_note(where())
        raise


async def _wait_for_cause(server: Server, futures: Sequence[asyncio.Future[Answer]]) -> None:
    deadline_s = asyncio.get_running_loop().time() + _CAUSE_GRACE_S
    while not server.lost.done() and all(_is_symptom(error) for error in _errors(futures)):
        waiting: list[asyncio.Future[Any]] = [
            future for future in futures if not future.done()
        ]  # Any: answers, or a loss
        left_s = deadline_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            return
        await asyncio.wait([*waiting, server.lost], timeout=left_s, return_when=asyncio.FIRST_COMPLETED)


def _errors(futures: Sequence[asyncio.Future[Answer]]) -> list[BaseException]:
    done = [future.exception() for future in futures if future.done() and not future.cancelled()]
    return [error for error in done if error is not None]


def _is_symptom(error: BaseException) -> bool:
    return isinstance(error, RemoteError) and error.kind == PeerLost.__name__
