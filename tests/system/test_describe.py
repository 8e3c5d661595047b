from dataclasses import replace
from pathlib import Path

from trainmaster.api.config import Dataset, Layout, LoRA, Model
from trainmaster.api.experiments.grpo import GRPO
from trainmaster.api.experiments.sft import SFT
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling
from trainmaster.system.describe import describe


def test_models_with_workers_then_graphs_with_calls():
    experiment = SFT(
        model=Model(path=Path("models/m"), layout=Layout(dp=2, pp=3)),
        dataset=Dataset(path="train.jsonl"),
        evaluation=Dataset(path="test.jsonl"),
        batch_size=8,
        minibatch_size=4,
    )
    assert describe(experiment.compile()).splitlines() == [
        "models",
        "  model: models/m, trained, schedule 1f1b, dp=2 pp=3 tp=1 sp=1, workers 0-5",
        "graph sft",
        "  dataset train.jsonl -> tokens, loss_mask",
        "  train: train_step on model, batch 8, minibatch 4, reads tokens, loss_mask from dataset",
        "graph evaluation",
        "  dataset test.jsonl -> tokens, loss_mask",
        "  evaluate: inference on model, batch 8, minibatch 8, reads tokens, loss_mask from dataset",
    ]


def test_a_random_model_is_described_by_its_type():
    model = Model(config={"model_type": "qwen2"}, tokenizer=Path("t"))
    told = describe(SFT(model=model, dataset=Dataset(path="d")).compile())
    assert "model: random qwen2, trained, schedule 1f1b, dp=1" in told


def test_what_is_trained_of_a_model_and_whose_memory_it_shares():
    told = describe(SFT(model=Model(path="m", trainable=("norm",)), dataset=Dataset(path="d")).compile())
    assert "model: m, trained in part, schedule 1f1b" in told
    actor, reward, sampling = Model(path="m", lora=LoRA(r=4)), Reward(function="f"), Sampling(max_new_tokens=2)
    experiment = GRPO(actor=actor, prompts=Dataset(path="d"), reward=reward, sampling=sampling, kl_coefficient=0.1)
    lines = describe(experiment.compile()).splitlines()
    assert "actor: m, trained by LoRA (r=4), schedule 1f1b" in lines[1]
    assert "reference: m, frozen, in the memory of actor, dp=1" in lines[2]
    partly = replace(experiment, actor=Model(path="m", trainable=("norm",)))
    told = describe(partly.compile()).splitlines()[2]
    assert "reference: m, frozen, in the memory of actor but for what that trains, dp=1" in told


def test_schedules_are_named_and_what_is_foretold_of_them():
    layout = Layout(pp=2, schedule="interleaved", chunks=3, recompute=True)
    compiled = SFT(model=Model(path=Path("m"), layout=layout), dataset=Dataset(path="d")).compile()
    asked = []

    def foretell(*about: object) -> str:
        asked.append(about)
        return "all will be well"

    lines = describe(compiled, foretell).splitlines()
    assert "trained, schedule interleaved, 3 chunks, recompute stage, dp=1" in lines[1]
    assert lines[-1] == "train on model in 2 microbatches, the fewest: all will be well"
    assert asked == [(layout, 2)]
    assert describe(compiled, lambda *_: "") == describe(compiled)
