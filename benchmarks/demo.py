"""`make demo` over several seeds, and beside each a control: the same GRPO, from the same start, on shuffled rewards.

    python benchmarks/demo.py --seeds 0 1 2 --json        about 5 minutes a seed

Accuracies are of held-out sums, one response each at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "arithmetic" / "demo.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    result: dict[str, Any] = {"seeds": {}}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            demo = run_demo(Path(folder), seed)
            control = run_control(Path(folder), seed)
        del demo["reward_curve"]
        result["seeds"][seed] = demo | {"accuracy_shuffled": control, "shuffled_gain": control - demo["accuracy_sft"]}
    result["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=None if options.json else 2))


def run_demo(folder: Path, seed: int) -> dict[str, Any]:
    """Its summary."""
    command = [sys.executable, str(DEMO), str(seed), str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def run_control(folder: Path, seed: int) -> float:
    """Accuracy after as many steps on shuffled rewards."""
    (checkpoint,) = (folder / "sft" / "checkpoints").glob("step-*")
    (last,) = (folder / "grpo" / "checkpoints").glob("step-*")
    command = [sys.executable, "-P", "-m", "trainmaster", "run", str(ROOT / "benchmarks" / "shuffled_grpo.py")]
    command += ["--run.directory", str(folder), "--run.name", "control", "--run.seed", str(seed)]
    command += ["--run.steps", last.name.removeprefix("step-"), "--actor.path", str(checkpoint)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    entries = [json.loads(line) for line in (folder / "control" / "metrics.jsonl").read_text().splitlines()]
    accuracy: float = [entry["evaluation/reward"] for entry in entries if "evaluation/reward" in entry][-1]
    return accuracy


if __name__ == "__main__":
    main()
