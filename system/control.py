"""What people ask of a run while it goes on: its status, a pause, an early end. The trainer heeds it between steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from .rpc.inquiries import Inquire, Order, RunStatus
from .rpc.server import Server
from .service.figures import health_of
from .service.health import Latest
from .service.lifecycle import Life, State
from .service.notify import notify, watchdog_s

logger = logging.getLogger(__name__)

TOKENS = "performance/tokens"
"""Of a step, among its figures."""
_REPORT_S = 1.0


class Control:
    """Knows how far the run is, and whether it should go on. `end_now` ends the run at once."""

    def __init__(self, life: Life, server: Server, num_workers: int, end_now: Callable[[], object]) -> None:
        self.life, self._server, self._num_workers, self._end_now = life, server, num_workers, end_now
        self.is_stopping = False
        """Whether the step that is under way is the last."""
        self._may_go_on = asyncio.Event()
        self._may_go_on.set()
        self._step, self._num_steps = 0, 0
        self._values: Mapping[str, float] = {}
        self._num_tokens = 0
        server.on_inquiry = self.answer

    @property
    def is_held(self) -> bool:
        """Whether no step may begin now."""
        return self.is_stopping or not self._may_go_on.is_set()

    async def begin(self, step: int, num_steps: int) -> bool:
        """Waits while the run is paused; then whether to take this step."""
        if not self._may_go_on.is_set() and not self.is_stopping:
            self.life.enter(State.RUNNING)  # a run may be told to pause before its first step
            self.life.enter(State.PAUSED)
            logger.info("paused before step %d", step)
            await self._may_go_on.wait()
        if self.is_stopping:
            return False
        self.life.enter(State.RUNNING)
        self._step, self._num_steps = step, num_steps
        return True

    def finished(self, values: Mapping[str, float]) -> None:
        """A step is done; these are its figures."""
        self._values = values
        self._num_tokens += round(values[TOKENS])

    async def report(self, latest: Latest) -> None:
        """Keeps operators and a supervisor informed, as long as the event loop goes round."""
        notify("READY=1")
        while True:
            status = self.status()
            server = self._server
            latest.post(health_of(status, self._num_tokens, server.roster.num_waiting(), server.num_refused))
            notify(f"WATCHDOG=1\nSTATUS={status.state}, step {status.step} of {status.num_steps}")
            await asyncio.sleep(min(_REPORT_S, watchdog_s() or _REPORT_S))

    def answer(self, inquire: Inquire) -> RunStatus:
        """Heeds an order, and says how things are."""
        if inquire.order is not Order.STATUS:
            logger.info("asked to %s", inquire.order)
        match inquire.order:
            case Order.PAUSE:
                self._may_go_on.clear()
            case Order.UNPAUSE:
                self._may_go_on.set()
            case Order.STOP:
                self.is_stopping = True
                self._may_go_on.set()
            case Order.STOP_NOW:
                self._end_now()
        return self.status()

    def status(self) -> RunStatus:
        entry, now_s = self.life.entry, time.time()
        return RunStatus(
            run=entry.run,
            state=entry.state,
            state_s=max(0.0, now_s - entry.since_s),
            up_s=max(0.0, now_s - entry.started_s),
            epoch=self._server.epoch,
            host=entry.host,
            pid=entry.pid,
            num_workers=self._num_workers,
            workers=self._server.roster.statuses(asyncio.get_running_loop().time()),
            step=self._step,
            num_steps=self._num_steps,
            values=dict(self._values),
        )
