"""Supervised fine-tuning of a 0.6 M-parameter model on two-digit addition: no download, minutes on a laptop.

trainmaster run examples/arithmetic/sft.py
trainmaster run examples/arithmetic/sft.py --run.name second --model.layout.dp 2 --model.layout.pp 1
"""

import task
from trainmaster import SFT, AnswerEvaluation, Dataset, Layout, Model, Optimizer, Reward, RunOptions, Sampling

experiment = SFT(
    model=Model(config=task.MODEL, tokenizer=task.TOKENIZER, layout=Layout(pp=2)),
    dataset=Dataset(path=task.TRAIN),
    evaluation=Dataset(path=task.HELD_OUT),
    answers=AnswerEvaluation(
        dataset=Dataset(path=task.HELD_OUT),
        reward=Reward(function="exact_match"),
        sampling=Sampling(max_new_tokens=5),
    ),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=20),
    batch_size=128,
    microbatch_tokens=1024,
    run=RunOptions(name="arithmetic-sft", steps=400, evaluate_every=10),
)


def prepare(experiment: SFT) -> None:
    """Makes the data and the tokenizer."""
    task.write_all()
