"""Real GRPO runs that train adapters: the reference is their base, and a checkpoint is peft's directory."""

from __future__ import annotations

import json

from safetensors import safe_open
from workbench import TINY_MODEL, Workbench

EXPERIMENT = """
from pathlib import Path

from trainmaster import GRPO, Dataset, Layout, LoRA, Model, Optimizer, Reward, RunOptions, Sampling

here = Path(__file__).parent
first = here / "runs" / "first" / "checkpoints" / "step-2"
experiment = GRPO(
    actor=Model(config={config!r}, tokenizer=here / "tokenizer", layout=Layout(pp=2), lora=LoRA(r=4, lora_alpha=32)),
    prompts=Dataset(path=here / "train.jsonl"),
    reward=Reward(function="count_ones"),
    sampling=Sampling(max_new_tokens=6),
    optimizer=Optimizer(learning_rate=1e-2),
    batch_size=4,
    group_size=4,
    kl_coefficient=0.01,
    microbatch_tokens=256,
    run=RunOptions(name="first", directory=here / "runs", steps=2, threads=1, save_optimizer=True),
)


def count_ones(prompt, response, row):
    return response.count("1")
"""


def test_adapters_are_saved_as_pefts_and_gone_on_from_in_another_layout(workbench: Workbench) -> None:
    text = EXPERIMENT.format(config=TINY_MODEL)
    workbench.file.write_text(text)
    done = workbench.run()
    assert done.returncode == 0, done.stderr
    first = workbench.series("train/kl", "first")
    assert abs(first[0]) < 1e-6 < first[1], "adapters begin with the reference"
    log = (workbench.folder / "runs" / "first" / "logs" / "worker-1.log").read_text()
    assert "reference takes no memory: its weights are those of actor" in log
    checkpoint = workbench.folder / "runs" / "first" / "checkpoints" / "step-2"
    files = {path.name for path in checkpoint.iterdir() if "token" not in path.name}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer"}
    assert {"adapter_model.safetensors"} < set(json.loads((checkpoint / "manifest.json").read_text())["files"])
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        layers = {name.split(".")[4] for name in file.keys()}  # noqa: SIM118  # no dict
    assert layers == {"0", "1", "2", "3"}, "of both stages"

    text = text.replace("Layout(pp=2)", "Layout()").replace("lora_alpha=32", "lora_alpha=32, path=first")
    workbench.file.write_text(text.replace("learning_rate=1e-2", "learning_rate=1e-2, state=first"))
    done = workbench.run("--run.name", "second")
    assert done.returncode == 0, done.stderr
    assert min(workbench.series("train/kl", "second")) > 1e-4, "the reference is the base, not where the run began"
