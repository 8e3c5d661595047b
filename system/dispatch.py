"""Sending a call to all workers of its model, and what their answers and failures mean together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..api.errors import PeerLost, RemoteError, first_cause
from .rpc.peer import Answer, Asked
from .rpc.server import Server

_CAUSE_GRACE_S = 3.0


async def settle(server: Server, *asked: Asked) -> list[dict[int, Answer]]:
    """Waits for all answers, of each by rank. At the first failure, raises its cause.

    When one worker dies, its neighbours fail too, and often report first: "connection closed by peer" is a symptom. So
    before such an error is raised, the worker that caused it gets a moment to be found out.
    """
    try:
        await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
        errors = _errors(asked)
        if errors and all(_is_symptom(error) for error in errors):
            server.probe()
            await _wait_for_cause(server, asked)
            errors = _errors(asked)
        if errors:
            if server.lost.done():
                server.lost.result()
            raise min(errors, key=_is_symptom)
        return [each.answers for each in asked]
    finally:
        for each in asked:
            each.cancel()


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


async def _wait_for_cause(server: Server, asked: Sequence[Asked]) -> None:
    deadline_s = asyncio.get_running_loop().time() + _CAUSE_GRACE_S
    while not server.lost.done() and all(_is_symptom(error) for error in _errors(asked)):
        left_s = deadline_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            return
        news: list[asyncio.Future[Any]] = [each.news() for each in asked if not each.is_settled]  # Any: nothing
        await asyncio.wait([*news, server.lost], timeout=left_s, return_when=asyncio.FIRST_COMPLETED)


def _errors(asked: Sequence[Asked]) -> list[Exception]:
    return [error for each in asked for error in each.errors]


def _is_symptom(error: BaseException) -> bool:
    return isinstance(error, RemoteError) and error.kind == PeerLost.__name__
