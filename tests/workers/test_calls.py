"""Model function calls by the graph's keys, against the same calls without remaps: one worker, one tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from shards import LOSS, SAMPLING, lone_shard
from torch import Tensor
from trainmaster.api.algorithms import AlgorithmSettings, Generation, LogProbabilities, SupervisedLoss
from trainmaster.api.batch import Samples
from trainmaster.api.config import Layout
from trainmaster.api.errors import ConfigError
from trainmaster.api.graph import CallKind, Microbatching, ModelFunctionCall
from trainmaster.system.rpc.commands import CallDone
from trainmaster.workers.calls import call_model
from trainmaster.workers.data.store import Store
from trainmaster.workers.models.cache import KVCache
from trainmaster.workers.pipeline import generation
from trainmaster.workers.recording import Record
from trainmaster.workers.shard import ModelShard
from workbench import TINY_MODEL

LENGTHS = (5, 7, 4, 6)
IDS = tuple(f"d/0/{at}/0" for at in range(len(LENGTHS)))
POLICY = replace(LOSS, kl_coefficient=0.1)
SCORE = LogProbabilities(temperature=0.8)
Values = dict[str, list[Tensor]]


class FakeTokenizer:
    eos_token_id = 1

    def get_vocab(self) -> dict[str, int]:
        return {"<eos>": 1, "a": 3}


def call(
    settings: AlgorithmSettings,
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...] | None = None,
    input_remap: Mapping[str, str] | None = None,
    output_remap: Mapping[str, str] | None = None,
) -> ModelFunctionCall:
    kinds = {Generation: CallKind.GENERATE, LogProbabilities: CallKind.INFERENCE, SupervisedLoss: CallKind.INFERENCE}
    return ModelFunctionCall(
        name="call",
        model="actor",
        kind=kinds.get(type(settings), CallKind.TRAIN_STEP),
        settings=settings,
        inputs=inputs or settings.reads,
        outputs=settings.writes if outputs is None else outputs,
        input_remap=dict(input_remap or {}),
        output_remap=dict(output_remap or {}),
        batch_size=len(IDS),
        minibatch_size=len(IDS),
        microbatching=Microbatching(max_tokens=64),
    )


@pytest.fixture
def values() -> Values:
    """By the algorithms' names."""
    generator = torch.Generator().manual_seed(4)

    def noise(length: int) -> Tensor:
        return -torch.rand(length, generator=generator)

    return {
        "tokens": [torch.randint(3, TINY_MODEL["vocab_size"], (length,), generator=generator) for length in LENGTHS],
        "loss_mask": [torch.arange(length) >= 2 for length in LENGTHS],
        "log_probabilities": [noise(length) for length in LENGTHS],
        "reference_log_probabilities": [noise(length) for length in LENGTHS],
        "advantage": [noise(1) for _ in LENGTHS],
        "prompt": [torch.randint(3, TINY_MODEL["vocab_size"], (length,), generator=generator) for length in LENGTHS],
    }


def run(
    made: ModelFunctionCall,
    values: Values,
    shard: ModelShard | None = None,
    record: Record | None = None,
    **renamed: str,
) -> tuple[CallDone, Store]:
    """In two microbatches, out of a store that knows the values of `renamed` by the keys that these name."""
    store = Store()
    samples = store.put_all(
        [
            (sequence, {renamed.get(name, name): column[at] for name, column in values.items()})
            for at, sequence in enumerate(IDS)
        ]
    ).only(made.inputs)
    share = samples.split([(2, 0), (3, 1)])
    shard = shard or lone_shard(Layout(), 0)
    done = call_model(made, share, shard, store, FakeTokenizer, record=record)  # type: ignore[arg-type]
    return done, store


def column(store: Store, outputs: Samples | None, key: str) -> list[list[float]]:
    assert outputs is not None
    assert sorted(outputs.ids) == sorted(IDS)
    assert key in outputs.keys
    return [store.get(sequence, key).tolist() for sequence in IDS]


def test_inference_reads_and_writes_by_the_graphs_keys(values: Values) -> None:
    plain, before = run(call(SCORE), values)
    made = call(
        SCORE,
        inputs=("chosen", "tokens"),
        outputs=("scores",),
        input_remap={"chosen": "tokens", "tokens": "loss_mask"},
        output_remap={"log_probabilities": "scores"},
    )
    done, store = run(made, values, tokens="chosen", loss_mask="tokens", log_probabilities="old")
    assert column(store, done.outputs, "scores") == column(before, plain.outputs, "log_probabilities")
    assert any(any(row) for row in column(store, done.outputs, "scores"))
    assert plain.outputs is not None
    assert done.outputs == plain.outputs.remap({"log_probabilities": "scores"})
    assert (IDS[0], "log_probabilities") not in store


def test_inference_may_have_two_inputs_swapped(values: Values) -> None:
    plain, before = run(call(SCORE), values)
    swap = {"tokens": "loss_mask", "loss_mask": "tokens"}
    done, store = run(call(SCORE, input_remap=swap), values, **swap)
    assert column(store, done.outputs, "log_probabilities") == column(before, plain.outputs, "log_probabilities")


def test_an_output_that_the_call_does_not_declare_is_not_kept(values: Values) -> None:
    del values["log_probabilities"]
    done, store = run(call(SCORE, outputs=()), values)
    assert done.outputs is None
    assert (IDS[0], "log_probabilities") not in store


def test_statistics_alone_need_no_outputs(values: Values) -> None:
    plain, _ = run(call(SupervisedLoss()), values)
    swap = {"tokens": "loss_mask", "loss_mask": "tokens"}
    done, _ = run(call(SupervisedLoss(), input_remap=swap), values, **swap)
    assert plain.statistics["loss"].weight == sum(LENGTHS) - 2 * len(LENGTHS)
    assert done == plain


def test_training_may_have_two_inputs_swapped(values: Values) -> None:
    swap = {
        "log_probabilities": "reference_log_probabilities",
        "reference_log_probabilities": "log_probabilities",
    }
    plain, _ = run(call(POLICY), values)
    swapped, _ = run(call(POLICY, input_remap=swap), values, **swap)
    assert swapped == plain
    assert swapped.version == 1
    otherwise, _ = run(call(POLICY, input_remap=swap), values)
    assert otherwise.statistics["kl"] != plain.statistics["kl"]


def test_a_recorded_training_has_advantages_that_are_not_all_zero(values: Values) -> None:
    """Such as those of rewards that are all alike."""
    values["advantage"] = [torch.zeros(1) for _ in LENGTHS]
    assert run(call(LOSS), values)[0].statistics["gradient_norm"].total == 0
    record = Record("g", "call", 0)
    assert run(call(LOSS), values, record=record)[0].statistics["gradient_norm"].total > 0
    assert [each.keys["advantage"].tolist() for each in record.microbatches] == [[1.0, -0.5]] * 2
    assert all(gradient.any() for gradient in record.gradients.values())


def test_generation_reads_and_writes_by_the_graphs_keys_and_may_swap_outputs(values: Values) -> None:
    settings = Generation(sampling=SAMPLING)
    plain, before = run(call(settings), {"prompt": values["prompt"]})
    assert plain.outputs is not None
    assert tuple(plain.outputs.keys) == settings.writes
    made = call(
        settings,
        inputs=("question",),
        outputs=("loss_mask", "tokens", "versions"),
        input_remap={"question": "prompt"},
        output_remap={"tokens": "loss_mask", "loss_mask": "tokens"},
    )
    done, store = run(made, {"prompt": values["prompt"]}, prompt="question")
    assert column(store, done.outputs, "loss_mask") == column(before, plain.outputs, "tokens")
    assert column(store, done.outputs, "tokens") == column(before, plain.outputs, "loss_mask")
    assert column(store, done.outputs, "versions") == column(before, plain.outputs, "versions")
    assert (IDS[0], "log_probabilities") not in store
    assert done.statistics == plain.statistics


def test_a_generation_keeps_within_the_tokens_of_a_microbatch(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved, columns = [], []

    class Noted(KVCache):
        def __init__(self, num_rows: int, max_length: int) -> None:
            super().__init__(num_rows, max_length)
            reserved.append(num_rows * max_length)

    monkeypatch.setattr(generation, "KVCache", Noted)
    longest = max(LENGTHS) + SAMPLING.max_new_tokens - 1
    for num_slots in (4, 1):
        made = replace(call(Generation(sampling=SAMPLING)), microbatching=Microbatching(max_tokens=num_slots * longest))
        done, store = run(made, {"prompt": values["prompt"]})
        columns.append(column(store, done.outputs, "tokens"))
    assert reserved == [4 * longest, longest]
    assert columns[0] == columns[1]


def test_before_the_last_stage_only_tokens_are_read_whatever_they_are_called(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    shard = lone_shard(Layout(pp=2), 0)

    def train(algorithm: object, microbatches: list, *_: object) -> dict:
        seen.extend(microbatches)
        return {}

    monkeypatch.setattr(shard, "train", train)
    made = call(SupervisedLoss(), inputs=("mask", "chosen"), input_remap={"chosen": "tokens", "mask": "loss_mask"})
    store = Store()
    samples = store.put_all([(each, {"chosen": value}) for each, value in zip(IDS, values["tokens"], strict=True)])
    call_model(replace(made, kind=CallKind.TRAIN_STEP), [samples.select((1, 0))], shard, store, FakeTokenizer)  # type: ignore[arg-type]
    (microbatch,) = seen
    assert microbatch.tokens.tolist() == [torch.cat([values["tokens"][at] for at in (1, 0)]).tolist()]
    assert microbatch.keys == {}


def test_a_stop_token_that_the_tokenizer_has_not_is_refused(values: Values) -> None:
    settings = Generation(sampling=replace(SAMPLING, stop_tokens=("a", "<end>")))
    with pytest.raises(ConfigError, match=r"sampling\.stop_tokens = '<end>': the tokenizer has no such token\. Write"):
        run(call(settings), {"prompt": values["prompt"]})


@pytest.mark.parametrize("settings", [SCORE, POLICY, SupervisedLoss()])
def test_the_settings_name_all_that_an_algorithm_reads(values: Values, settings: AlgorithmSettings) -> None:
    run(call(settings), {name: values[name] for name in settings.reads})
