"""What a worker has executed so far and what it is at, for operators."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..system.rpc.client import Client
from ..system.rpc.messages import Lane, Request
from ..system.service.figures import AtRequest, Executed, WorkerFigures


class Tally:
    """Written to by the thread of each lane, read from any."""

    def __init__(self, client: Client) -> None:
        self._client, self._start_s = client, time.monotonic()
        self._done: dict[tuple[Lane, str], tuple[int, int, float]] = {}
        """Requests, those of them that failed, and seconds, by lane and command."""
        self._at: dict[Lane, tuple[str, float]] = {}

    @contextmanager
    def executing(self, request: Request) -> Iterator[None]:
        """Counts a request; one that raises has failed."""
        lane, command, start_s = request.lane, str(request.command.type), time.monotonic()
        self._at[lane] = (command, start_s)
        failed = 1
        try:
            yield
            failed = 0
        finally:
            del self._at[lane]
            number, num_failed, seconds = self._done.get((lane, command), (0, 0, 0.0))
            taken_s = time.monotonic() - start_s
            self._done[lane, command] = (number + 1, num_failed + failed, seconds + taken_s)

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
