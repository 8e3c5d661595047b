"""Where services log: standard error, and a file of each service in the run directory once there is one."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr(level: int = logging.INFO) -> None:
    """Called once by each service at its start. Files get everything from INFO on, whatever the level here."""
    logging.basicConfig(level=logging.INFO, format=_FORMAT, stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def log_to_file(path: Path) -> None:
    """Also log to this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(handler)
