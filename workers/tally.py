"""What a worker has executed so far and what it is at, for operators."""

from __future__ import annotations

import time

from ..system.rpc.client import Client
from ..system.rpc.messages import Lane, Request
from ..system.service.figures import AtRequest, Executed, WorkerFigures

_At = dict[Lane, tuple[str, float]]
"""Command and start, by lane."""
_Done = dict[tuple[Lane, str], tuple[int, int, float]]
"""Requests, those of them that failed, and seconds, by lane and command."""


class _Executing:
    """Not a generator, which takes longer: it surrounds every request."""

    __slots__ = ("_at", "_command", "_done", "_lane")

    def __init__(self, lane: Lane, command: str, at: _At, done: _Done) -> None:
        self._lane, self._command, self._at, self._done = lane, command, at, done

    def __enter__(self) -> None:
        self._at[self._lane] = (self._command, time.monotonic())

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        _, start_s = self._at.pop(self._lane)
        which, taken_s = (self._lane, self._command), time.monotonic() - start_s
        number, num_failed, seconds = self._done.get(which, (0, 0, 0.0))
        self._done[which] = (number + 1, num_failed + (kind is not None), seconds + taken_s)


class Tally:
    """Written to by the thread of each lane, read from any."""

    def __init__(self, client: Client) -> None:
        self._client, self._start_s = client, time.monotonic()
        self._done: _Done = {}
        self._at: _At = {}

    def executing(self, request: Request) -> _Executing:
        """Counts a request; one that raises has failed."""
        return _Executing(request.lane, request.command.type, self._at, self._done)

    def figures(self) -> WorkerFigures:
        welcome, now_s = self._client.current, time.monotonic()
        return WorkerFigures(
            run="" if welcome is None else welcome.run,
            rank=None if welcome is None else welcome.rank,
            epoch=0 if welcome is None else welcome.epoch,
            is_connected=self._client.is_connected,
            up_s=now_s - self._start_s,
            executed=tuple(
                Executed(lane=lane, command=command, num_requests=number, num_failed=num_failed, seconds=seconds)
                for (lane, command), (number, num_failed, seconds) in list(self._done.items())
            ),
            executing=tuple(
                AtRequest(lane=lane, command=command, seconds=max(0.0, now_s - start_s))
                for lane, (command, start_s) in list(self._at.items())
            ),
            num_waiting=self._client.num_waiting(),
        )
