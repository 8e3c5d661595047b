"""Metrics of a run: named numbers at a step, to every sink. Names are `area/what`, such as `train/loss`."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...api.errors import RunError
from ..rpc.commands import Example

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class _Entry:
    step: int
    values: dict[str, float] = field(default_factory=dict)
    source: str = ""
    examples: tuple[Example, ...] = ()
    lags: Mapping[str, int] = field(default_factory=dict)


class MetricsLog:
    """Writes TensorBoard event files and `metrics.jsonl` (one object a step), on a thread of its own."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="metrics", daemon=True)
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Never waits. Raises `RunError` if writing has failed."""
        self._check()
        self._queue.put(_Entry(step, values=dict(values)))

    def add_examples(
        self, step: int, source: str, examples: Sequence[Example], lags: Mapping[str, int] | None = None
    ) -> None:
        """Responses as text, to `samples.jsonl` and TensorBoard's text page; `lags` by their ids, see `Traversal`."""
        self._check()
        if examples:
            lags = {example.id: (lags or {}).get(example.id, 0) for example in examples}
            self._queue.put(_Entry(step, source=source, examples=tuple(examples), lags=lags))

    def close(self) -> None:
        """Waits until everything is on disk. Raises `RunError` if it is not."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise RunError(f"metrics cannot be written to {self._directory}: {self._failure}") from self._failure

    def _write(self) -> None:
        try:
            self._write_all()
        except Exception as error:
            logger.exception("metrics are lost from here on")
            self._failure = error

    def _write_all(self) -> None:
        writer = _summary_writer(self._directory / "tensorboard")
        with (
            (self._directory / "metrics.jsonl").open("a", buffering=1) as metrics,
            (self._directory / "samples.jsonl").open("a", buffering=1) as samples,
        ):
            while (entry := self._queue.get()) is not None:
                if entry.values:
                    metrics.write(json.dumps({"step": entry.step, **entry.values}) + "\n")
                for name, value in entry.values.items():
                    writer.add_scalar(name, value, entry.step)
                for example in entry.examples:
                    row = {"step": entry.step, "source": entry.source, **dataclasses.asdict(example)}
                    row["lag"] = entry.lags[example.id]
                    samples.write(json.dumps(row, ensure_ascii=False) + "\n")
                if entry.examples:
                    writer.add_text(f"samples/{entry.source}", _as_markdown(entry.examples), entry.step)
        writer.close()


def _as_markdown(examples: Sequence[Example]) -> str:
    return "\n\n".join(
        f"**{example.id}** reward {example.reward}\n\n    "
        + f"{example.prompt} ▸ {example.response}".replace("\n", "\n    ")
        for example in examples
    )


def _summary_writer(directory: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202  (tensorboardX has no types)
    """tensorboardX imports torch if it is there, which would cost the master 1.5 s and 300 MB for nothing."""
    blocked = "torch" not in sys.modules
    if blocked:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say: not to be imported
    try:
        from tensorboardX import SummaryWriter
    finally:
        if blocked:
            del sys.modules["torch"]
    return SummaryWriter(str(directory), flush_secs=5)
