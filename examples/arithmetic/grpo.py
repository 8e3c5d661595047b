"""GRPO on two-digit addition, from a checkpoint that SFT left: as it stands, that of `make demo`.

trainmaster run examples/arithmetic/grpo.py --actor runs/arithmetic-sft/checkpoints/step-400
"""

from pathlib import Path

import task
from trainmaster import GRPO, AnswerEvaluation, Dataset, Layout, Model, Optimizer, Reward, RunOptions, Sampling

experiment = GRPO(
    actor=Model(path=Path("runs/demo/sft/checkpoints/step-156"), layout=Layout(pp=2)),
    prompts=Dataset(path=task.TRAIN),
    reward=Reward(function="exact_match"),
    sampling=Sampling(max_new_tokens=5),
    evaluation=AnswerEvaluation(
        dataset=Dataset(path=task.HELD_OUT),
        reward=Reward(function="exact_match"),
        sampling=Sampling(max_new_tokens=5),
    ),
    optimizer=Optimizer(learning_rate=2e-4, warmup_steps=10),
    batch_size=64,
    group_size=8,
    minibatches=2,
    kl_coefficient=0.001,
    microbatch_tokens=2048,
    run=RunOptions(name="arithmetic-grpo", steps=100, evaluate_every=25),
)


def prepare(experiment: GRPO) -> None:
    """Makes the data."""
    task.write_all()
