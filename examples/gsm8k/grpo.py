"""GRPO on GSM8K with the number-matching reward, for a Hugging Face model of your own.

    trainmaster run examples/gsm8k/grpo.py --actor models/my-model --prompts.path path/to/gsm8k/train.jsonl

The defaults suit a model of a billion parameters or so on GPUs; for a try on a CPU, take the checkpoint that
examples/gsm8k/sft.py leaves, and --batch_size 4 --group_size 4 --sampling.max_new_tokens 32 --run.steps 3.
"""

from pathlib import Path

from trainmaster import GRPO, Dataset, Layout, Model, Optimizer, Reward, RunOptions, Sampling

experiment = GRPO(
    actor=Model(path=Path("runs/gsm8k-sft/checkpoints/step-100"), layout=Layout(pp=2)),
    prompts=Dataset(path=Path("gsm8k/train.jsonl"), prompt="question", separator="\n"),
    reward=Reward(function="number_match"),
    sampling=Sampling(max_new_tokens=256),
    optimizer=Optimizer(learning_rate=1e-6, warmup_steps=10),
    batch_size=64,
    group_size=8,
    clip_high=0.28,
    kl_coefficient=0.001,
    microbatch_tokens=8192,
    run=RunOptions(name="gsm8k-grpo", steps=100, save_every=50),
)
