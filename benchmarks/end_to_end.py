"""GRPO from end to end: the demo's own figures, and skewed response lengths beside a plain transformers loop.

    python benchmarks/end_to_end.py --json

`demo`     examples/arithmetic/grpo.py (pp=2, a reference beside the actor, 64 prompts x 8 responses), from a checkpoint
           of a short SFT: rates, the master's overhead, and the peak memory of each process (Linux).
`skewed`   16 prompts x 8 responses of up to 64 tokens, most of them far shorter, from one checkpoint for both sides:
           `trainmaster run` on two workers of one thread (dp=2; pp=2), and `plain_grpo.py` with two threads and with
           one, of which the faster counts. One optimizer step a step, no reference, float32.

Sides take turns, round by round; each round has its own seed. A run's figures are medians over its steps without the
first few and the last, which saves; those of the benchmark are medians over rounds. The skewed model ends a response
after any token with a probability of about 1/20: one channel of its residual stream is constant, and drives the end
token's logit. Its learning rate is too small to change that. Both sides want the machine for themselves: plain torch's
two threads wait in spin locks, and lose tenfold to any neighbour.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ARITHMETIC = ROOT / "examples/arithmetic"
WARM_STEPS = 3
MEMORY_LOOK_S = 0.5
LAYOUTS = {"dp2": (2, 1), "pp2": (1, 2)}
THREADS = {"plain_2_threads": 2, "plain_1_thread": 1}
END_PROBABILITY = 1 / 20
MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EXPERIMENT = """
import json
from pathlib import Path
from trainmaster import GRPO, Dataset, Model, Optimizer, Reward, RunOptions, Sampling

experiment = GRPO(
    actor=Model(path=Path({model!r})),
    prompts=Dataset(path=Path({dataset!r}), shuffle=False),
    reward=Reward(function="ends_with_answer", is_batched=True),
    sampling=Sampling(max_new_tokens={max_new_tokens}),
    optimizer=Optimizer(learning_rate={learning_rate}),
    batch_size={batch_size}, group_size={group_size}, microbatch_tokens={microbatch_tokens},
    run=RunOptions(name="run", directory=Path({directory!r}), steps={steps}, seed={seed}, threads=1),
)


def ends_with_answer(prompts, responses, rows):
    # a word is a token, and so is the end, which the text does not show
    lengths = [min(len(response.split()) + 1, {max_new_tokens}) for response in responses]
    with open({lengths!r}, "a") as file:
        file.write(json.dumps(lengths) + "\\n")
    return [float(response.endswith(row["answer"])) for response, row in zip(responses, rows)]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="of every run")
    parser.add_argument("--rounds", type=int, default=3, help="how often every side runs")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    if options.steps < WARM_STEPS + 2 or options.rounds < 1:
        parser.error(
            f"at least {WARM_STEPS + 2} steps and one round: the first {WARM_STEPS} steps and the last are not counted"
        )
    with tempfile.TemporaryDirectory() as folder:
        demo, skewed = Demo(Path(folder) / "demo", options.steps), Skewed(Path(folder) / "skewed", options.steps)
        for number in range(options.rounds):
            demo.round(number)
            skewed.round(number)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result = {
        "demo": demo.result(),
        "skewed": skewed.result(),
        "rounds": options.rounds,
        "steps": options.steps,
        "machine": machine | {"python": platform.python_version()},
    }
    print(json.dumps(result, indent=None if options.json else 2))


class Demo:
    """The demo's GRPO, from a checkpoint that a short run of the demo's SFT leaves in a folder."""

    BATCH_SIZE, GROUP_SIZE, SFT_STEPS = 64, 8, 40

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self._steps = folder, steps
        self._rounds: list[dict[str, float]] = []
        self._memory: list[dict[str, float]] = []
        where, count = ["--run.directory", str(folder), "--run.name", "sft"], str(self.SFT_STEPS)
        trainmaster(ARITHMETIC / "sft.py", *where, "--run.steps", count, "--run.evaluate_every", count)

    def round(self, number: int) -> None:
        """One run."""
        name, steps = f"grpo-{number}", str(self._steps)
        where = ["--run.directory", str(self._folder), "--run.name", name, "--run.seed", str(number)]
        checkpoint = ["--actor.path", str(self._folder / f"sft/checkpoints/step-{self.SFT_STEPS}")]
        sizes = ["--batch_size", str(self.BATCH_SIZE), "--group_size", str(self.GROUP_SIZE)]
        length = ["--run.steps", steps, "--run.evaluate_every", steps]
        self._memory.append(trainmaster(ARITHMETIC / "grpo.py", *where, *checkpoint, *sizes, *length))
        self._rounds.append(medians([self._figures(step) for step in steps_of(self._folder / name)]))

    def result(self) -> dict[str, Any]:
        roles = sorted({role for memory in self._memory for role in memory})
        memory = {role: round(max(memory.get(role, 0.0) for memory in self._memory)) for role in roles}
        return rounded(over_rounds(self._rounds)) | {"peak_rss_mib": memory}

    def _figures(self, step: dict[str, float]) -> dict[str, float]:
        """Of one step. Rates are per second of the whole step; trained tokens are those of prompts and responses."""
        num_samples, seconds = self.BATCH_SIZE * self.GROUP_SIZE, step["seconds/step"]
        return {
            "samples_per_s": num_samples / seconds,
            "generated_tokens_per_s": num_samples * step["generate/response_length"] / seconds,
            "trained_tokens_per_s": step["performance/tokens"] / seconds,
            "master_overhead_fraction": step["performance/overhead_fraction"],
            "mean_response_length": step["generate/response_length"],
        } | seconds_of(step, ("generate", "reward", "reference", "train", "step"))


class Skewed:
    """The skewed workload on both sides, with a model and prompts that it makes in a folder."""

    BATCH_SIZE, GROUP_SIZE, MAX_NEW_TOKENS = 16, 8, 64
    NUM_SAMPLES = BATCH_SIZE * GROUP_SIZE

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder = folder
        self._spec: dict[str, Any] = {  # of both sides; each takes what it knows
            "model": str(folder / "model"),
            "dataset": str(folder / "prompts.jsonl"),
            "steps": steps,
            "batch_size": self.BATCH_SIZE,
            "group_size": self.GROUP_SIZE,
            "max_new_tokens": self.MAX_NEW_TOKENS,
            "learning_rate": 1e-6,
        }
        self._rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (*LAYOUTS, *THREADS)}
        self._lengths: dict[str, list[int]] = {name: [] for name in self._rounds}
        self._first_step: dict[str, dict[str, float]] = {}
        folder.mkdir()
        make_model(folder / "model")
        make_prompts(folder / "prompts.jsonl", self.BATCH_SIZE * steps)

    def round(self, number: int) -> None:
        """Every side once, in an order that turns round."""
        names = [*THREADS, *LAYOUTS]
        for name in names if number % 2 == 0 else reversed(names):
            self._run_plain(name, number) if name in THREADS else self._run_ours(name, number)

    def result(self) -> dict[str, Any]:
        by_name = {name: over_rounds(rounds) for name, rounds in self._rounds.items()}
        rival = max(THREADS, key=lambda name: by_name[name]["samples_per_s"])
        speedups = {name: statistics.median(self._ratios(name, rival)) for name in LAYOUTS}
        best = max(speedups, key=lambda name: speedups[name])
        return {
            "speedup_vs_plain": round(speedups[best], 3),
            "layout": best,
            "plain": rival,
            "speedups": rounded(speedups),
            "speedups_by_round": [round(ratio, 3) for ratio in self._ratios(best, rival)],
            "sides": {name: rounded(figures) for name, figures in by_name.items()},
            "samples_a_step": self.NUM_SAMPLES,
            "response_lengths": {name: summary(lengths) for name, lengths in self._lengths.items()},
            "first_step": {name: rounded(values) for name, values in self._first_step.items()},
        }

    def _ratios(self, name: str, rival: str) -> list[float]:
        rounds = zip(self._rounds[name], self._rounds[rival], strict=True)
        return [ours["samples_per_s"] / plain["samples_per_s"] for ours, plain in rounds]

    def _run_plain(self, name: str, seed: int) -> None:
        spec = self._folder / "spec.json"
        spec.write_text(json.dumps({**self._spec, "microbatch_samples": 32, "threads": THREADS[name], "seed": seed}))
        command = [sys.executable, str(ROOT / "benchmarks/plain_grpo.py"), str(spec)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        steps: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        self._keep(name, steps, [step["lengths"] for step in steps])

    def _run_ours(self, name: str, seed: int) -> None:
        directory, lengths = self._folder / f"{name}-{seed}", self._folder / f"{name}-{seed}.lengths"
        own = {"microbatch_tokens": 8192, "directory": str(directory), "lengths": str(lengths), "seed": seed}
        file = self._folder / "experiment.py"
        file.write_text(EXPERIMENT.format(**self._spec, **own))
        dp, pp = LAYOUTS[name]
        trainmaster(file, "--actor.layout.dp", str(dp), "--actor.layout.pp", str(pp))
        steps = steps_of(directory / "run")
        by_step = [json.loads(line) for line in lengths.read_text().splitlines()]
        for step, each in zip(steps, by_step, strict=True):
            mean = statistics.fmean(each)
            assert math.isclose(mean, step["generate/response_length"]), f"{mean} words a response, and {step}"
        self._keep(name, steps, by_step)

    def _keep(self, name: str, steps: list[dict[str, Any]], lengths: list[list[int]]) -> None:
        """A run's figures, after checks: as many samples as agreed in every step, and finite numbers in the first."""
        counts = [len(each) for each in lengths]
        assert counts == [self.NUM_SAMPLES] * self._spec["steps"], f"{name} scored {counts} samples"
        first = {what: steps[0][what] for what in ("reward/reward", "train/loss", "train/entropy")}
        assert all(math.isfinite(value) for value in first.values()), f"the first step of {name} gave {first}"
        self._first_step.setdefault(name, first)
        self._lengths[name] += [length for each in lengths for length in each]
        figures = [self._figures(step, sum(each)) for step, each in zip(steps, lengths, strict=True)]
        self._rounds[name].append(medians(figures))

    def _figures(self, step: dict[str, float], num_tokens: int) -> dict[str, float]:
        seconds = step["seconds/step"]
        figures = {"samples_per_s": self.NUM_SAMPLES / seconds, "generated_tokens_per_s": num_tokens / seconds}
        if "performance/overhead_fraction" in step:
            figures["master_overhead_fraction"] = step["performance/overhead_fraction"]
        return figures | seconds_of(step, ("generate", "reward", "train", "step"))


# ------------------------------------------------------------------------------------------------ figures


def steps_of(run: Path) -> list[dict[str, float]]:
    """The metrics of every step in a run directory, without those of evaluations."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "train/loss" in entry]


def seconds_of(step: dict[str, float], parts: tuple[str, ...]) -> dict[str, float]:
    return {f"{part}_s": step[f"seconds/{part}"] for part in parts}


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure, over the steps that count."""
    return over_rounds(steps[WARM_STEPS:-1])


def over_rounds(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """To four digits."""
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def summary(lengths: list[int]) -> dict[str, float]:
    twentieths = statistics.quantiles(lengths, n=20)
    quantiles = {f"p{percent}": round(twentieths[percent // 5 - 1], 1) for percent in (10, 25, 50, 75, 90, 95)}
    return {"count": len(lengths), "mean": round(statistics.fmean(lengths), 2), **quantiles, "max": max(lengths)}


# ------------------------------------------------------------------------------------------------ runs and memory


def trainmaster(file: Path, *overrides: str) -> dict[str, float]:
    """`trainmaster run`. Returns the peak resident memory of each of its processes, in MiB."""
    command = [sys.executable, "-m", "trainmaster", "run", str(file), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks: dict[int, tuple[str, float]] = {}
    while True:
        try:
            code = process.wait(MEMORY_LOOK_S)
            break
        except subprocess.TimeoutExpired:
            peaks |= peaks_below(process.pid)
    if code != 0:
        sys.exit(f"{' '.join(command)} ended with exit code {code}")
    roles: dict[str, list[float]] = {}
    for _, (role, peak) in sorted(peaks.items()):
        roles.setdefault(role, []).append(peak)
    return {
        role if len(peaks_mib) == 1 else f"{role}_{at}": peak
        for role, peaks_mib in roles.items()
        for at, peak in enumerate(peaks_mib)
    }


def peaks_below(root: int) -> dict[int, tuple[str, float]]:
    """Role and peak memory so far (the kernel's high-water mark, in MiB) of a process and its descendants, by id."""
    statuses: dict[int, dict[str, str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        statuses[int(folder.name)] = dict(line.split(":", 1) for line in lines)
    found, frontier = {}, {root}
    while frontier:
        for pid in frontier:
            if "VmHWM" in statuses.get(pid, {}):
                found[pid] = (role_of(pid), int(statuses[pid]["VmHWM"].split()[0]) / 1024)
        frontier = {pid for pid, status in statuses.items() if int(status["PPid"]) in frontier}
    return found


def role_of(pid: int) -> str:
    """What a process of a run is there for, by its command line."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        arguments = []
    if "trainmaster.workers.functions.process" in arguments:
        return "reward"
    if "trainmaster" not in arguments:
        return "other"
    command = arguments[arguments.index("trainmaster") + 1]
    return "launcher" if command == "run" else command


# ------------------------------------------------------------------------------------------------ the skewed workload


def make_model(directory: Path) -> None:
    """A model whose responses end after each token with about `END_PROBABILITY`, and its tokenizer of numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL))
    end = MODEL["eos_token_id"]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.5
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[end] = 0.0
        hidden = model.model(input_ids=torch.randint(1, MODEL["vocab_size"], (64, 64)))[0].flatten(0, 1)  # [N, H]
        others = model.lm_head(hidden)[:, 1:].logsumexp(-1)  # [N]
        wanted = others.mean() + math.log(END_PROBABILITY / (1 - END_PROBABILITY))
        model.lm_head.weight[end, 0] = wanted / hidden[:, 0].mean()
    model.save_pretrained(directory)
    vocabulary = {"<end>": end} | {str(number): number for number in range(1, MODEL["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)
    fast.save_pretrained(directory)


def make_prompts(path: Path, count: int) -> None:
    """Prompts of 8 to 16 numbers. The answer is a digit: a response is right if it ends with it, as one in ten does."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            numbers = [str(draw.randrange(1, MODEL["vocab_size"])) for _ in range(draw.randint(8, 16))]
            file.write(json.dumps({"prompt": " ".join(numbers), "answer": str(draw.randrange(10))}) + "\n")


if __name__ == "__main__":
    main()
