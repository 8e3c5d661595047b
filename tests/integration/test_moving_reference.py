"""Real GRPO runs whose reference follows the actor: the hook from the experiment to the weights."""

from __future__ import annotations

from workbench import TINY_MODEL, Workbench

EXPERIMENT = """
from pathlib import Path

from trainmaster import GRPO, Dataset, Model, Optimizer, Reward, RunOptions, Sampling

here = Path(__file__).parent
experiment = GRPO(
    actor=Model(config={config!r}, tokenizer=here / "tokenizer"),
    prompts=Dataset(path=here / "train.jsonl"),
    reward=Reward(function="count_ones"),
    sampling=Sampling(max_new_tokens=6),
    optimizer=Optimizer(learning_rate=3e-3),
    batch_size=4,
    group_size=4,
    kl_coefficient=0.01,
    microbatch_tokens=256,
    run=RunOptions(name="test", directory=here / "runs", steps=3, threads=1),
)


def count_ones(prompt, response, row):
    return response.count("1")
"""


def test_a_reference_that_copies_the_actor_after_each_step_is_where_the_next_begins(workbench: Workbench) -> None:
    workbench.file.write_text(EXPERIMENT.format(config=TINY_MODEL))
    follows = ["--reference_eta", "1"]
    runs = {"stays": [], "follows": follows, "stages": [*follows, "--actor.layout.pp", "2"]}
    for name, overrides in runs.items():
        done = workbench.run("--run.name", name, *overrides)
        assert done.returncode == 0, done.stderr
    kl = {name: workbench.series("train/kl", name) for name in runs}
    assert [len(values) for values in kl.values()] == [3, 3, 3]
    assert min(kl["stays"][1:]) > 1e-6
    for name in ("follows", "stages"):
        assert max(map(abs, kl[name])) < 1e-9, name
