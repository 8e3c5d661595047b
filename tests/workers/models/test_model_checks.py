"""The checker of the support table: it passes what is right, fails what is broken, and agrees with the table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import model_checks
import pytest
import tiny_models
import torch
import transformers
from model_checks import (
    Differs,
    MakeStages,
    Reference,
    check_decode,
    check_gradients,
    check_packed,
    check_save,
    check_split,
    load_all,
    make_reference,
    measure,
    wrong_switches,
)
from torch import Tensor
from trainmaster.api.model_support import Column, Way, support_table
from trainmaster.workers.models.attention import PackedPass
from trainmaster.workers.models.stage import Stage
from transformers import CONFIG_MAPPING

CHECKS = {
    "split": check_split,
    "packed": partial(check_packed, num_stages=2),
    "gradients": partial(check_gradients, num_stages=2),
    "decode": partial(check_decode, num_stages=2),
    "save": partial(check_save, num_stages=2),
}
FAST = ("llama", "qwen3", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss", "lfm2", "minimax_m3_vl_text")


@pytest.fixture
def qwen2(whole_of: Callable[[str], Reference]) -> Reference:
    return whole_of("qwen2")


@cache
def whole_stages(directory: Path, num_stages: int) -> list[Stage]:
    return load_all(directory, num_stages, Way())


def broken(reference: Reference, breaks: Callable[[list[Stage]], None]) -> MakeStages:
    def make(num_stages: int) -> list[Stage]:
        stages = copy.deepcopy(whole_stages(reference.directory, num_stages))
        breaks(stages)
        return stages

    return make


def failing(reference: Reference, breaks: Callable[[list[Stage]], None]) -> dict[str, str]:
    """Checks that find it, with what they say."""
    found = {}
    for name, check in CHECKS.items():
        try:
            check(broken(reference, breaks), reference)
        except Differs as error:
            found[name] = error.reason
    return found


def test_what_is_right_passes(qwen2: Reference):
    assert failing(qwen2, lambda stages: None) == {}


@pytest.mark.parametrize("amount", [1.0, 3e-6])
def test_a_leak_between_documents_is_found_however_small(qwen2: Reference, amount: float):
    def leak(stages: list[Stage]) -> None:
        norm = stages[-1].model.get_submodule("model.norm")
        norm.register_forward_hook(lambda _module, _args, out: out + amount * out.mean(1, keepdim=True))

    found = failing(qwen2, leak)
    assert found["packed"] in ("lets a document move another's outputs", "has wrong outputs of packed documents")
    if amount < model_checks.TOLERANCE:
        assert found["packed"] == "lets a document move another's outputs"
        assert "split" not in found


def test_a_token_that_sees_later_ones_is_found(qwen2: Reference):
    def leak(stages: list[Stage]) -> None:
        norm = stages[-1].model.get_submodule("model.norm")
        norm.register_forward_hook(lambda _module, _args, out: out + 3e-6 * out.roll(-1, 1))

    assert failing(qwen2, leak)["packed"] in (
        "gives outputs that depend on later tokens",
        "lets a document move another's outputs",
    )


def test_a_neighbour_that_reads_the_token_before_it_is_found(qwen2: Reference):
    def leak(stages: list[Stage]) -> None:
        stages[0].cut.layers[1].mlp.register_forward_pre_hook(lambda _module, args: (args[0] + args[0].roll(1, 1),))

    assert {"split", "packed", "gradients", "decode"} <= failing(qwen2, leak).keys()


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.k_proj.bias", "model.layers.0.input_layernorm.weight"])
def test_a_wrong_gradient_of_one_parameter_is_found_and_named(qwen2: Reference, name: str):
    def scale(stages: list[Stage]) -> None:
        for stage in stages:
            for own, parameter in stage.model.named_parameters():
                if own == name:
                    parameter.register_hook(lambda gradient: gradient * 1.01)

    assert failing(qwen2, scale) == {"gradients": f"has a wrong gradient of {name}"}


def test_a_gradient_that_only_the_second_microbatch_spoils_is_found(qwen2: Reference):
    def reduce_at_once(stages: list[Stage]) -> None:
        """As if what is summed over workers were summed again at every microbatch."""
        weight = stages[-1].get_parameter("model.model.norm.weight")
        weight.register_hook(lambda gradient: gradient / 2)
        weight.register_post_accumulate_grad_hook(sum_copies)

    def sum_copies(parameter: torch.nn.Parameter) -> None:
        parameter.grad *= 2

    assert failing(qwen2, reduce_at_once) == {"gradients": "has a wrong gradient of model.norm.weight"}


def test_a_frozen_parameter_is_found(qwen2: Reference):
    def freeze(stages: list[Stage]) -> None:
        stages[-1].get_parameter("model.model.layers.3.mlp.up_proj.weight").requires_grad_(False)

    assert failing(qwen2, freeze) == {"gradients": "has a wrong gradient of model.layers.3.mlp.up_proj.weight"}


def shifted(run: Callable[..., Tensor], ids: Tensor, current: PackedPass, hidden: Tensor | None = None) -> Tensor:
    """A token of decode is rotated as the next one would be."""
    if current.num_decoding:
        _ = current.slots  # the cache is right, the rotation is not
        current.batch.__dict__["position_ids"] = current.batch.position_ids + 1
    return run(ids, current, hidden)


def spoil_decode(stages: list[Stage]) -> None:
    for stage in stages:
        stage.run = partial(shifted, stage.run)


def spoil_tie(stages: list[Stage]) -> None:
    for stage in stages:
        stage.cut = replace(stage.cut, has_tied_embedding=False)


def test_a_tie_that_is_not_told_is_found(qwen2: Reference):
    assert failing(qwen2, spoil_tie)["gradients"].startswith("has model.embed_tokens.weight on several stages")


def test_a_wrong_position_of_decode_is_found(qwen2: Reference):
    assert failing(qwen2, spoil_decode) == {"decode": "has wrong outputs of cached decode"}


def test_a_cache_that_forgets_is_found(qwen2: Reference, monkeypatch: pytest.MonkeyPatch):
    keep = model_checks.KVCache.keep

    def forget(cache: model_checks.KVCache, order: list[int]) -> None:
        keep(cache, order)
        for tensor in cache._keys.values():
            tensor[:, :, 2] = 0

    monkeypatch.setattr(model_checks.KVCache, "keep", forget)
    assert failing(qwen2, lambda stages: None) == {"decode": "has wrong outputs of cached decode"}


def test_a_cut_that_loses_something_is_found(qwen2: Reference):
    def lose(stages: list[Stage]) -> None:
        for stage in stages[1:]:
            stage.cut.inlet.register_forward_hook(lambda _module, _args, out: out * 1.0001)

    assert {"split", "packed", "decode"} <= failing(qwen2, lose).keys()


def test_weights_that_are_saved_or_named_otherwise_are_found(qwen2: Reference):
    def nudge(stages: list[Stage]) -> None:
        weight = stages[-1].get_parameter("model.model.norm.weight")
        with torch.no_grad():
            weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))

    def add(stages: list[Stage]) -> None:
        stages[-1].model.extra = torch.nn.Linear(1, 1, bias=False)

    assert failing(qwen2, nudge) == {"save": "saves model.norm.weight with other bits"}
    whole = ", and the whole model has not"
    assert failing(qwen2, add) == {
        "gradients": f"has extra.weight among its parameters{whole}",
        "save": f"has extra.weight among its saved tensors{whole}",
    }


def test_outputs_that_are_not_numbers_fail(qwen2: Reference):
    def spoil(stages: list[Stage]) -> None:
        with torch.no_grad():
            stages[-1].get_parameter("model.model.norm.weight")[0] = float("nan")

    assert {"split", "packed", "gradients", "decode"} <= failing(qwen2, spoil).keys()


def test_a_configuration_that_lacks_a_kind_of_layer_is_no_measurement(monkeypatch: pytest.MonkeyPatch):
    config = tiny_models.tiny_config("lfm2") | {"layer_types": ["full_attention"] * 4}
    monkeypatch.setattr(model_checks, "tiny_configs", lambda _type: [config])
    with pytest.raises(LookupError, match="lfm2: no tiny configuration has a Lfm2ShortConv"):
        measure("lfm2")


def test_a_variant_counts_as_much_as_the_first_configuration(monkeypatch: pytest.MonkeyPatch):
    """A type passes only where all of its configurations do."""
    configs = [tiny_models.tiny_config("llama"), tiny_models.tiny_config("llama") | {"attention_dropout": 0.5}]
    monkeypatch.setattr(model_checks, "tiny_configs", lambda _type: configs)
    checked = []

    def check(_make: MakeStages, reference: Reference) -> None:
        checked.append(reference.model.config.attention_dropout)
        if checked[-1] > 0:
            raise Differs("is wrong")

    monkeypatch.setattr(model_checks, "check_split", check)
    monkeypatch.setattr(model_checks, "CHECKS", {})
    assert measure("llama", with_switches=False).fails[Column.SPLIT] == "is wrong"
    assert checked[:2] == [0.0, 0.5]


def spoil_gradient(stages: list[Stage]) -> None:
    stages[0].get_parameter("model.model.layers.0.mlp.up_proj.weight").register_hook(lambda gradient: gradient * 1.01)


def spoil_save(stages: list[Stage]) -> None:
    """What is no parameter has no gradient."""
    stages[-1].model.register_buffer("extra", torch.zeros(1))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_gradient, "has a wrong gradient of model.layers.0.mlp.up_proj.weight"),
        (spoil_decode, "has wrong outputs of cached decode"),
        (spoil_save, "has extra among its saved tensors, and the whole model has not"),
        (spoil_tie, "has model.embed_tokens.weight on several stages, which do not know of each other"),
    ],
)
def test_what_only_one_value_of_a_switch_breaks_is_found(
    spoil: Callable[[list[Stage]], None], says: str, monkeypatch: pytest.MonkeyPatch
):
    """Whatever it is that breaks, and the other values of switches pass."""

    def load(directory: Path, num_stages: int, way: Way | None) -> list[Stage]:
        stages = load_all(directory, num_stages, way)
        if stages[0].config.tie_word_embeddings:
            spoil(stages)
        return stages

    monkeypatch.setattr(model_checks, "load_all", load)
    found = dict(wrong_switches(support_table().types["llama"], tiny_models.tiny_config("llama")))
    assert found == {"tie_word_embeddings": (True, says)}


@pytest.mark.parametrize("model_type", FAST)
def test_the_table_says_what_is_measured(model_type: str):
    assert measure(model_type, with_switches=False) == replace(support_table().types[model_type], unless={})


@pytest.mark.models
@pytest.mark.parametrize("model_type", tiny_models.model_types())
def test_the_whole_table_says_what_is_measured(model_type: str):
    assert measure(model_type) == support_table().types[model_type]


def test_the_table_is_of_all_types_that_transformers_has():
    table = support_table()
    assert table.transformers == transformers.__version__
    assert set(table.types) == set(tiny_models.model_types()) | set(tiny_models.others())
    for name, reason in tiny_models.others().items():
        assert table.types[name].reason == reason


def test_switches_that_are_refused_are_not_at_what_is_usual():
    """A configuration that does not name a switch has it at the usual value, and is not refused for it."""
    for name, support in support_table().types.items():
        for switch, (value, _) in support.unless.items():
            assert CONFIG_MAPPING[name].__dataclass_fields__[switch].default is not value, (name, switch)


def test_switches_are_whatever_a_configuration_turns_on_or_off():
    assert dict(tiny_models.flipped(tiny_models.tiny_config("gemma2"))) == {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_bidirectional_attention": True,  # which is None otherwise
    }


def test_a_reference_is_the_same_each_time(tmp_path: Path):
    config = tiny_models.tiny_config("gpt2")
    first, second = (make_reference(config, tmp_path / name) for name in ("one", "two"))
    assert torch.equal(first.microbatches[1].logits, second.microbatches[1].logits)
    assert all(torch.equal(gradient, second.gradients[name]) for name, gradient in first.gradients.items())
