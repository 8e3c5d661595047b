"""Who works in a run directory: a file with a name in it, locked for as long as its process lives."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

_FILE = "owner"


def claim(directory: Path) -> TextIO:
    """Makes this process the directory's owner until the returned file is closed, or the process ends."""
    file = (directory / _FILE).open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def owner_of(directory: Path) -> str | None:
    """The process that works there now; None if there is none."""
    try:
        with (directory / _FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (directory / _FILE).read_text().strip()
    except FileNotFoundError:
        pass
    return None
