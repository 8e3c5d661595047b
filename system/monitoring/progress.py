"""The progress of a run for a person: one line that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text


class ProgressLine:
    """Use as a context manager. `note` prints a line of its own above the progress."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def note(self, text: str) -> None:
        """A line, its markup taken literally."""
        self.console.print(Text(text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
        for column in columns:
            table.add_column(Text(column))
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)

    def start(self, num_steps: int) -> None:
        """The first step is about to begin."""
        self._num_steps, self._started_s = num_steps, time.monotonic()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self.console,
                redirect_stderr=sys.stderr.isatty(),  # in a file, its lines are in nobody's way
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=num_steps)

    def step(self, step: int, values: str, tokens_per_s: float) -> None:
        """A step is done; `values` says what came of it."""
        left_s = (time.monotonic() - self._started_s) / step * (self._num_steps - step)
        text = f"{values}  {tokens_per_s:,.0f} tokens/s  {_duration(left_s)} left"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=text)
        else:
            self.note(f"step {step}/{self._num_steps}  {text}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
