"""The GSM8K examples as they stand, on rows of GSM8K's format that are made here: a short SFT, then GRPO from it."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM
from workbench import Workbench

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "gsm8k"
QUESTION = "Ann and Ben have the same number of pens. How many pens do they have together?"
ANSWERS = {
    4: ("2+2=<<2+2=4>>4\n#### 4", "Both together have 2*2=<<2*2=4>>4 pens.\n#### 4"),
    1200: ("600+600=<<600+600=1200>>1,200\n#### 1,200", "Both together have 2*600=<<2*600=1200>>1200 pens.\n#### 1200"),
}
"""Worked out in one way for SFT, in another for GRPO: a response has the number of its row, but never its text."""
NUM_ROWS, SFT_STEPS, STEPS = 32, 40, 3


def write_rows(path: Path, wording: int) -> list[int]:
    """The question does not tell which number is right, so a group's responses differ. Returns the numbers."""
    numbers = [list(ANSWERS)[at % 2] for at in range(NUM_ROWS)]
    rows = [{"question": QUESTION, "answer": ANSWERS[number][wording]} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return numbers


def run_example(bench: Workbench, name: str, *overrides: str) -> str:
    process = bench.start("run", str(EXAMPLES / name), *overrides)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "phi3"])
def test_a_checkpoint_of_any_family(family: str, workbench: Workbench) -> None:
    rows, start = workbench.folder / "worked.jsonl", workbench.folder / family
    write_rows(rows, wording=0)
    runpy.run_path(str(EXAMPLES / "sft.py"))["train_tokenizer"](rows, ("question", "answer"), start)
    sizes = {"vocab_size": 4096, "max_position_embeddings": 1024, "n_positions": 1024}
    config = tiny_config(family) | {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config |= {name: value for name, value in sizes.items() if name in config}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(start)

    sft = ("--run.steps", "4", "--optimizer.learning_rate", "3e-3", "--optimizer.warmup_steps", "0")
    run_example(workbench, "sft.py", "--model", str(start), "--dataset.path", str(rows), *sft)
    losses = workbench.series("train/loss", "gsm8k-sft")
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.1
    left = workbench.folder / "runs" / "gsm8k-sft" / "checkpoints" / "step-4"
    trained, report = AutoModelForCausalLM.from_pretrained(left, output_loading_info=True)
    assert trained.config.model_type == family
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    small = ("--batch_size", "4", "--group_size", "4", "--sampling.max_new_tokens", "16", "--run.steps", "2")
    run_example(workbench, "grpo.py", "--actor", str(left), "--prompts.path", str(rows), *small)
    assert len(workbench.series("train/kl", "gsm8k-grpo")) == 2
    assert all(entropy > 0 for entropy in workbench.series("train/entropy", "gsm8k-grpo"))


def test_grpo_goes_on_from_what_sft_left(workbench: Workbench) -> None:
    folder = workbench.folder
    worked, asked, tokenizer = folder / "worked.jsonl", folder / "asked.jsonl", folder / "bytes" / "tokenizer"
    write_rows(worked, wording=0)
    numbers = write_rows(asked, wording=1)
    sft = ("--run.steps", str(SFT_STEPS), "--optimizer.learning_rate", "3e-3", "--optimizer.warmup_steps", "5")
    run_example(workbench, "sft.py", "--dataset.path", str(worked), "--model.tokenizer", str(tokenizer), *sft)
    losses = workbench.series("train/loss", "gsm8k-sft")
    assert losses[-1] < losses[0] / 4
    start = folder / "runs" / "gsm8k-sft" / "checkpoints" / f"step-{SFT_STEPS}"

    small = ("--batch_size", "4", "--group_size", "4", "--sampling.max_new_tokens", "48", "--run.steps", str(STEPS))
    run_example(workbench, "grpo.py", "--actor.path", str(start), "--prompts.path", str(asked), *small)
    for key in ("reward/reward", "train/loss", "train/kl", "train/entropy", "train/clip_fraction"):
        assert len(workbench.series(key, "gsm8k-grpo")) == STEPS, key
    assert all(norm > 0 for norm in workbench.series("train/gradient_norm", "gsm8k-grpo"))
    assert any(0 < reward < 1 for reward in workbench.series("reward/reward", "gsm8k-grpo"))

    lines = (folder / "runs" / "gsm8k-grpo" / "samples.jsonl").read_text().splitlines()
    judged = set()
    for sample in map(json.loads, lines):
        assert sample["prompt"] == QUESTION + "\n"
        number = numbers[int(sample["id"].split("/")[2])]
        found = re.search(r"####\s*(4|1,200)$", sample["response"])
        if found is not None:
            assert sample["reward"] == (int(found[1].replace(",", "")) == number), sample
            assert sample["response"] != ANSWERS[number][1], "an exact match would not have done"
            judged.add((number, sample["reward"]))
    assert {reward for _, reward in judged} == {0.0, 1.0}, "numbers were read, and some were right"

    left = folder / "runs" / "gsm8k-grpo" / "checkpoints" / f"step-{STEPS}"
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {path.name for path in left.iterdir()}
