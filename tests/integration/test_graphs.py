"""Graphs that are not a recipe's own, and steps in flight at once, with real workers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from workbench import TINY_MODEL, Workbench

ROOT = Path(__file__).parents[2]

COUNT_ONES = """

def count_ones(prompt, response, row):
    return response.count("1")
"""


@pytest.fixture
def bench(workbench: Workbench) -> Workbench:
    """With the recipe of docs/graphs.md, on the tiny folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/graphs.md").read_text(), re.DOTALL)
    for old, new in (
        ('Model(path="models/my-model")', f'Model(config={TINY_MODEL!r}, tokenizer="tokenizer")'),
        ("data/train.jsonl", "train.jsonl"),
        ("exact_match", "count_ones"),
        ("max_new_tokens=16", "max_new_tokens=6"),
        ('name="streamed"', 'name="test"'),
        ("max_steps_ahead=1", "threads=1"),
    ):
        assert old in code
        code = code.replace(old, new)
    workbench.file.write_text(code + COUNT_ONES)
    return workbench


def test_the_recipe_of_the_docs_comes_out_like_plain_grpo(bench: Workbench) -> None:
    streamed = bench.run("--run.name", "streamed", "--actor.layout.dp", "2")
    assert streamed.returncode == 0, streamed.stderr
    bench.file.write_text(bench.file.read_text().replace("experiment = Streamed(", "experiment = GRPO("))
    plain = bench.run("--run.name", "plain")
    assert plain.returncode == 0, plain.stderr
    for key in ("reward/reward", "train/loss", "train/entropy", "generate/response_length"):
        assert bench.series(key, "streamed") == pytest.approx(bench.series(key, "plain"), abs=1e-4), key


def test_steps_ahead_lag_by_no_more_than_they_may_and_say_so(bench: Workbench) -> None:
    done = bench.run("--run.max_steps_ahead", "1", "--run.steps", "4", "--actor.layout.pp", "2")
    assert done.returncode == 0, done.stderr
    lags = bench.series("data/lag_max")
    assert len(lags) == 4
    assert lags[0] == 0
    assert max(lags) == 1, "the next responses are drawn while these are scored"
    assert bench.series("data/dropped") == [0.0] * 4
    drifts = bench.series("train/sampler_kl")
    assert [abs(drift) > 1e-7 for drift in drifts] == [lag > 0 for lag in lags], "older weights drew them"
    rows = [json.loads(line) for line in (bench.folder / "runs/test/samples.jsonl").read_text().splitlines()]
    assert {row["lag"] for row in rows if row["step"] == 1} == {0}
    assert {row["lag"] for row in rows} == set(lags)


def test_nothing_is_left_in_the_stores_when_a_run_is_over(bench: Workbench) -> None:
    done = bench.run("--run.max_steps_ahead", "2", "--run.steps", "5", "--actor.layout.dp", "2", "--drop-zero-variance")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        log = (bench.folder / f"runs/test/logs/worker-{rank}.log").read_text()
        assert "0 values are left in the store" in log
