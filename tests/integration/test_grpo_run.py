"""Real GRPO runs: generation, rewards in processes, a reference, training, through the same master and workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workbench import TINY_MODEL, Workbench

EXPERIMENT = """
from pathlib import Path

from trainmaster import GRPO, Dataset, AnswerEvaluation, Model, Optimizer, Reward, RunOptions, Sampling

here = Path(__file__).parent
experiment = GRPO(
    actor=Model(config={config!r}, tokenizer=here / "tokenizer"),
    prompts=Dataset(path=here / "train.jsonl"),
    reward=Reward(function="count_ones", timeout_s=1.0),
    sampling=Sampling(max_new_tokens=6),
    evaluation=AnswerEvaluation(
        dataset=Dataset(path=here / "held_out.jsonl"),
        reward=Reward(function="count_ones"),
        sampling=Sampling(max_new_tokens=6, temperature=0.0),
        batch_size=8,
    ),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=2),
    batch_size=8,
    group_size=4,
    kl_coefficient=0.01,
    microbatch_tokens=256,
    run=RunOptions(name="test", directory=here / "runs", steps=3, threads=1),
)


def count_ones(prompt, response, row):
    assert row["prompt"] == prompt
    return response.count("1")
"""
FRESH = {"TRAINMASTER_TEST_FRESH": "1"}
"""A seed of hashes of its own: see `preloaded`."""
WATCHED = ("reward/reward", "train/loss", "train/kl", "train/entropy", "generate/response_length", "evaluation/reward")


@pytest.fixture
def bench(workbench: Workbench) -> Workbench:
    workbench.file.write_text(EXPERIMENT.format(config=TINY_MODEL))
    return workbench


def watched(bench: Workbench, name: str) -> dict[str, list[float]]:
    return {key: bench.series(key, name) for key in WATCHED}


def test_two_runs_of_a_seed_are_equal_to_the_bit_and_layouts_agree(bench: Workbench) -> None:
    layouts = {
        "one": [],
        "again": [],
        "stages": ["--actor.layout.pp", "2", "--actor.layout.schedule", "interleaved", "--actor.layout.chunks", "2"],
        "copies": ["--actor.layout.dp", "2"],
        "apart": ["--reference-apart"],
    }
    for name, overrides in layouts.items():
        done = bench.run("--run.name", name, *overrides, **(FRESH if name == "again" else {}))
        assert done.returncode == 0, done.stderr
    one = watched(bench, "one")
    assert watched(bench, "again") == one
    assert watched(bench, "apart") == one
    for name in ("stages", "copies"):
        for key, values in watched(bench, name).items():
            assert values == pytest.approx(one[key], abs=1e-4), f"{key} of {name}"
    assert all(abs(drift) < 1e-5 for drift in bench.series("train/sampler_kl", "stages")), "one step a batch: no drift"
    assert len(one["reward/reward"]) == 3
    assert len(one["evaluation/reward"]) == 2
    samples = [json.loads(line) for line in (bench.folder / "runs/one/samples.jsonl").read_text().splitlines()]
    assert {sample["source"] for sample in samples} == {"train", "evaluation"}
    for sample in samples:
        assert sample["reward"] == sample["response"].count("1")


def test_several_minibatches_and_passes_drift_from_the_sampler(bench: Workbench) -> None:
    done = bench.run("--minibatches", "2", "--passes", "2", "--drop-zero-variance")
    assert done.returncode == 0, done.stderr
    assert any(abs(drift) > 1e-6 for drift in bench.series("train/sampler_kl"))


def test_the_reward_rises(bench: Workbench) -> None:
    done = bench.run("--run.steps", "40", "--kl_coefficient", "0", "--optimizer.learning_rate", "1e-2")
    assert done.returncode == 0, done.stderr
    before, after = bench.series("evaluation/reward")
    assert after > before + 1.0, "counting ones is easy"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("raise KeyError('gone')", "raised KeyError"),
        ("return float('nan')", "nan"),
        ("while True: pass", "took longer"),
        ("import os; os._exit(7)", "ended with exit code 7"),
    ],
)
def test_a_reward_that_fails_ends_the_run_by_its_policy(bench: Workbench, body: str, word: str) -> None:
    text = bench.file.read_text().replace('    return response.count("1")', f"    {body}")
    bench.file.write_text(text.replace("timeout_s=1.0", "timeout_s=0.2"))
    done = bench.run("--evaluation.reward.function", "exact_match")
    assert done.returncode == 1, done.stdout
    assert "error: sample prompts/0/" in done.stderr
    assert word in done.stderr
    assert "Reward.on_failure" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reward_that_fails_may_drop_groups_or_score(bench: Workbench) -> None:
    text = bench.file.read_text().replace(
        '    return response.count("1")',
        '    if row["prompt"][0] in "01234":\n        raise ValueError\n    return response.count("1")',
    )
    bench.file.write_text(text)
    done = bench.run("--run.name", "drop", "--reward.on_failure", "drop", "--evaluation.reward.on_failure", "drop")
    assert done.returncode == 0, done.stderr
    assert "samples got no score, such as prompts/0/" in done.stdout
    assert all(0 < share < 1 for share in bench.series("reward/failures", "drop"))
    overrides = (
        "--reward.on_failure",
        "score",
        "--reward.failure_score",
        "-1",
        "--evaluation.reward.on_failure",
        "drop",
    )
    done = bench.run("--run.name", "score", *overrides)
    assert done.returncode == 0, done.stderr
    assert min(bench.series("reward/reward", "score")) < min(bench.series("reward/reward", "drop"))


def test_a_step_without_variance_says_so_and_is_saved(bench: Workbench) -> None:
    bench.file.write_text(bench.file.read_text().replace('    return response.count("1")', "    return 1"))
    done = bench.run("--run.steps", "1", "--drop-zero-variance", "--evaluation.reward.function", "exact_match")
    assert done.returncode == 0, done.stderr
    assert "all groups have zero reward variance: nothing to learn from this step" in done.stdout
    assert "train was skipped" in done.stdout
    assert (Path(bench.folder) / "runs/test/checkpoints/step-1/config.json").is_file()


def test_an_unknown_reward_is_refused(bench: Workbench) -> None:
    done = bench.run("--reward.function", "no_such")
    assert done.returncode == 2, done.stderr
    assert "no_such" in done.stderr
    assert "count_ones" in done.stderr
