"""`trainmaster doctor` from the command line."""

import re

from workbench import TINY_MODEL, Workbench


def test_a_layout_agrees_with_one_process_and_leaves_nothing_behind(workbench: Workbench) -> None:
    layout = ("--model.layout.pp", "2", "--model.layout.dp", "2", "--model.layout.schedule", "zb-h1")
    before = sorted(path.name for path in workbench.folder.iterdir())
    process = workbench.start("doctor", str(workbench.file), *layout)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "model: call train, dp=2 pp=2 tp=1 sp=1 schedule=zb-h1, beside one process" in out
    figures = dict(re.findall(r"^  (\S.*?)  +[\d.e+-]+ +[\d.e+-]+ +([\d.e+-]+)$", out, re.MULTILINE))
    assert {"logits", "log-probabilities", "logits, transformers' own", "loss", "gradient norm"} < figures.keys()
    assert all(float(figure) < 1e-4 for figure in figures.values())
    assert "layout and one process agree" in out
    assert sorted(path.name for path in workbench.folder.iterdir()) == before


GRPO = """
from pathlib import Path

from trainmaster import GRPO, Dataset, Layout, LoRA, Model, Optimizer, Reward, RunOptions, Sampling

here = Path(__file__).parent
experiment = GRPO(
    actor=Model(config={config!r}, tokenizer=here / "tokenizer", layout=Layout(pp=2), lora=LoRA(r=4)),
    prompts=Dataset(path=here / "train.jsonl"),
    reward=Reward(function="nothing"),
    sampling=Sampling(max_new_tokens=6),
    batch_size=4,
    group_size=4,
    kl_coefficient=0.01,
    microbatch_tokens=64,
    run=RunOptions(threads=1),
)


def nothing(prompt, response, row):
    return 0.0
"""


def test_gradients_of_grpo_are_compared_even_if_all_rewards_are_alike(workbench: Workbench) -> None:
    workbench.file.write_text(GRPO.format(config=TINY_MODEL))
    process = workbench.start("doctor", str(workbench.file), "--all")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "actor: call train, dp=1 pp=2 tp=1 sp=1 schedule=1f1b, beside one process" in out
    assert "actor: call reference, dp=1" in out
    assert out.count("layout and one process agree") == 2
    sizes = dict(re.findall(r"^  gradient of (\S+) +([\d.e+-]+) +[\d.e+-]+ +[\d.e+-]+$", out, re.MULTILINE))
    assert len(sizes) == 2 * 4 * 7, "two adapters for each product of each layer"
    for name, size in sizes.items():
        assert (float(size) > 0) == ("lora_B" in name), f"{name}: B begins at zero, so A's gradient is zero"
