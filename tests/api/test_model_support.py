import json
import re

import pytest
from trainmaster.api.errors import ModelError
from trainmaster.api.model_support import FILE, Column, Packing, Support, Way, from_json, support_table, to_json

MUST_PASS = [
    *(
        "llama",
        "qwen2",
        "qwen3",
        "qwen2_moe",
        "qwen3_moe",
        "mistral",
        "mixtral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
    ),
    *("phi3", "gpt2", "gpt_neox", "opt", "olmo", "olmo2", "deepseek_v2", "deepseek_v3", "glm4", "cohere", "cohere2"),
    *("granite", "starcoder2", "smollm3", "gpt_oss"),
]
PARTLY = Support(
    "odd",
    Way(Packing.ALONE, embeds_everywhere=True),
    fails={Column.SPLIT: "has loops", Column.DECODE: "has no cache"},
    unless={"alibi": (True, "has wrong outputs")},
)


@pytest.mark.parametrize("model_type", MUST_PASS)
def test_what_must_pass_passes_whole(model_type: str):
    support = support_table().of(model_type)
    assert support.way == Way(Packing.ROW)
    assert all(support.passes(column) for column in Column)
    assert support.refusal({"model_type": model_type}, num_stages=4, generates=True) is None


def test_the_file_is_as_it_is_written():
    read = json.loads(FILE.read_text())
    table = support_table()
    assert {name: to_json(support) for name, support in table.types.items()} == read["types"]
    assert list(read["types"]) == sorted(read["types"])
    assert FILE.read_text() == json.dumps(read, indent=1) + "\n"


@pytest.mark.parametrize("support", [PARTLY, Support("fine", Way()), Support("bert", None, "is an encoder")])
def test_an_entry_comes_back(support: Support):
    assert from_json(support.model_type, json.loads(json.dumps(to_json(support)))) == support


def test_reasons_end_a_sentence_that_begins_with_the_type():
    for support in support_table().types.values():
        reasons = [support.reason, *support.fails.values(), *(reason for _, reason in support.unless.values())]
        for reason in filter(None, reasons):
            assert not re.search(r"model type|\d e-\d|[;.]$", reason), (support.model_type, reason)


@pytest.mark.parametrize(
    ("config", "num_stages", "generates", "rule", "cure"),
    [
        ({}, 2, False, "model type 'odd' has loops, so it cannot be cut", "set layout.pp and chunks to 1"),
        ({}, 1, True, "model type 'odd' has no cache, so it cannot generate", "use a type that decodes"),
        ({"alibi": True}, 1, False, "model type 'odd' with alibi = True has wrong outputs", "set alibi to False"),
    ],
)
def test_what_did_not_pass_is_refused_with_a_cure(config, num_stages, generates, rule, cure):
    found = PARTLY.refusal(config, num_stages, generates)
    assert found is not None
    assert found[0] == rule
    assert cure in found[1]


@pytest.mark.parametrize(
    ("model_type", "rate"), [("opt", "layerdrop"), ("xglm", "layerdrop"), ("trocr", "decoder_layerdrop")]
)
def test_layers_that_are_skipped_at_random_are_not_cut(model_type: str, rate: str):
    support = support_table().of(model_type)
    assert support.refusal({rate: 0.1}, num_stages=2) == (
        f"model type '{model_type}' with {rate} = 0.1 skips layers at random in training, also where two stages join",
        f"set {rate} to 0, or layout.pp and chunks to 1",
    )
    assert support.refusal({rate: 0.1}, num_stages=1) is None
    assert support.refusal({rate: 0.0}, num_stages=2) is None


def test_what_did_pass_is_not_refused():
    assert PARTLY.refusal({"alibi": False}, num_stages=1) is None
    assert PARTLY.advice == ["pp = 1", "no generation", "alibi = False"]


def test_a_type_that_does_not_run_is_refused_in_any_layout():
    found = support_table().of("bert").refusal({}, num_stages=1)
    assert found is not None
    assert found[0] == "model type 'bert' is an encoder"


@pytest.mark.parametrize(
    ("model_type", "says"), [("qwen33", "you may mean qwen3"), ("t5", "no causal"), (None, "None")]
)
def test_an_unknown_type_is_refused(model_type, says):
    with pytest.raises(ModelError, match=says):
        support_table().of(model_type)
