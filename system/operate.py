"""The commands of people who operate runs: ps, status, logs, pause, unpause, stop."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from pydantic import TypeAdapter
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..api.errors import ConfigError, RunError
from .rpc.inquiries import Order, RunStatus, WorkerState
from .service.inquiry import ask, find_run, way_to
from .service.lifecycle import Entry, State, read_entry

_REFRESH_S = 1.0
_SHOWN_VALUES = 6
_UNCUT = 10_000
"""Columns where no terminal has a say."""
_STATUS: TypeAdapter[RunStatus] = TypeAdapter(RunStatus)
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


def ps(directory: Path, as_json: bool) -> None:
    """All runs of a folder, the youngest first."""
    found = [(path, entry) for path in sorted(directory.glob("*/")) if (entry := read_entry(path)) is not None]
    found.sort(key=lambda each: -each[1].started_s)
    if as_json:
        _say(json.dumps([{"directory": str(path), **_ENTRY.dump_python(entry, mode="json")} for path, entry in found]))
        return
    table = _table("run", "state", "for", "pid", "host", "address")
    for _, entry in found:
        age = duration(time.time() - entry.since_s)
        table.add_row(entry.run, entry.state, age, str(entry.pid), entry.host, entry.address)
    _console().print(table if found else Text(f"no runs in {directory}"))


def status(run: str, directory: Path, own: Path | None, follow: bool, as_json: bool) -> None:
    """What a run is at; with `follow`, again every second until it ends, and then how it ended.

    Raises `RunError` if a run that is followed fails or is lost, or if its master is gone and nothing here says why.
    """
    address, keys = way_to(run, directory, own)
    found = ask(address, Order.STATUS, keys=keys)
    if not follow:
        (_say_json if as_json else _say_block)(found)
        return
    with _following(as_json) as show:
        try:
            while True:
                show(found)
                time.sleep(_REFRESH_S)
                found = ask(address, Order.STATUS, keys=keys)
        except RunError as error:
            gone = error
    entry = None if "://" in run else find_run(run, directory)[1]
    if entry is None or not entry.state.is_final:
        raise RunError(f"{found.run}: its master is gone, or does not answer any more ({gone})")
    if as_json:
        _say(_ENTRY.dump_json(entry).decode())
    reason = "its process is gone and has not said how it ended" if entry.state is State.LOST else entry.reason
    end = f"{entry.run}: {entry.state}" + (f": {reason}" if reason else "")
    if entry.state is not State.STOPPED:
        raise RunError(end)
    if not as_json:
        _say(end)


@contextlib.contextmanager
def _following(as_json: bool) -> Iterator[Callable[[RunStatus], None]]:
    """Shows one status in the place of the last on a terminal, one after the other elsewhere."""
    console = Console(highlight=False)
    if as_json:
        yield _say_json
    elif not console.is_terminal:
        yield lambda found: _say_block(found, "")
    else:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda found: live.update(_shown(found), refresh=True)


def order(run: str, directory: Path, own: Path | None, what: Order) -> None:
    """Asks a run to pause, to go on, or to stop."""
    address, keys = way_to(run, directory, own)
    found = ask(address, what, keys=keys)
    said = {
        Order.PAUSE: "pauses after the step that is under way",
        Order.UNPAUSE: "goes on",
        Order.STOP: "stops and saves after the step that is under way",
        Order.STOP_NOW: "stops now",
    }
    _say(f"{found.run}: {said[what]} (step {found.step} of {found.num_steps})")


# -- logs -------------------------------------------------------------------------------------------------------------


def logs(run: str, worker: str | None, directory: Path, follow: bool) -> None:
    """The logs of a run's services, in order of time; of one worker, by rank, or of `master`."""
    path = next((path for path in (Path(run), directory / run) if (path / "logs").is_dir()), None)
    if path is None:
        raise ConfigError("RUN", run, f"no run by that name has logs in {directory}", "give its directory")
    names = ["*.log"] if worker is None else [f"{worker}.log" if worker == "master" else f"worker-{worker}.log"]
    files = [file for name in names for file in sorted((path / "logs").glob(name))]
    if not files:
        raise ConfigError("WORKER", worker, f"has no log in {path / 'logs'}", "give a rank, or master")
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(file.open(errors="replace")) for file in files]
        while True:
            for line in _merged(streams, [file.stem for file in files]):
                sys.stdout.write(line)
            sys.stdout.flush()
            entry = read_entry(path)
            if not follow or entry is None or entry.state.is_final:
                return
            time.sleep(_REFRESH_S / 4)


def _merged(streams: Sequence[TextIO], names: Sequence[str]) -> Iterator[str]:
    """What came since the last time, by time; the lines of a traceback stay with the line before them."""
    found: list[tuple[str, int, int, str]] = []
    for which, stream in enumerate(streams):
        stamp = ""
        for at, line in enumerate(stream):
            stamp = line[:23] if line[:4].isdigit() else stamp
            found.append((stamp, which, at, line))
    for _, which, _, line in sorted(found):
        yield f"{names[which]:10} {line}" if len(streams) > 1 else line


# -- looks ------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say_json(status: RunStatus) -> None:
    _say(_STATUS.dump_json(status).decode())


def _say_block(status: RunStatus, *more: str) -> None:
    _console().print(_shown(status), *more, sep="\n")
    sys.stdout.flush()


def _console() -> Console:
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = _UNCUT
    return console


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(column, style="bold"), overflow="fold")
    return table


def _shown(status: RunStatus) -> RenderableType:
    where = f"step {status.step} of {status.num_steps}" if status.num_steps else "no step yet"
    head = Text(f"{status.run}: ", style="bold")
    head.append(f"{status.state} for {duration(status.state_s)}, {where} ")
    head.append(f"(up {duration(status.up_s)}, pid {status.pid} on {status.host})", style="dim")
    lines: list[RenderableType] = [head]
    leading = [name for name in status.values if not name.startswith(("seconds/", "performance/"))]
    rates = [name for name in ("performance/tokens_per_s", "seconds/step") if name in status.values]
    if leading or rates:
        shown = [f"{name} {status.values[name]:.4g}" for name in (*leading[:_SHOWN_VALUES], *rates)]
        lines.append(Text("  ".join(shown)))
    table = _table("worker", "host", "pid", "state", "at", "for", "heard")
    for worker in status.workers:
        table.add_row(
            "?" if worker.rank is None else str(worker.rank),
            worker.host,
            str(worker.pid),
            Text(worker.state, style="red" if worker.state is WorkerState.UNRESPONSIVE else ""),
            worker.call,
            duration(worker.call_s) if worker.call else "",
            f"{duration(worker.heard_s)} ago",
        )
    if len(status.workers) < status.num_workers:
        lines.append(Text(f"{len(status.workers)} of {status.num_workers} workers are there"))
    return Group(*lines, table)
