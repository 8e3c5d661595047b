"""`trainmaster run --detach`: the same run in a session of its own, that outlives the terminal it was started from."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..service.lifecycle import read_entry

_LOOK_S = 0.05


def start_detached(file: Path, overrides: Sequence[str], run_directory: Path, flags: Sequence[str] = ()) -> int:
    """Starts the run, and returns 0 once its master is there; if it ends before, its words and its exit code."""
    run_directory.parent.mkdir(parents=True, exist_ok=True)
    output = run_directory.with_name(f".{run_directory.name}.out")  # moves in when there is a directory
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainmaster", "run", str(file), *flags, *overrides],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while (code := process.poll()) is None and read_entry(run_directory) is None:
        time.sleep(_LOOK_S)
    if code is not None:
        sys.stderr.write(output.read_text(errors="replace"))
        output.unlink()
        return code
    output.rename(run_directory / "logs" / "run.out")
    name = run_directory.name
    sys.stdout.write(
        f"{name} runs as process {process.pid}. `trainmaster status {name}` says what it is at, "
        f"`trainmaster logs {name} -f` follows it, `trainmaster stop {name}` ends it\n"
    )
    return 0
