"""A pool of processes that call a user's reward function, each of which can be killed.

    score(items) --request--> process 0   one item (or one slice of the batch) at a time each
                 --request--> process 1   late, or ended: killed with all it started, replaced; the others go on

Guarantees: each item comes back with a value or a failure in words; a call takes `timeout_s` at most, from when its
process is asked, start-up apart; after `close` no process of the pool is left, and if this process dies, by whatever
cause, none is either. What a failure means for the run is not decided here: see `apply_policy`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import reprlib
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack  # type: ignore[import-untyped]

from ...api.errors import ConfigError, DeadlineExceeded, RewardError
from ...api.rewards import Item, Outcome, Reward, Scored, apply_policy
from .process import LENGTH_BYTES, MAX_FRAME_BYTES, frame, pack, unpack

__all__ = ["Item", "Outcome", "RewardPool", "Scored", "apply_policy"]

logger = logging.getLogger(__name__)

_START_S = 120.0
"""For a process to execute the experiment file, with whatever that imports."""
_END_S = 1.0
"""For idle processes to end by themselves, before they are killed."""
_KILL_S = 5.0
"""For the kernel to end a process that was killed."""
_CHUNK_BYTES = 2**18


class RewardPool:
    """`reward.processes` processes that score samples.

    They start at once, so that their imports overlap with other work; a file or function that is wrong shows at the
    first `score`. One caller at a time: others wait.

        with RewardPool(Path("experiment.py"), Reward(function="number_match")) as pool:
            outcome = apply_policy(pool.score(items), reward)
    """

    def __init__(self, file: Path, reward: Reward) -> None:
        self._reward = reward
        self._command = [str(file.resolve()), reward.function, *(["--batched"] if reward.is_batched else [])]
        self._lock = threading.RLock()
        self._is_closed = False
        self._selector = selectors.DefaultSelector()
        self._children: list[_Child] = []
        try:
            for _ in range(reward.processes):
                self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(self, items: Sequence[Item]) -> list[Scored]:
        """One result an item, in order. With `is_batched`, a call that fails is a failure of each item in its slice.

        Raises `ConfigError` if the file or the function is wrong, and `DeadlineExceeded` or `RewardError` if a process
        does not start; whatever it raises, the pool is closed then.
        """
        with self._lock:
            assert not self._is_closed, "the pool is closed"
            work = _Work(items)
            try:
                work.tasks.extend(self._tasks(work))
                while work.num_open:
                    self._turn(work)
            except BaseException:
                self.close()
                raise
            return [scored for scored in work.results if scored is not None]

    def close(self) -> None:
        """Ends all processes. May be called again."""
        with self._lock:
            self._is_closed = True
            for child in [child for child in self._children if not child.is_idle]:
                self._end(child)
            for child in self._children:
                child.close_requests()
            deadline = time.monotonic() + _END_S
            while self._children and (wait := deadline - time.monotonic()) > 0:
                for key, _ in self._selector.select(wait):
                    if not key.data.receive():
                        self._end(key.data)
            for child in list(self._children):
                self._end(child)
            self._selector.close()

    def _start(self) -> None:
        child = _Child(self._command)
        self._children.append(child)
        self._selector.register(child.replies, selectors.EVENT_READ, child)

    def _end(self, child: _Child) -> str:
        """Says how it ended: one that was about to end by itself is not changed by the kill."""
        for pipe in (child.replies, child.requests):
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe)
        self._children.remove(child)
        return child.end()

    def _replace(self, child: _Child) -> str:
        """The new one starts while others work, or until the next `score`."""
        how = self._end(child)
        self._start()
        return how

    def _tasks(self, work: _Work) -> Iterator[_Task]:
        """One an item, or one a process. An item that cannot be sent is a failure, and does not harm its batch."""
        packed: dict[int, bytes] = {}
        for at, item in enumerate(work.items):
            try:
                packed[at] = pack((item.prompt, item.response, dict(item.row)))
                if len(packed[at]) > MAX_FRAME_BYTES // 2:
                    raise ValueError(f"{len(packed[at])} bytes are too many")
            except (TypeError, ValueError, OverflowError) as error:
                packed.pop(at, None)
                work.fail([at], f"was not called, because its row cannot be sent: {error}")
        positions = list(packed)
        num_tasks = min(self._reward.processes, len(positions)) if self._reward.is_batched else len(positions)
        for index in range(num_tasks):
            part = positions[index * len(positions) // num_tasks : (index + 1) * len(positions) // num_tasks]
            yield _Task(part, frame(msgpack.Packer().pack_array_header(len(part)), *(packed[at] for at in part)))

    def _turn(self, work: _Work) -> None:
        """Waits for one thing to happen, and does what follows from it."""
        now = time.monotonic()
        has_work = bool(work.tasks) and any(child.is_idle for child in self._children)
        first = now if has_work else min(child.deadline for child in self._children)
        for key, events in self._selector.select(max(0.0, first - now)):
            child: _Child = key.data
            if child not in self._children:  # ended in this very turn
                continue
            if events & selectors.EVENT_WRITE:
                self._send(child, work)
            elif child.receive():
                self._hear(child, work)
            else:
                self._lose(child, work)
        # by the clock before the wait: a reply that was there in time counts, however late we come to read it
        for child in [child for child in self._children if child.deadline <= now]:
            self._expire(child, work)
        for child in self._children:
            if child.is_idle and work.tasks:
                child.ask(work.tasks.popleft(), self._reward.timeout_s)
                self._send(child, work)

    def _send(self, child: _Child, work: _Work) -> None:
        """Sends what the pipe takes, and asks to be told when it takes more."""
        is_waiting = child.requests in self._selector.get_map()
        try:
            child.send()
        except BrokenPipeError:
            self._lose(child, work)
            return
        if child.outgoing and not is_waiting:
            self._selector.register(child.requests, selectors.EVENT_WRITE, child)
        elif is_waiting and not child.outgoing:
            self._selector.unregister(child.requests)

    def _hear(self, child: _Child, work: _Work) -> None:
        """Reads a reply, if it is whole."""
        try:
            reply = child.take_reply()
        except ValueError as error:
            if not child.is_ready:
                raise RewardError(
                    f"the process of reward function `{self._reward.function}` wrote to its standard output before it "
                    f"was ours ({error}). Look what Python runs here at start-up, such as a sitecustomize"
                ) from None
            work.fail(child.positions, f"was killed, because its process sent what is no reply: {error}")
            self._replace(child)
            return
        if reply is None:
            return
        if child.is_ready:
            for at, (value, failure) in zip(child.positions, reply, strict=True):
                work.settle(at, value, failure)
        elif reply:
            raise ConfigError(*reply)
        child.rest()

    def _lose(self, child: _Child, work: _Work) -> None:
        """It ended, or closed its pipes."""
        task, was_ready, was_asked = child.task, child.is_ready, not child.outgoing
        how = self._replace(child)
        name = self._reward.function
        if not was_ready:
            raise RewardError(
                f"the process of reward function `{name}` {how} before it could be called. Its output, in that of this "
                "worker, may say why"
            )
        if task is None:
            logger.warning("an idle process of reward function `%s` %s; another one takes its place", name, how)
        elif was_asked or task.is_second_try:
            work.fail(task.positions, f"did not return: its process {how}")
        else:  # it was gone before it could be asked
            task.is_second_try = True
            work.tasks.appendleft(task)

    def _expire(self, child: _Child, work: _Work) -> None:
        if not child.is_ready:
            raise DeadlineExceeded(
                f"the process of reward function `{self._reward.function}` did not execute the experiment file within "
                f"{_START_S:g} s. Look what the file does when it is imported"
            )
        work.fail(child.positions, f"took longer than timeout_s = {self._reward.timeout_s:g}, and was killed")
        self._replace(child)


@dataclass(slots=True)
class _Task:
    """One call."""

    positions: list[int]
    """Of its items."""
    request: bytes
    is_second_try: bool = False


class _Work:
    """One `score`: what is asked, what waits for a process, what is known."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.tasks: deque[_Task] = deque()
        self.results: list[Scored | None] = [None] * len(items)
        self.num_open = len(items)

    def settle(self, at: int, value: float | None, failure: str | None) -> None:
        assert self.results[at] is None, f"item {at} is settled twice"
        self.results[at] = Scored(self.items[at].id, value, failure)
        self.num_open -= 1

    def fail(self, positions: Sequence[int], failure: str) -> None:
        for at in positions:
            self.settle(at, None, failure)


class _Child:
    """One process, and what is under way with it."""

    def __init__(self, command: Sequence[str]) -> None:
        interpreter = (sys.executable, "-u", "-X", "faulthandler")  # prints come out at once, and a crash's traceback
        held, self._lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*interpreter, "-m", f"{__package__}.process", *command, "--lifeline", str(held)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=(held,),
                start_new_session=True,  # a group of its own, which is killed as one
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(held)
        assert self.process.stdin is not None, "asked for"
        assert self.process.stdout is not None, "asked for"
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        for pipe in (self.requests, self.replies):
            os.set_blocking(pipe, False)
        self.is_ready = False
        self.task: _Task | None = None
        self.deadline = time.monotonic() + _START_S
        """Of its start or its call; infinite while it has nothing to do."""
        self.outgoing = memoryview(b"")
        self._incoming = bytearray()

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.task is None

    @property
    def positions(self) -> list[int]:
        return self.task.positions if self.task is not None else []

    def ask(self, task: _Task, timeout_s: float) -> None:
        self.task, self.outgoing = task, memoryview(task.request)
        self.deadline = time.monotonic() + timeout_s

    def rest(self) -> None:
        self.is_ready, self.task, self.deadline = True, None, math.inf

    def send(self) -> None:
        """What the pipe takes now. Raises `BrokenPipeError`."""
        with contextlib.suppress(BlockingIOError):
            while self.outgoing:
                self.outgoing = self.outgoing[os.write(self.requests, self.outgoing) :]

    def receive(self) -> bool:
        """Takes what there is. False: it has closed the pipe, which it does when it ends."""
        try:
            chunk = os.read(self.replies, _CHUNK_BYTES)
        except BlockingIOError:
            return True
        self._incoming += chunk
        return bool(chunk)

    def take_reply(self) -> list[Any] | None:  # Any: four strings before it is ready, then pairs
        """A whole reply, or None if there is none yet. Raises `ValueError` for anything that is no reply."""
        if len(self._incoming) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + int.from_bytes(self._incoming[:LENGTH_BYTES], "big")
        if end > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {end} bytes is over the limit of {MAX_FRAME_BYTES}")
        if len(self._incoming) < end:
            return None
        reply: list[Any] = unpack(self._incoming[LENGTH_BYTES:end])
        del self._incoming[:end]
        if not (self._is_reply(reply) if self.is_ready else _is_greeting(reply)):
            raise ValueError(f"{reprlib.repr(reply)} is neither a greeting nor a reply to what was asked")
        return reply

    def _is_reply(self, reply: object) -> bool:
        return isinstance(reply, list) and len(reply) == len(self.positions) and all(map(_is_verdict, reply))

    def close_requests(self) -> None:
        assert self.process.stdin is not None, "asked for"
        self.process.stdin.close()

    def end(self) -> str:
        """Kills whatever is left of its group, and says how the process itself ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS forbids it for one that has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None, "asked for"
            pipe.close()
        try:
            code = self.process.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            logger.error("process %s does not end although it was killed: the kernel holds it", self.process.pid)
            return "does not end"
        finally:
            os.close(self._lifeline)
        return f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"


def _is_greeting(reply: object) -> bool:
    """Nothing, or a refusal: field, value, rule and cure."""
    return isinstance(reply, list) and len(reply) in (0, 4) and all(isinstance(part, str) for part in reply)


def _is_verdict(pair: object) -> bool:
    match pair:
        case [float() as value, None]:
            return math.isfinite(value)
        case [None, str()]:
            return True
    return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
