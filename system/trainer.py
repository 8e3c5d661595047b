"""The run itself: steps, evaluations, checkpoints, and what is said about them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..api.experiments.base import CompiledExperiment
from ..api.graph import CallKind
from .cadence import Cadence
from .checkpoints import CheckpointFolder
from .control import TOKENS, Control
from .dispatch import located
from .evaluation import Evaluator
from .executor import Executor
from .monitoring.metrics import MetricsLog
from .monitoring.progress import ProgressLine
from .rpc.commands import Save, ShardFile
from .rpc.server import Server
from .service.logs import at
from .storage import Storage
from .stream import SampleStream
from .traversal import CALL_FUNCTION, CALL_MODEL, Traversal, warnings_of

logger = logging.getLogger(__name__)

SHOWN = (
    ("reward", "reward"),
    ("train", "loss"),
    ("train", "kl"),
    ("train", "entropy"),
    ("generate", "response_length"),
)
"""Call and statistic of what stands on the progress line, where there is such a thing."""


class Trainer:
    """Walks the graph step by step."""

    def __init__(
        self,
        compiled: CompiledExperiment,
        cadence: Cadence,
        server: Server,
        storage: Storage,
        evaluators: Sequence[Evaluator],
        metrics: MetricsLog,
        progress: ProgressLine,
        control: Control,
        token_readers: Mapping[str, Container[int]],
    ) -> None:
        """`token_readers`: see `Executor`."""
        self._compiled, self._cadence = compiled, cadence
        self._server, self._control = server, control
        self._evaluators, self._metrics, self._progress = evaluators, metrics, progress
        graph = compiled.training.graph
        ahead = compiled.run.max_steps_ahead
        self._executor = Executor(graph, compiled, server, storage, ahead, self._where, token_readers)
        self._stream = SampleStream(server, storage, graph.name, compiled.run.deadlines.call_s)
        self._checkpoints = CheckpointFolder(compiled.run.path.resolve())
        self._step = 0
        """The last that was admitted."""
        self._in_flight: deque[tuple[int, asyncio.Future[Traversal]]] = deque()
        """Oldest first."""
        self._reported_s = 0.0
        self._trained = {call.name: call.model for call in graph.model_calls if call.kind is CallKind.TRAIN_STEP}

    async def run(self) -> None:
        """All steps. Every step that is due to be saved is saved before it counts as done."""
        with located(self._server, lambda: self._where(self._step)):
            await self._evaluate(0)
            self._progress.start(self._cadence.num_steps)
            async with self._executor:
                await self._run()

    def _where(self, step: int) -> str:
        return f"step {step} of {self._cadence.num_steps} of run {self._compiled.run.name}"

    async def _run(self) -> None:
        self._reported_s = time.perf_counter()
        while self._step < self._cadence.num_steps:
            if self._in_flight and (self._in_flight[0][1].done() or not self._executor.has_room or self._is_held()):
                await self._finish_oldest()
            elif await self._control.begin(self._step + 1, self._cadence.num_steps):
                await self._admit(self._step + 1)
            else:
                await self._stop_early()
                return
        while self._in_flight:
            await self._finish_oldest()

    def _is_held(self) -> bool:
        """Whether what is in flight has to end before the next step begins: for an evaluation, or because somebody
        asked."""
        return self._control.is_held or (bool(self._evaluators) and self._cadence.evaluates_after(self._step))

    async def _admit(self, step: int) -> None:
        batch_size = self._compiled.training.graph.batch_size
        if not self._in_flight:
            self._reported_s = time.perf_counter()
        samples = await self._stream.take(step, batch_size)
        if step < self._cadence.num_steps:
            self._stream.prefetch(step + 1, batch_size)
        self._step = step
        self._in_flight.append((step, self._executor.admit(step, samples, self._saves(step))))

    async def _finish_oldest(self) -> None:
        """Steps are reported in order. One takes as long as it ends after the one before."""
        step, complete = self._in_flight[0]
        traversal = await complete
        now_s = time.perf_counter()
        with at(step=step):
            self._report(step, traversal, now_s - self._reported_s)
            self._reported_s = now_s
            if self._cadence.saves_after(step):
                await self._publish(step, traversal.files)
            await self._evaluate(step)
        self._in_flight.popleft()

    async def _stop_early(self) -> None:
        """Because somebody asked: what is not saved yet is saved."""
        step = self._step
        if step > 0 and not self._cadence.saves_after(step):
            path = self._checkpoints.begin(step)
            await self._publish(step, await self._executor.save(step, self._saves_into(path)))
        self._progress.note(f"stopped after step {step}, as asked")

    async def _publish(self, step: int, files: Sequence[ShardFile]) -> None:
        path = await asyncio.to_thread(self._checkpoints.publish, step, files)
        logger.info("saved %s", path)
        self._progress.note(f"saved {path}")

    def _saves(self, step: int) -> dict[str, Save] | None:
        if not self._cadence.saves_after(step):
            return None
        return self._saves_into(self._checkpoints.begin(step))

    def _saves_into(self, directory: Path) -> dict[str, Save]:
        with_optimizer = self._compiled.run.save_optimizer
        return {
            call: Save(model=model, directory=str(directory), with_optimizer=with_optimizer)
            for call, model in self._trained.items()
        }

    async def _evaluate(self, step: int) -> None:
        if not self._evaluators or not self._cadence.evaluates_after(step):
            return
        start_s = time.perf_counter()
        values: dict[str, float] = {}
        for evaluator in self._evaluators:
            values |= await evaluator.run(step)
            self._metrics.add_examples(step, "evaluation", evaluator.examples)
        values["seconds/evaluation"] = time.perf_counter() - start_s
        self._metrics.add(step, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.startswith("evaluation/"))
        logger.info("step %d: %s", step, shown)
        self._progress.note(f"after step {step}: {shown}")
        target, reward = self._compiled.run.target_reward, values.get("evaluation/reward")
        if target is not None and reward is not None and reward >= target and step + 1 < self._cadence.num_steps:
            self._cadence = replace(self._cadence, num_steps=step + 1)
            self._progress.note(f"evaluation/reward reached target_reward ({target:g}): step {step + 1} is the last")

    def _report(self, step: int, traversal: Traversal, seconds: float) -> None:
        values = {
            f"{call}/{name}": mean.total / mean.weight
            for call, statistics in traversal.statistics.items()
            for name, mean in statistics.items()
            if mean.weight
        }
        shown = {name: values[f"{call}/{name}"] for call, name in SHOWN if f"{call}/{name}" in values}
        for call, parts in traversal.seconds.items():
            for name, part_s in parts.items():
                values[f"seconds/{call}" if name in (CALL_MODEL, CALL_FUNCTION) else f"seconds/{call}/{name}"] = part_s
        tokens_per_s = traversal.num_tokens / seconds
        values["seconds/step"] = seconds
        values["performance/tokens_per_s"] = tokens_per_s
        values[TOKENS] = traversal.num_tokens
        values |= _accounts(traversal)
        values["performance/overhead_fraction"] = max(0.0, 1 - max(traversal.busy_s.values()) / seconds)
        self._metrics.add(step, values)
        self._metrics.add_examples(step, "train", traversal.examples, traversal.lags)
        self._control.finished(values)
        text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        logger.info("step %d/%d: %s, %.0f tokens/s", step, self._cadence.num_steps, text, tokens_per_s)
        self._progress.step(step, text, tokens_per_s)
        for warning in warnings_of(traversal):
            logger.warning("step %d: %s", step, warning)
            self._progress.note(f"step {step}: {warning}")


def _accounts(traversal: Traversal) -> dict[str, float]:
    """Where the step's sequences went, and how old the weights were that generated them."""
    values: dict[str, float] = {
        "data/sequences": traversal.num_sequences,
        "data/dropped": traversal.num_sequences - min(traversal.num_read.values()),
    }
    if traversal.lags:
        values["data/lag"] = sum(traversal.lags.values()) / len(traversal.lags)
        values["data/lag_max"] = max(traversal.lags.values())
    return values
