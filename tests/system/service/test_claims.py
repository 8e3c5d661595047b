import os
import subprocess
import sys
from pathlib import Path

from trainmaster.system.service.claims import claim, owner_of

HOLD = """
import sys
from pathlib import Path
from trainmaster.system.service.claims import claim

file = claim(Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_directory_is_owned_while_the_claim_is_held(tmp_path: Path):
    assert owner_of(tmp_path) is None
    with claim(tmp_path):
        assert (owner_of(tmp_path) or "").startswith(f"pid {os.getpid()} on ")
    assert owner_of(tmp_path) is None


def test_the_claim_of_a_killed_process_is_void(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    assert (owner_of(tmp_path) or "").startswith(f"pid {process.pid} on ")
    process.kill()
    process.communicate()
    assert owner_of(tmp_path) is None
