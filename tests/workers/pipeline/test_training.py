"""Every schedule, in real processes, trains what one process trains, and what transformers itself computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy
import pytest
import torch
from pipelines import GPT2, OPTIMIZER, QWEN, Case, Outcome, Pool, alone, joined, make_shard, microbatch, processes
from tiny_models import tiny_config
from trainmaster.api.config import Layout, LoRA, Precision, Recompute, Schedule
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from transformers import AutoConfig, AutoModelForCausalLM

CLOSE = {"rtol": 2e-4, "atol": 2e-6}
UNTIED = QWEN | {"tie_word_embeddings": False}
NO_DROPOUT = GPT2 | {"embd_pdrop": 0.0, "resid_pdrop": 0.0}


def layout(schedule: str, pp: int, dp: int = 1, recompute: bool = False) -> Layout:
    chunks = 2 if schedule == "interleaved" else 1
    return Layout(dp=dp, pp=pp, schedule=Schedule(schedule), chunks=chunks, recompute=recompute)


SCHEDULES = ["gpipe", "1f1b", "zb-h1", "interleaved"]
ADAPTERS, SOME = LoRA(r=4, lora_alpha=8), LoRA(target_modules=("c_attn", "mlp.c_fc"), use_rslora=True)
CASES = [
    *(Case(layout=layout(schedule, 2), num_microbatches=m) for schedule in SCHEDULES for m in (1, 5)),
    *(Case(layout=layout(schedule, 2, dp=2)) for schedule in SCHEDULES),
    *(Case(layout=layout(schedule, 4), num_microbatches=m) for schedule in SCHEDULES[:3] for m in (3, 5)),
    *(Case(layout=layout(schedule, 2, recompute=True), num_microbatches=4) for schedule in SCHEDULES),
    *(
        Case(layout=replace(layout(schedule, 2), recompute=recompute))
        for schedule, recompute in (("1f1b", Recompute.SELECTIVE), ("zb-h1", Recompute.FULL))
    ),
    *(Case(layout=layout(schedule, 2), config=UNTIED) for schedule in ("1f1b", "zb-h1", "interleaved")),
    *(Case(layout=layout(schedule, 2), config=NO_DROPOUT) for schedule in ("zb-h1", "interleaved")),
    Case(layout=Layout(schedule=Schedule.GPIPE)),
    Case(layout=Layout(schedule=Schedule.ZB_H1)),
    Case(layout=Layout(dp=2, schedule=Schedule.ZB_H1)),
    # adapters; then one end of the pipeline has nothing to train, or the other
    Case(layout=layout("1f1b", 2, dp=2), lora=ADAPTERS),
    Case(layout=layout("zb-h1", 2, recompute=True), lora=ADAPTERS),
    Case(layout=layout("interleaved", 2), config=NO_DROPOUT, lora=SOME),
    Case(layout=layout("zb-h1", 2, dp=2), trainable=(r"layers\.[23]\.", "model.norm")),
    Case(layout=layout("1f1b", 4), trainable=(r"layers\.1\..*proj",)),
    Case(layout=layout("zb-h1", 2), trainable=("embed_tokens",)),
    # with biases of routers, which no gradient reaches
    Case(layout=Layout(dp=2), config=tiny_config("ernie4_5_moe"), optimizer=replace(OPTIMIZER, weight_decay=0.1)),
]


def name_of(case: Case) -> str:
    cut = case.layout
    again = "" if cut.recompute is Recompute.NONE else f"-recompute-{cut.recompute}"
    tied = "" if case.config is QWEN else f"-{case.config['model_type']}-untied"
    some = "-lora" if case.lora else f"-{len(case.trainable)}-trainable" if case.trainable else ""
    return f"{cut.schedule}{again}-dp{cut.dp}-pp{cut.pp}-m{case.num_microbatches}{tied}{some}"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with processes() as pool:
        yield pool


_wanted: dict[str, Outcome] = {}


def wanted_of(case: Case) -> Outcome:
    whole = f"{case.config}/{case.num_microbatches * case.layout.dp}/{case.trainable}/{case.lora}"
    if whole not in _wanted:
        _wanted[whole] = alone(case)
    return _wanted[whole]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradients_and_two_steps_are_those_of_one_process_on_every_stage(pool: Pool, case: Case) -> None:
    wanted, outcomes = wanted_of(case), pool.train(case)
    gradients, weights = joined(outcomes)
    assert set(weights) == set(wanted.weights)
    assert set(gradients) == set(wanted.gradients)
    for name, gradient in wanted.gradients.items():
        numpy.testing.assert_allclose(gradients[name], gradient, err_msg=name, **CLOSE)
    for name, weight in wanted.weights.items():
        numpy.testing.assert_allclose(weights[name], weight, err_msg=name, rtol=1e-3, atol=2e-5)
    for each in outcomes:
        assert each.norms == pytest.approx(wanted.norms, rel=1e-4)
        assert not each.losses or each.losses == pytest.approx(wanted.losses, rel=1e-4)
        for name, weight in each.weights.items():
            stays = numpy.array_equal(weight, each.before[name])
            assert stays == (name not in wanted.gradients), f"{name} of stage {each.stages[name]} stays: {stays}"
    assert sum(bool(each.losses) for each in outcomes) == case.layout.dp, "losses are with the last stages"
    stages = {stage for each in outcomes for stage in each.stages.values()}
    assert stages == set(range(case.layout.num_stages))


def test_in_half_precision_stages_pass_on_what_one_process_computes(pool: Pool) -> None:
    """Hidden states travel as they are, gradients of weights are summed in float32: only their order differs."""
    case = Case(layout=layout("zb-h1", 2, dp=2), dtype=Precision.BFLOAT16, num_steps=1)
    wanted, outcomes = alone(case), pool.train(case)
    gradients, weights = joined(outcomes)
    for name, gradient in wanted.gradients.items():
        assert gradients[name].dtype == numpy.float32
        error = numpy.linalg.norm(gradients[name] - gradient)
        assert error < 2.0**-8 * numpy.linalg.norm(gradient), name
        numpy.testing.assert_allclose(weights[name], wanted.weights[name], err_msg=name, rtol=2.0**-7, atol=1e-3)
    for each in outcomes:
        assert each.norms == pytest.approx(wanted.norms, rel=1e-3)
        assert not each.losses or each.losses == pytest.approx(wanted.losses, rel=1e-4)


@pytest.mark.parametrize("config", [QWEN, UNTIED, NO_DROPOUT], ids=["qwen3", "untied", "gpt2"])
def test_gradients_are_those_of_transformers_own_model(config: dict[str, object]) -> None:
    case = Case(layout=Layout(), config=config, num_microbatches=4, num_steps=1)
    case = replace(case, optimizer=replace(case.optimizer, max_gradient_norm=None))
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shard = make_shard(case, 0, None)
    plain.load_state_dict(shard.stage.model.state_dict(), strict=False)
    total, count = torch.zeros(()), 0
    for each in case.share(0, 0):
        start = 0
        for length in each.packed.seqlens:
            tokens, mask = each.tokens[:, start : start + length], each.keys["loss_mask"][start : start + length]
            log_probabilities = plain(input_ids=tokens).logits[0].log_softmax(-1)
            for at in range(1, length):
                if mask[at]:
                    total, count = total - log_probabilities[at - 1, tokens[0, at]], count + 1
            start += length
    (total / count).backward()
    shard.train(SupervisedFineTuning(), case.share(0, 0))
    gradients = {name: each.grad for name, each in shard.stage.model.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("config", [QWEN, GPT2], ids=["qwen3", "dropout"])
def test_recomputation_changes_no_bit(pool: Pool, schedule: str, config: dict[str, object]) -> None:
    plain = Case(layout=layout(schedule, 2), num_microbatches=5, config=config)
    again = replace(plain, layout=layout(schedule, 2, recompute=True))
    for one, other in zip(pool.train(plain), pool.train(again), strict=True):
        assert (one.losses, one.norms) == (other.losses, other.norms)
        for name, weight in one.weights.items():
            numpy.testing.assert_array_equal(other.weights[name], weight, err_msg=name)


def test_dropout_is_there_and_the_same_in_every_schedule(pool: Pool) -> None:
    """The masks depend on stage and microbatch, not on the order of work."""
    case = Case(layout=layout("1f1b", 2), num_microbatches=4, config=GPT2)
    wanted = pool.train(case)
    assert wanted[1].norms != pytest.approx(alone(replace(case, config=NO_DROPOUT)).norms, rel=1e-3)
    for schedule in ("gpipe", "zb-h1"):
        for one, other in zip(wanted, pool.train(replace(case, layout=layout(schedule, 2))), strict=True):
            assert one.norms == pytest.approx(other.norms, rel=1e-5)
            for name, weight in one.weights.items():
                numpy.testing.assert_allclose(other.weights[name], weight, err_msg=name, rtol=1e-4, atol=1e-6)


@lru_cache
def _inferred() -> list[float]:
    return infer(0, None, Case(layout=Layout(), num_microbatches=5))


def infer(rank: int, port: int | None, case: Case) -> list[float]:
    """Loss and tokens that count, from an evaluation; on the last stage."""
    done, _ = make_shard(case, rank, port).infer(SupervisedFineTuning(), case.share(0, 0))
    return [done["loss"].total, done["loss"].weight] if done else []


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_inference_in_stages_and_chunks_is_that_of_one_process(pool: Pool, schedule: str) -> None:
    case = Case(layout=layout(schedule, 2), num_microbatches=5)
    first, last = pool.run(infer, 2, case)
    assert first == []
    assert last == pytest.approx(_inferred(), rel=1e-5)


def test_microbatches_name_their_sequences() -> None:
    assert microbatch(0).ids == ("data/0/0/0", "data/0/0/1")
