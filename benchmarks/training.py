"""A training step of ours beside transformers' own, padded and packed: how fast, and how much memory.

    python benchmarks/training.py --json

Each side trains the same weights on the same 32 sequences of skewed lengths, with the same loss (the mean cross-entropy
of all tokens but each sequence's first), clipping and fused AdamW, in one process with one thread. Steps are taken in
turns, and ratios are medians of pairs. The losses of all sides must agree, step by step, or there is no result.

    ours      `ModelShard.train`: what a worker does for a call
    padded    a row for each sequence, padded to the longest, with an attention mask
    packing   transformers' DataCollatorWithFlattening: one row, whose positions keep sequences apart (sdpa)

    speedup_vs_padded, speedup_vs_hf_packing    by model; the bars are 2.5 and 1.9
    peak_rss_mb                                 of a process that runs this side alone; ours should be the lowest
    before_mb                                   of that, before the steps: Python, torch, the model's weights
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor
from trainmaster import SFT, Dataset, Model, Optimizer, RunOptions
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.context import ShardGroups, WorkerContext
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.shard import ModelShard
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening, PreTrainedModel

CPU = torch.device("cpu")
SIZES = {"256x4": (256, 4), "512x8": (512, 8)}
SIDES = ("ours", "padded", "packing")
NUM_SEQUENCES, SHORTEST, LONGEST = 32, 16, 512
VOCABULARY = 8192
RATE, BETAS, MAX_NORM = 1e-4, (0.9, 0.95), 1.0
AGREEMENT = 2e-4
"""Of losses, relative."""
MEMORY_STEPS = 3
Step = Callable[[], float]
"""Takes an optimizer step; returns the loss before it."""


def config_of(size: str) -> dict[str, object]:
    hidden_size, num_layers = SIZES[size]
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 8 // 3 // 32 * 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(NUM_SEQUENCES).log_normal_(4.4, 0.8, generator=generator).clamp(SHORTEST, LONGEST).int()
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths.tolist()]


def our_shard(size: str) -> ModelShard:
    compiled = SFT(
        model=Model(config=config_of(size), tokenizer=Path("none")),
        dataset=Dataset(path=Path("none")),
        optimizer=Optimizer(learning_rate=RATE, beta1=BETAS[0], beta2=BETAS[1], max_gradient_norm=MAX_NORM),
        run=RunOptions(seed=1),
    ).compile()
    context = WorkerContext(rank=0, num_workers=1, device=CPU, compiled=compiled, name="bench", address="127.0.0.1")
    return ModelShard(compiled.models["model"], context, ShardGroups())


def our_step(shard: ModelShard, rows: list[Tensor]) -> Step:
    packed = PackedBatch(tuple(map(len, rows)), CPU)
    tokens = torch.cat(rows)[None]
    microbatch = Microbatch(tokens=tokens, packed=packed, keys={"loss_mask": torch.ones(tokens.shape[1]).bool()})

    def step() -> float:
        loss = shard.train(SupervisedFineTuning(), [microbatch])["loss"]
        return loss.total / loss.weight

    return step


def their_model(size: str, weights: dict[str, Tensor]) -> PreTrainedModel:
    with hf_compat.quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(size)), attn_implementation="sdpa")
    model.load_state_dict(weights)
    return model.train()


def their_step(model: PreTrainedModel, rows: list[Tensor], is_packed: bool) -> Step:
    if is_packed:
        inputs = dict(DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows]))
    else:
        longest = max(map(len, rows))
        ids = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (0, longest - len(row))) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return float(loss.detach())

    return step


def step_of(side: str, size: str) -> Step:
    """Each makes the same weights, and lets go of what it does not need."""
    shard, rows = our_shard(size), sequences()
    if side == "ours":
        return our_step(shard, rows)
    weights = {name: tensor.clone() for name, tensor in shard.stage.model.state_dict().items()}
    del shard
    return their_step(their_model(size, weights), rows, is_packed=side == "packing")


def speed(size: str, num_rounds: int) -> dict[str, object]:
    steps = {side: step_of(side, size) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {side: [step()] for side, step in steps.items()}  # warm up
    for _ in range(num_rounds):
        for side, step in steps.items():
            start_s = time.perf_counter()
            losses[side].append(step())
            seconds[side].append(time.perf_counter() - start_s)
    difference = 0.0
    for side in SIDES[1:]:
        difference = max(difference, *(abs(a / b - 1) for a, b in zip(losses["ours"], losses[side], strict=True)))
    if difference > AGREEMENT:
        raise SystemExit(f"{size}: the sides do not do the same work; losses are {losses}")
    num_tokens = sum(map(len, sequences()))

    def paired(other: str) -> float:
        return round(median(a / b for a, b in zip(seconds[other], seconds["ours"], strict=True)), 3)

    return {
        "speedup_vs_padded": paired("padded"),
        "speedup_vs_hf_packing": paired("packing"),
        "tokens_per_s": {side: round(num_tokens / median(each)) for side, each in seconds.items()},
        "largest_loss_difference": float(f"{difference:.1e}"),
        "losses": [round(losses["ours"][0], 4), round(losses["ours"][-1], 4)],
        "tokens": num_tokens,
        "padded_tokens": NUM_SEQUENCES * max(map(len, sequences())),
    }


def memory(size: str) -> dict[str, object]:
    """Each side in a process of its own."""
    found: dict[str, dict[str, int]] = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--side", side, "--size", size]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    return {name: {side: found[side][name] for side in SIDES} for name in ("peak_rss_mb", "before_mb")}


def peak_mb() -> int:
    """Of this process since it began; not `ru_maxrss`, which begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=SIZES, help="this model only")
    parser.add_argument(
        "--side", choices=SIDES, help="take some steps of this side only, and say what memory they took"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side:
        step = step_of(options.side, options.size)
        before_mb = peak_mb()
        for _ in range(MEMORY_STEPS):
            step()
        print(json.dumps({"peak_rss_mb": peak_mb(), "before_mb": before_mb}))
        return
    sizes = [options.size] if options.size else list(SIZES)
    result: dict[str, object] = {size: memory(size) | speed(size, options.rounds) for size in sizes}
    result["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rounds": options.rounds,
    }
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
