"""Real runs: processes, ZeroMQ, gloo, a tiny transformers model; held against one plain process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from workbench import TINY_MODEL, Workbench

STEPS, BATCH = 4, 16
LAYOUTS = {
    "pp1": [],
    "pp2": ["--model.layout.pp", "2"],
    "chunks": ["--model.layout.pp", "2", "--model.layout.schedule", "interleaved", "--model.layout.chunks", "2"],
    "zb-h1": ["--model.layout.pp", "2", "--model.layout.schedule", "zb-h1", "--model.layout.recompute", "stage"],
    "dp2-ahead": ["--model.layout.dp", "2", "--run.max_steps_ahead", "2"],
    "pp3": ["--model.layout.pp", "3", "--minibatch_size", "8"],
    "pp2dp2": ["--model.layout.pp", "2", "--model.layout.dp", "2", "--minibatch_size", "8"],
}


@pytest.fixture(scope="module")
def initial_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with random weights, made by transformers alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY_MODEL)
    model = AutoModelForCausalLM.from_config(config)
    path = tmp_path_factory.mktemp("initial") / "model"
    model.save_pretrained(path)
    return path


def reference_run(
    path: Path, folder: Path, order: list[int], minibatch: int
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights of the same loop in plain torch, one sequence a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    losses, norms, num_updates = [], [], 0
    for step in range(STEPS):
        loss_sum, count_sum, step_norms = 0.0, 0, []
        batch = order[step * BATCH : (step + 1) * BATCH]
        for start in range(0, BATCH, minibatch):
            parts = []
            for index in batch[start : start + minibatch]:
                prompt = tokenizer(rows[index]["prompt"])["input_ids"]
                answer = [*tokenizer(rows[index]["answer"])["input_ids"], tokenizer.eos_token_id]
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
                parts.append((loss, len(answer)))
            count = sum(length for _, length in parts)
            total = torch.stack([loss for loss, _ in parts]).sum()
            optimizer.zero_grad()
            (total / count).backward()
            step_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            num_updates += 1
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, num_updates / 4)
            optimizer.step()
            loss_sum, count_sum = loss_sum + float(total.detach()), count_sum + count
        losses.append(loss_sum / count_sum)
        norms.append(sum(step_norms) / len(step_norms))
    return losses, norms, model.state_dict()


def stream_order(seed: int, num_sequences: int) -> list[int]:
    """Of the first pass, by the documented rule."""
    import hashlib

    import numpy as np

    entropy = hashlib.sha256(f"{seed}/dataset/0".encode()).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(entropy[:16], "big")))
    return generator.permutation(num_sequences).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_plain_loop_step_by_step(layout: str, workbench: Workbench, initial_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = workbench.file.read_text().replace(f"config={TINY_MODEL!r}", f"path={str(initial_model)!r}")
    workbench.file.write_text(text)
    done = workbench.run(*LAYOUTS[layout], "--run.save_every", "2")
    assert done.returncode == 0, done.stderr
    minibatch = 8 if "--minibatch_size" in LAYOUTS[layout] else BATCH
    losses, norms, weights = reference_run(initial_model, workbench.folder, stream_order(0, 64), minibatch)
    assert workbench.series("train/loss") == pytest.approx(losses, abs=1e-5)
    assert workbench.series("train/gradient_norm") == pytest.approx(norms, rel=1e-4)

    checkpoints = workbench.folder / "runs" / "test" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-2", "step-4"]
    trained = AutoModelForCausalLM.from_pretrained(checkpoints / "step-4").state_dict()
    initial = AutoModelForCausalLM.from_pretrained(initial_model).state_dict()
    assert trained.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name], weight, atol=2e-4, rtol=1e-3, msg=name)
        assert not torch.equal(trained[name], initial[name]), f"{name} did not change"
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "step-4")
    assert tokenizer("12+3=")["input_ids"] == [4, 5, 13, 6, 14]


def test_initial_weights_and_evaluation_do_not_depend_on_the_layout(workbench: Workbench) -> None:
    results: dict[str, tuple[list[float], list[float]]] = {}
    layouts = {
        "one": [],
        "two": ["--model.layout.pp", "2"],
        "copies": ["--model.layout.dp", "2", "--batch_size", "16"],
    }
    for name, overrides in layouts.items():
        done = workbench.run("--run.name", name, "--run.evaluate_every", "2", *overrides)
        assert done.returncode == 0, done.stderr
        results[name] = workbench.series("train/loss", name), workbench.series("evaluation/loss", name)
        assert "sizes" in done.stdout
        assert "minibatch" in done.stdout
        assert "step 4/4" in done.stdout
    for name in ("two", "copies"):
        assert results[name][0] == pytest.approx(results["one"][0], abs=1e-5)
        assert results[name][1] == pytest.approx(results["one"][1], abs=1e-5)
    assert len(results["one"][1]) == 3, "before the first step, after the second and after the last"
    assert results["one"][1][-1] < results["one"][1][0]


def test_metrics_reach_tensorboard(workbench: Workbench) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = workbench.run("--model.layout.dp", "2")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(workbench.folder / "runs" / "test" / "tensorboard"))
    events.Reload()
    wanted = {
        "train/loss",
        "train/learning_rate",
        "train/gradient_norm",
        "performance/tokens_per_s",
        "seconds/step",
        "seconds/train",
        "seconds/train/redistribute",
        "evaluation/loss",
    }
    assert wanted <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    rates: list[Any] = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == pytest.approx([3e-3 * i / 4 for i in (1, 2, 3, 4)])
