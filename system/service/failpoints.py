"""Named places where a test can kill the process.

TRAINMASTER_FAILPOINT=worker.save@1      worker of rank 1 kills itself with SIGKILL when it reaches `worker.save`
"""

from __future__ import annotations

import os
import signal


def failpoint(name: str, rank: int | None = None) -> None:
    """Does nothing, unless the environment names this place (and this rank)."""
    armed = os.environ.get("TRAINMASTER_FAILPOINT")
    if armed is not None and armed in (name, f"{name}@{rank}"):
        os.kill(os.getpid(), signal.SIGKILL)
