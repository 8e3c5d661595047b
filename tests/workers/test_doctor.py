"""The doctor finds what is wrong, and nothing where nothing is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import GPT2, QWEN, Case, make_context, make_shard
from trainmaster.api.config import Layout
from trainmaster.api.errors import ModelError, RunError
from trainmaster.api.experiments.base import CompiledExperiment
from trainmaster.workers import recording
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.doctor import Examination, compare, examine, table
from trainmaster.workers.memory import Room
from trainmaster.workers.recording import Output, Record

CASE = Case(layout=Layout())


def recorded(case: Case = CASE) -> Record:
    shard, record = make_shard(case, 0, None), Record("train", "train", 0)
    shard.train(SupervisedFineTuning(), case.share(0, 0), record=record)
    return record


def compiled(case: Case = CASE) -> CompiledExperiment:
    return make_context(case, 0).compiled


def examined(*records: Record, case: Case = CASE) -> Examination:
    made = compiled(case)
    return compare(made, made.training.graph.model_calls[0], records)


@pytest.mark.parametrize("config", [QWEN, GPT2], ids=["tied", "dropout"])
def test_what_is_the_same_agrees_to_the_bit_and_with_transformers_closely(config, tmp_path):
    case = replace(CASE, config=config)
    path = recording.path_of(tmp_path, "train", 0)
    recorded(case).write(path)
    found = examined(recording.read(path), case=case)
    assert found.agrees
    differences = {each.what: each.relative for each in found.findings}
    assert 0 < differences.pop("logits, transformers' own") < 1e-5
    assert differences == {"logits": 0, "log-probabilities": 0, "loss": 0, "gradient norm": 0}
    assert {each.relative for each in found.gradients} == {0}
    assert len(found.gradients) == len(list(make_shard(case, 0, None).stage.own_parameters()))
    assert table(found, with_all=False).endswith("layout and one process agree (tolerance 0.0001, relative)\n")


def test_one_wrong_gradient_is_named_first():
    record = recorded()
    record.gradients["model.layers.2.self_attn.k_proj.weight"] *= 1.001
    found = examined(record)
    assert not found.agrees
    assert found.gradients[0].what == "model.layers.2.self_attn.k_proj.weight"
    assert found.gradients[0].relative == pytest.approx(1e-3, rel=0.01)
    assert "k_proj.weight" in (lines := [line for line in table(found, False).splitlines() if "<--" in line])[0]
    assert len(lines) == 1


@pytest.mark.parametrize("side", ["missing", "nan"])
def test_a_gradient_that_is_not_there_or_no_number_is_none(side: str):
    record = recorded()
    if side == "missing":
        del record.gradients["model.norm.weight"]
    else:
        record.gradients["model.norm.weight"][3] = float("nan")
    found = examined(record)
    assert not found.agrees
    assert found.gradients[0].what == "model.norm.weight"
    assert found.gradients[0].relative >= 0.999


def test_gradients_that_are_all_zero_are_no_agreement():
    shard, record = make_shard(CASE, 0, None), Record("train", "train", 0)
    given = CASE.share(0, 0)
    nothing = [replace(each, keys={"loss_mask": torch.zeros_like(each.keys["loss_mask"])}) for each in given]
    shard.train(SupervisedFineTuning(), nothing, record=record)
    with pytest.raises(RunError, match="call train: all gradients are zero in one process, so nothing would be comp"):
        examined(record)


def test_a_model_that_does_not_fit_here_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch):
    record = recorded()
    num_parameters = sum(each.numel() for each in make_shard(CASE, 0, None).stage.parameters())
    for num_bytes, is_enough in ((20 * num_parameters, True), (18 * num_parameters, False), (8, False)):
        monkeypatch.setattr(Room, "on", lambda *_, num_bytes=num_bytes: Room("here", num_bytes))
        if is_enough:
            assert examined(record).agrees
            continue
        with pytest.raises(
            ModelError, match=r"computes twice with the whole model .* more memory.* model: [\d,]+ param"
        ):
            examined(record)


def test_a_token_that_another_one_moved_is_found():
    record = recorded()
    logits, scores = record.outputs[1].logits.clone(), record.outputs[1].log_probabilities.clone()
    logits[4, 2] += 1e-2
    scores[0] = float("nan")
    record.outputs[1] = Output(logits, scores)
    relative = {each.what: each.relative for each in examined(record).findings}
    assert relative["logits"] > 1e-4
    assert relative["logits, transformers' own"] > 1e-4
    assert relative["log-probabilities"] == float("inf")


def test_weights_that_are_not_the_models_are_found_by_both_references():
    shard, record = make_shard(CASE, 0, None), Record("train", "train", 0)
    with torch.no_grad():
        shard.stage.model.get_input_embeddings().weight[5] *= 1.01
    shard.train(SupervisedFineTuning(), CASE.share(0, 0), record=record)
    over = [each.what for each in examined(record).findings if each.relative > 1e-4]
    assert over[:3] == ["logits", "log-probabilities", "logits, transformers' own"]


def test_replicas_whose_gradients_were_not_summed_are_refused():
    one, other = recorded(), replace(recorded(), replica=1)
    other.gradients["model.norm.weight"] = other.gradients["model.norm.weight"] + 1e-6
    with pytest.raises(RunError, match=r"replicas have different gradients of model\.norm\.weight"):
        examined(one, other)


def test_a_call_that_was_not_made_is_named(tmp_path: Path):
    with pytest.raises(RunError, match="call train was not made in the step"):
        list(examine(compiled(), tmp_path))
