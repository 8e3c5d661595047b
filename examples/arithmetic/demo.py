"""`make demo`: trains the arithmetic example and says what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BARS = "▁▂▃▄▅▆▇█"


def main() -> None:
    name = f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [sys.executable, "-m", "trainmaster", "run", "examples/arithmetic/sft.py", "--run.name", name]
    print("$", " ".join(["trainmaster", *command[3:]]), flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code != 0:
        sys.exit(code)
    run = ROOT / "runs" / name
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    held_out = [entry["evaluation/loss"] for entry in entries if "evaluation/loss" in entry]
    print(f"\ntraining loss   {losses[0]:.3f} -> {losses[-1]:.3f}   {_bars(losses)}")
    print(f"held-out loss   {held_out[0]:.3f} -> {held_out[-1]:.3f}   (additions never trained on)")
    print(f"run             {run.relative_to(ROOT)}")
    print(f"watch it        .venv/bin/tensorboard --logdir {run.relative_to(ROOT)}/tensorboard")


def _bars(values: list[float], width: int = 48) -> str:
    chosen = values[:: max(1, len(values) // width)]
    top, bottom = max(chosen), min(chosen)
    return "".join(BARS[round((value - bottom) / (top - bottom or 1) * (len(BARS) - 1))] for value in chosen)


if __name__ == "__main__":
    main()
