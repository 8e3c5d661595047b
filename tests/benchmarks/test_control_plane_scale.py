"""The benchmark itself: it runs, and measures what it says. Its figures are nobody's promise here."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "control_plane_scale.py"


def test_a_step_of_eight_workers_is_measured():
    options = ("--json", "--workers", "8", "--steps", "1", "--idle-seconds", "0.5")
    done = subprocess.run(
        [sys.executable, BENCHMARK, *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (figures,) = result["sizes"]
    assert (figures["workers"], figures["sequences"]) == (8, 128)
    assert result["master_share_at_8"] == figures["master_share"]
    assert 0 < figures["step_cpu_s"] + figures["heartbeats_cpu_s_per_10s"] < 10
    assert figures["messages"] >= 2 * (3 * 8 + 1), "each worker is asked three times, one of them for a reward too"
    assert min(figures["parts"].values()) >= 0
    assert max(figures["parts"].values()) > 0
