"""Process groups that are left while something waits in them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from trainmaster.api.errors import PeerLost
from trainmaster.workers.parallel.groups import form_group, host_store, join_store

CPU, DEADLINE = torch.device("cpu"), timedelta(seconds=60)
STOPS = """
import os, signal, sys
from datetime import timedelta
import torch
from trainmaster.workers.parallel.groups import form_group, join_store

deadline = timedelta(seconds=60)
store = join_store("127.0.0.1", int(sys.argv[1]), deadline)
group = form_group(store, "pair", [0, 1], 1, torch.device("cpu"), "127.0.0.1", deadline)
print("formed", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_leaving_a_group_frees_who_waits_there_for_a_stopped_peer():
    store, port = host_store("127.0.0.1")
    peer = subprocess.Popen([sys.executable, "-c", STOPS, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        own = join_store("127.0.0.1", port, DEADLINE)
        group = form_group(own, "pair", [0, 1], 0, CPU, "127.0.0.1", DEADLINE)
        assert peer.stdout is not None
        assert peer.stdout.readline() == "formed\n"
        while not re.search(r"^State:\s+T", Path(f"/proc/{peer.pid}/status").read_text(), re.MULTILINE):
            time.sleep(0.01)
        errors: list[Exception] = []

        def wait() -> None:
            try:
                group.all_reduce(torch.ones(3))
            except PeerLost as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive(), errors
        group.leave()
        waiting.join(5)
        assert not waiting.is_alive()
        assert "all_reduce in group pair of workers [0, 1]" in str(errors[0])
        with pytest.raises(PeerLost, match=r"group pair of workers \[0, 1\] was left"):
            group.all_reduce(torch.ones(3))
        group.leave()
    finally:
        os.kill(peer.pid, signal.SIGKILL)
        peer.communicate()
    del store
