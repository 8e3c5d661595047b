"""`make demo`: SFT until a small model adds some numbers right, then GRPO until it adds most of them.

    python examples/arithmetic/demo.py [SEED [FOLDER]]

Leaves in FOLDER (by default runs/demo/, or runs/demo-2/, ... if that is taken) the two runs, and summary.json with what
came of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BARS = "▁▂▃▄▅▆▇█"
SFT_TARGET = 0.35
"""The share of held-out sums at which SFT ends: enough for rewards to differ within a group."""
GRPO_STEPS = 120


def main() -> None:
    seed = sys.argv[1] if len(sys.argv) > 1 else "0"
    folder = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else _free_folder()
    start_s = time.monotonic()
    run("sft", folder, "--run.seed", seed, "--run.target_reward", str(SFT_TARGET), "--run.evaluate_every", "5")
    checkpoint = max((folder / "sft" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    steps = ["--run.steps", str(GRPO_STEPS), "--run.evaluate_every", "30"]
    run("grpo", folder, "--run.seed", seed, "--actor.path", str(checkpoint), *steps)
    grpo = metrics(folder / "grpo")
    accuracy = [entry["evaluation/reward"] for entry in grpo if "evaluation/reward" in entry]
    rewards = [entry["reward/reward"] for entry in grpo if "reward/reward" in entry]
    summary = {
        "accuracy_sft": accuracy[0],
        "accuracy_grpo": accuracy[-1],
        "accuracy_gain": accuracy[-1] - accuracy[0],
        "run_seconds": round(time.monotonic() - start_s, 1),
        "reward_curve": rewards,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    name = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    print(f"\n{'sums never trained on':24}  answered right (one response each, temperature 1)")
    print(f"{'after SFT':24}  {accuracy[0]:.1%}")
    print(f"{f'after GRPO, {len(rewards)} steps':24}  {accuracy[-1]:.1%}")
    print(f"\nreward      {rewards[0]:.2f} -> {rewards[-1]:.2f}  {bars(rewards)}")
    print(f"time        {summary['run_seconds']:.0f} s")
    print(f"runs        {name}/sft  {name}/grpo  (responses in {name}/grpo/samples.jsonl)")
    print(f"watch them  .venv/bin/tensorboard --logdir {name}")


def run(recipe: str, folder: Path, *overrides: str) -> None:
    """`trainmaster run` of one of our neighbours."""
    command = ["trainmaster", "run", f"examples/arithmetic/{recipe}.py", "--run.name", recipe]
    command += ["--run.directory", str(folder), *overrides]
    print("\n$", " ".join(command), flush=True)
    code = subprocess.run([sys.executable, "-P", "-m", *command], cwd=ROOT).returncode
    if code != 0:
        sys.exit(code)


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def bars(values: list[float], width: int = 48) -> str:
    chosen = values[:: max(1, len(values) // width)]
    top, bottom = max(chosen), min(chosen)
    return "".join(BARS[round((value - bottom) / (top - bottom or 1) * (len(BARS) - 1))] for value in chosen)


def _free_folder() -> Path:
    """The first of runs/demo, runs/demo-2, ... that is not there yet."""
    number = 1
    while True:
        folder = ROOT / "runs" / ("demo" if number == 1 else f"demo-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


if __name__ == "__main__":
    main()
