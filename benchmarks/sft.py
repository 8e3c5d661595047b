"""Trainmaster's supervised run beside the plain packed torch loop, on the same rows, in turns.

    python benchmarks/sft.py --json               speed: tokens/s by layout, medians over steps and rounds
    python benchmarks/sft.py --agreement --json   agreement: loss step by step for pp=1, pp=2, dp=2

Every side has the cores that it may use: one thread for one worker and for the plain loop, one each for two workers.
`master_overhead_fraction` is the share of a step in which not even the busiest worker computes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAYOUTS = {"one_worker": (1, 1), "pp2": (1, 2), "dp2": (2, 1)}
WARM_STEPS = 3
EXPERIMENT = """
from pathlib import Path
from trainmaster import SFT, Dataset, Model, Optimizer, RunOptions

experiment = SFT(
    model=Model(path=Path({model!r})),
    dataset=Dataset(path=Path({dataset!r}), prompt="question", answer="answer", separator="\\n"),
    optimizer=Optimizer(learning_rate={learning_rate}, warmup_steps={warmup_steps}),
    batch_size={batch_size}, microbatch_tokens={microbatch_tokens},
    run=RunOptions(name="run", directory=Path({directory!r}), steps={steps}, seed={seed}, threads=1),
)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=ROOT.parent / "shared/data/gsm8k/train.jsonl")
    parser.add_argument("--agreement", action="store_true", help="compare losses instead of speeds")
    parser.add_argument("--steps", type=int, default=0, help="default: 20 for speed, 50 for agreement")
    parser.add_argument("--rounds", type=int, default=3, help="for speed: how often every side runs")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.dataset, options.steps or (50 if options.agreement else 20))
        result = bench.agreement() if options.agreement else bench.speed(options.rounds)
    result["machine"] = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    print(json.dumps(result, indent=None if options.json else 2))


class Bench:
    """A model, a tokenizer and data in a folder; both sides run from there."""

    def __init__(self, folder: Path, dataset: Path, steps: int) -> None:
        self.folder, self.num_runs = folder, 0
        self.spec: dict[str, Any] = {
            "model": str(folder / "model"),
            "dataset": str(dataset.resolve()),
            "prompt": "question",
            "answer": "answer",
            "separator": "\n",
            "seed": 0,
            "steps": steps,
            "batch_size": 16,
            "microbatch_tokens": 2048,
            "learning_rate": 1e-3,
            "warmup_steps": 10,
            "threads": 1,
        }
        make_model(folder / "model", dataset)

    def agreement(self) -> dict[str, Any]:
        plain = self.plain()["losses"]
        differences = {}
        for name, (dp, pp) in LAYOUTS.items():
            ours = [entry["train/loss"] for entry in self.ours(dp, pp)]
            assert len(ours) == len(plain), f"{len(ours)} steps of {len(plain)}"
            differences[name] = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
        return {
            "steps": len(plain),
            "first_loss": plain[0],
            "last_loss": plain[-1],
            "largest_loss_difference": differences,
            "parameters_unchanged": self.unchanged,
        }

    def speed(self, rounds: int) -> dict[str, Any]:
        plain: list[float] = []
        rates: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        overheads: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        for _ in range(rounds):
            plain.append(statistics.median(self.plain()["tokens_per_s"][WARM_STEPS:]))
            for name, (dp, pp) in LAYOUTS.items():
                # the last step also saves
                entries = self.ours(dp, pp)[WARM_STEPS:-1]
                rates[name].append(statistics.median(entry["performance/tokens_per_s"] for entry in entries))
                overheads[name].append(statistics.median(entry["performance/overhead_fraction"] for entry in entries))
        median = {name: statistics.median(values) for name, values in rates.items()}
        base = statistics.median(plain)
        return {
            "tokens_per_s": {"plain": round(base)} | {name: round(value) for name, value in median.items()},
            "ratio_one_worker": round(median["one_worker"] / base, 3),
            "ratio_pp2": round(median["pp2"] / base, 3),
            "ratio_dp2": round(median["dp2"] / base, 3),
            "master_overhead_fraction": {
                name: round(statistics.median(values), 4) for name, values in overheads.items()
            },
            "rounds": rounds,
            "steps": self.spec["steps"],
        }

    def plain(self) -> dict[str, Any]:
        spec = self.folder / "spec.json"
        spec.write_text(json.dumps(self.spec))
        command = [sys.executable, str(ROOT / "benchmarks/plain_sft.py"), str(spec)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def ours(self, dp: int, pp: int) -> list[dict[str, float]]:
        """Metrics of every step of one `trainmaster run`."""
        self.num_runs += 1
        directory = self.folder / f"runs{self.num_runs}"
        file = self.folder / "experiment.py"
        file.write_text(EXPERIMENT.format(directory=str(directory), **self.spec))
        layout = ["--model.layout.dp", str(dp), "--model.layout.pp", str(pp)]
        command = [sys.executable, "-m", "trainmaster", "run", str(file), *layout]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        entries = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
        checkpoint = directory / f"run/checkpoints/step-{self.spec['steps']}"
        self.unchanged = unchanged_parameters(self.folder / "model", checkpoint)
        return [entry for entry in entries if "train/loss" in entry]


def unchanged_parameters(before: Path, after: Path) -> list[str]:
    """Names of parameters that are the same in both directories."""
    import torch
    from safetensors.torch import load_file

    def tensors(path: Path) -> dict[str, torch.Tensor]:
        return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}

    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys(), "the checkpoint has the same parameters as the model"
    return [name for name in old if torch.equal(old[name], new[name])]


def make_model(directory: Path, dataset: Path) -> None:
    """The model and the tokenizer of examples/gsm8k, from a fixed seed."""
    import importlib.util

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.spec_from_file_location("gsm8k_example", ROOT / "examples/gsm8k/sft.py")
    assert spec is not None, "the example is there"
    assert spec.loader is not None, "the example is Python"
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**example.experiment.model.config))
    model.save_pretrained(directory)
    train_tokenizer = example.train_tokenizer
    train_tokenizer(dataset, ("question", "answer"), directory.parent / "tokenizer")
    AutoTokenizer.from_pretrained(directory.parent / "tokenizer").save_pretrained(directory)


if __name__ == "__main__":
    main()
