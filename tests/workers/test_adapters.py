"""Adapters beside transformers' own model with `W + scale B A` in place of W: outputs, gradients, answers, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS
from pipelines import GPT2, OPTIMIZER, QWEN, Case, make_context, make_shard, microbatch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainmaster.api.config import Dataset, Layout, LoRA, Model, Optimizer, Precision, Recompute, Schedule
from trainmaster.api.errors import ConfigError, ModelError
from trainmaster.api.experiments.base import PlacedModel
from trainmaster.api.experiments.sft import SFT
from trainmaster.api.sampling import Sampling
from trainmaster.system.preflight import check_files
from trainmaster.system.service.adapter import CONFIG, WEIGHTS, join
from trainmaster.system.service.manifest import WrittenFile, write_manifest
from trainmaster.workers import adapters, recording
from trainmaster.workers.adapter_files import write_adapter_config, write_adapters
from trainmaster.workers.adapters import Adapters, is_adapter
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.context import ShardGroups
from trainmaster.workers.doctor import compare
from trainmaster.workers.optimizer_state import write_state
from trainmaster.workers.pipeline.generation import Prompt
from trainmaster.workers.recording import Record
from trainmaster.workers.shard import ModelShard
from transformers import AutoConfig, AutoModelForCausalLM

UNTIED = QWEN | {"tie_word_embeddings": False}
PLAIN_GPT2 = GPT2 | {"embd_pdrop": 0.0, "resid_pdrop": 0.0}
CASES = {
    "all-linear": Case(layout=Layout(), config=QWEN, lora=LoRA(r=4, lora_alpha=12)),
    "conv1d": Case(
        layout=Layout(), config=PLAIN_GPT2, lora=LoRA(target_modules=("c_attn", "mlp.c_fc"), use_rslora=True)
    ),
    "head": Case(layout=Layout(), config=UNTIED, lora=LoRA(target_modules=r".*(lm_head|layers\.2\.mlp\.\w+_proj)")),
}
CHUNKED = Layout(pp=2, schedule=Schedule.INTERLEAVED, chunks=2)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def disturbed(case: Case) -> ModelShard:
    """With adapters that change something, as after some training."""
    shard = make_shard(case, 0, None)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in shard.stage.model.named_parameters():
            if is_adapter(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return shard


def plain_model(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config), attn_implementation="eager").eval()
    model.load_state_dict(weights)
    return model


def logits_of(shard: ModelShard) -> Tensor:
    given = microbatch(0)
    shard.stage.eval()
    with torch.no_grad():
        return shard.stage.logits(shard.stage(given.tokens, given.packed))


def adapters_of(*shards: ModelShard) -> dict[str, Tensor]:
    named = [pair for shard in shards for stage in shard.stages for pair in stage.model.named_parameters()]
    return {name: each.detach().clone() for name, each in named if is_adapter(name)}


def save(shards: list[ModelShard], directory: Path) -> Path:
    """What workers and master do together."""
    files = []
    for shard in shards:
        assert shard.optimizer is not None
        files += [write_adapters(stage, shard.optimizer.masters, directory) for stage in shard.stages]
        for stage in shard.stages:
            write_state(stage, shard.optimizer, shard.version, directory)
    write_adapter_config(shards[0].adapters, None, directory)
    parts = [directory / file.file for file in files if file.file]
    if len(parts) > 1:
        join(parts, directory / WEIGHTS)
        for part in parts:
            part.unlink()
    return directory


def lone(case: Case, optimizer: Optimizer = OPTIMIZER) -> list[ModelShard]:
    """Every worker's shard, in this process."""
    shards = []
    for rank in range(case.layout.num_workers):
        context = make_context(case, rank)
        placed = replace(context.compiled.models["model"], optimizer=optimizer)
        shards.append(ModelShard(placed, context, ShardGroups()))
    return shards


def train(shard: ModelShard, case: Case, steps: range) -> list[float]:
    done = [shard.train(SupervisedFineTuning(), case.share(0, step))["loss"] for step in steps]
    return [each.total / each.weight for each in done]


# -- what they compute ------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_transformers_own_model_with_merged_weights(case: Case) -> None:
    shard = disturbed(case)
    found, model = logits_of(shard), plain_model(case, shard.adapters.merged(shard.stage.model))
    given = microbatch(0)
    parts = [model(input_ids=tokens[None]).logits for tokens in given.tokens[0].split(given.packed.seqlens)]
    torch.testing.assert_close(found, torch.cat(parts, 1).detach(), rtol=1e-5, atol=1e-5)
    with shard.adapters.off():
        without = logits_of(shard)
    assert without.equal(logits_of(make_shard(replace(case, lora=None), 0, None))), "the base, to the bit"
    assert not torch.allclose(found, without, atol=0.05)


def test_adapters_that_begin_change_nothing(case: Case) -> None:
    assert logits_of(make_shard(case, 0, None)).equal(logits_of(make_shard(replace(case, lora=None), 0, None)))


def test_gradients_are_those_of_transformers_own_model(case: Case) -> None:
    """Of A and B in `W + scale B A`, by autograd through the whole model."""
    shard = disturbed(case)
    shard.placed = replace(shard.placed, optimizer=replace(OPTIMIZER, max_gradient_norm=None))
    values, scale = adapters_of(shard), case.lora.scale
    base = {name: each for name, each in shard.stage.model.state_dict().items() if not is_adapter(name)}
    model, merged = plain_model(case, base), {}
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    for name in sorted(shard.adapters.targets):
        change = scale * leaves[f"{name}.lora_B.weight"] @ leaves[f"{name}.lora_A.weight"]
        merged[f"{name}.weight"] = base[f"{name}.weight"] + (change.t() if case.config is PLAIN_GPT2 else change)
    total, count = torch.zeros(()), 0
    for each in case.share(0, 0):
        masks = each.keys["loss_mask"].split(each.packed.seqlens)
        for tokens, mask in zip(each.tokens[0].split(each.packed.seqlens), masks, strict=True):
            logits = torch.func.functional_call(model, merged, kwargs={"input_ids": tokens[None]}).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            total, count = total + losses[mask[1:]].sum(), count + int(mask[1:].sum())
    (total / count).backward()
    loss = shard.train(SupervisedFineTuning(), case.share(0, 0))["loss"]
    assert loss.total / loss.weight == pytest.approx(float(total.detach() / count), rel=1e-5)
    gradients = {name: each.grad for name, each in shard.stage.model.named_parameters() if each.grad is not None}
    assert set(gradients) == set(leaves), "and nothing else has one"
    for name, leaf in leaves.items():
        assert leaf.grad.norm() > 1e-4
        torch.testing.assert_close(gradients[name], leaf.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_every_adapter_takes_part_in_every_type_of_model(model_type: str) -> None:
    """None is passed by: no model reads the weight of a target without calling it."""
    config = {"model_type": model_type, **CONFIGS[model_type]}
    case = Case(layout=Layout(), config=config, lora=LoRA(r=2), num_microbatches=4)
    shard = make_shard(case, 0, None)
    shard.train(SupervisedFineTuning(), case.share(0, 0))
    named = dict(shard.stage.model.named_parameters())
    assert len(shard.adapters.targets) >= 6
    for name in sorted(shard.adapters.targets):
        gradient = named[f"{name}.lora_B.weight"].grad
        assert gradient is not None, f"{name} is passed by"
        assert gradient.any(), name
    without = [name for name, each in named.items() if not is_adapter(name) and each.grad is not None]
    assert not without


def test_answers_are_those_of_the_merged_model(case: Case) -> None:
    """Through the KV cache, several prompts at once; greedy."""
    shard = disturbed(case)
    merged = make_shard(replace(case, lora=None), 0, None)
    merged.stage.model.load_state_dict(shard.adapters.merged(shard.stage.model))
    prompts = [[Prompt(f"d/0/{at}/0", torch.arange(3, 5 + at)) for at in range(3)]]
    sampling = Sampling(max_new_tokens=12, min_new_tokens=12, temperature=0)
    answers, wanted = (each.generate(prompts, sampling, (1,)) for each in (shard, merged))
    assert [each.tokens.tolist() for each in answers] == [each.tokens.tolist() for each in wanted]
    for one, other in zip(answers, wanted, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


def test_dropout_is_drawn_in_training_alone_and_again_by_a_recomputation() -> None:
    case = replace(CASES["all-linear"], lora=LoRA(lora_dropout=0.5))
    losses = {}
    for recompute in (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL):
        shard = disturbed(replace(case, layout=Layout(recompute=recompute)))
        losses[recompute] = train(shard, case, range(3))
    assert losses[Recompute.NONE] == losses[Recompute.SELECTIVE] == losses[Recompute.FULL]
    prompts, sampling = [[Prompt("d/0/0/0", torch.arange(3, 8))]], Sampling(max_new_tokens=6, temperature=0)
    plain = replace(case, lora=LoRA())
    answers = [disturbed(each).generate(prompts, sampling, (1,))[0].logprobs for each in (case, plain)]
    assert answers[0].equal(answers[1])
    assert train(disturbed(plain), plain, range(3)) != losses[Recompute.NONE]
    assert logits_of(disturbed(case)).equal(logits_of(disturbed(plain)))


def test_in_half_precision_adapters_alone_have_masters(case: Case) -> None:
    exact, shard = make_shard(case, 0, None), make_shard(replace(case, dtype=Precision.BFLOAT16), 0, None)
    before = {name: each.detach().clone() for name, each in shard.stage.model.named_parameters()}
    losses, wanted = train(shard, case, range(4)), train(exact, case, range(4))
    assert losses == pytest.approx(wanted, rel=2e-2)
    for name, parameter in shard.stage.model.named_parameters():
        assert parameter.dtype is torch.bfloat16
        assert (parameter in shard.optimizer.masters) == is_adapter(name)
        assert parameter.equal(before[name]) == (not is_adapter(name)), name
        if is_adapter(name):
            master = shard.optimizer.masters[parameter]
            assert master.dtype is parameter.grad.dtype is torch.float32
            assert torch.equal(parameter.detach(), master.detach().bfloat16())


def test_the_doctor_agrees_on_adapters_that_change_something(tmp_path: Path) -> None:
    case = CASES["conv1d"]
    path = save([disturbed(case)], tmp_path)
    case = replace(case, lora=replace(case.lora, path=path))
    shard, record = make_shard(case, 0, None), Record("train", "train", 0)
    shard.train(SupervisedFineTuning(), case.share(0, 0), record=record)
    record.write(recording.path_of(tmp_path, "train", 0))
    made = make_context(case, 0).compiled
    found = compare(made, made.training.graph.model_calls[0], [recording.read(recording.path_of(tmp_path, "train", 0))])
    assert found.agrees
    assert {each.what for each in found.gradients} == set(adapters_of(shard))


# -- how they begin ---------------------------------------------------------------------------------------------------


def test_first_values_are_pefts_and_the_same_in_any_layout() -> None:
    case = CASES["all-linear"]
    whole = adapters_of(make_shard(case, 0, None))
    for layout in (Layout(pp=4), CHUNKED):
        cut = adapters_of(*lone(replace(case, layout=layout)))
        assert set(cut) == set(whole)
        assert all(value.equal(whole[name]) for name, value in cut.items())
    of_a = [value for name, value in whole.items() if "lora_A" in name]
    for value in of_a:  # kaiming_uniform_(a=sqrt(5))
        bound = value.shape[1] ** -0.5
        assert 0.8 * bound < value.abs().max() <= bound
        assert value.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert len({float(value.sum()) for value in of_a}) == len(of_a), "each has its own"
    assert not any(value.any() for name, value in whole.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (QWEN, ("q_proj", "qproj"), r"targets.* = 'qproj': no module of the model has this name\. Correct it"),
        (QWEN, r".*\.qproj", r"target_modules = '\.\*\\\\\.qproj': no module of the model has such a name"),
        (QWEN, ("embed_tokens",), r"'model\.embed_tokens': is a Embedding, and adapters are for linear modules"),
        (QWEN, ("q_proj", "lm_head"), r"'lm_head': is tied to the embedding, which an adapter would part it from"),
        (UNTIED, r"model\.layers\.0", r"'model\.layers\.0': is a Qwen3DecoderLayer, and adapters are for linear"),
        (GPT2, ("c_attn", "lm_head"), r"'both Linear and Conv1D': peft's format has one kind"),
    ],
)
def test_what_finds_no_module_or_none_that_fits_is_refused(config, targets, message: str) -> None:
    case = Case(layout=Layout(pp=4), config=config, lora=LoRA(target_modules=targets))
    message = message.replace("targets.*", "target_modules")
    with pytest.raises(
        ConfigError, match=r"model\.lora\.target_modules = " if "=" not in message else message
    ) as error:
        lone(case)
    assert error.match(message)


def test_modules_that_peft_would_take_for_experts_have_no_adapter() -> None:
    config = {"model_type": "deepseek_v3", **CONFIGS["deepseek_v3"]}
    shard = make_shard(Case(layout=Layout(), config=config, lora=LoRA()), 0, None)
    ends = {name.rpartition(".")[2] for name in shard.adapters.targets}
    assert "o_proj" in ends
    assert not ends & {"gate", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(
        ConfigError, match=r"'model\.layers\.0\.mlp\.up_proj': has a name that peft takes for an expert's"
    ):
        make_shard(Case(layout=Layout(), config=config, lora=LoRA(target_modules=("o_proj", "up_proj"))), 0, None)


def test_a_stage_need_not_have_a_target() -> None:
    case = Case(layout=Layout(pp=4), lora=LoRA(target_modules=("layers.2.self_attn.q_proj",)))
    shards = lone(case)
    assert [len(adapters_of(shard)) for shard in shards] == [0, 0, 2, 0]


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_are_pefts(case: Case, tmp_path: Path) -> None:
    shard = disturbed(case)
    save([shard], tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    wanted = {f"base_model.model.{name}": each for name, each in adapters_of(shard).items()}
    assert set(tensors) == set(wanted)
    assert all(value.equal(wanted[name]) for name, value in tensors.items())
    config, lora = json.loads((tmp_path / CONFIG).read_text()), case.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if targets == "all-linear":  # of peft that might be others
        targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.use_rslora,
        "target_modules": targets,
        "fan_in_fan_out": case.config is PLAIN_GPT2,
        "bias": "none",
        "inference_mode": True,
    }


@pytest.mark.parametrize("layout", [Layout(pp=4), CHUNKED], ids=["stages", "chunks"])
def test_saved_and_loaded_into_another_layout_and_back_a_training_goes_on_bit_for_bit(layout, tmp_path: Path) -> None:
    case = CASES["all-linear"]
    (shard,) = lone(case)
    train(shard, case, range(2))
    directory = save([shard], tmp_path / "first")
    for folder, cut in (("second", layout), ("third", Layout())):
        there = replace(case, layout=cut, lora=replace(case.lora, path=directory))
        shards = lone(there, replace(OPTIMIZER, state=directory))
        assert [each.version for each in shards] == [2] * cut.num_workers
        directory = save(shards, tmp_path / folder)
    assert train(shard, case, range(2, 4)) == train(shards[0], case, range(2, 4))
    wanted = adapters_of(shard)
    assert all(value.equal(wanted[name]) for name, value in adapters_of(shards[0]).items())


def test_adapters_that_are_read_are_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["all-linear"]
    shard = disturbed(case)
    there = replace(case, lora=replace(case.lora, path=save([shard], tmp_path)))
    monkeypatch.setattr(Adapters, "_start", lambda *_: pytest.fail("it is drawn"))
    (again,) = lone(there)
    wanted = adapters_of(shard)
    assert all(value.equal(wanted[name]) for name, value in adapters_of(again).items())


def test_masters_are_saved_not_what_they_were_rounded_to(tmp_path: Path) -> None:
    case = replace(CASES["all-linear"], dtype=Precision.BFLOAT16)
    (shard,) = lone(case)
    train(shard, case, range(2))
    (again,) = lone(replace(case, lora=replace(case.lora, path=save([shard], tmp_path))))
    for one, other in zip(shard.optimizer.masters.values(), again.optimizer.masters.values(), strict=True):
        assert one.equal(other)
        assert not one.equal(one.bfloat16().float())


def test_adapters_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    case = CASES["all-linear"]
    save([disturbed(case)], tmp_path)
    there = replace(case, lora=replace(case.lora, path=tmp_path))
    tensors = load_file(tmp_path / WEIGHTS)
    first, *others = sorted(tensors)
    save_file({name: tensors[name] for name in others} | {"stranger": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=rf"{first} is missing; stranger is of no use to the model\. Give lora"):
        lone(there)
    save_file(tensors | {first: torch.ones(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=rf"{first} has shape \[2, 2\] where the model has \[4, \d+\]"):
        lone(there)
    (tmp_path / WEIGHTS).write_bytes(b"no")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read as peft's adapters"):
        lone(there)


def test_every_stage_hashes_the_adapters_that_it_reads(tmp_path: Path) -> None:
    case = CASES["all-linear"]
    path = save([make_shard(case, 0, None)], tmp_path)
    written = WrittenFile(size_bytes=(path / WEIGHTS).stat().st_size, sha256="0" * 64)
    write_manifest(path, {WEIGHTS: written})
    case = replace(case, layout=Layout(pp=2), lora=replace(case.lora, path=path))
    for rank in range(2):
        with pytest.raises(ModelError, match=rf"{WEIGHTS} is not as it was written"):
            make_shard(case, rank, None)


def test_a_model_that_is_not_trained_may_bring_adapters(tmp_path: Path) -> None:
    case = CASES["all-linear"]
    shard = disturbed(case)
    context = make_context(case, 0)
    model = replace(context.compiled.models["model"].model, lora=replace(case.lora, path=save([shard], tmp_path)))
    other = ModelShard(PlacedModel(model=model, field="model"), context, ShardGroups())
    assert logits_of(other).equal(logits_of(shard))


# -- beside peft itself -----------------------------------------------------------------------------------------------

PEFT = {
    "llama": LoRA(r=4, lora_alpha=12),
    "rslora": LoRA(r=4, lora_alpha=12, target_modules=("q_proj", "mlp.down_proj"), use_rslora=True),
    "gpt2": LoRA(r=2, target_modules=("c_attn", "mlp.c_proj")),
    "deepseek_v3": LoRA(r=2),
}

THEIR_WARNINGS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""peft asks transformers for it."""


def at_peft(name: str) -> Case:
    model_type = "llama" if name == "rslora" else name
    config = {"model_type": model_type, "initializer_range": 0.2, **CONFIGS[model_type]}
    return Case(layout=Layout(), config=config, lora=PEFT[name])


def logits_of_peft(model: nn.Module) -> Tensor:
    given = microbatch(0)
    with torch.no_grad():
        parts = [model(input_ids=tokens[None]).logits for tokens in given.tokens[0].split(given.packed.seqlens)]
    return torch.cat(parts, 1)


def base_of(case: Case) -> nn.Module:
    return plain_model(case, make_shard(replace(case, lora=None), 0, None).stage.model.state_dict())


@THEIR_WARNINGS
@pytest.mark.parametrize("name", list(PEFT))
def test_peft_reads_ours_and_computes_the_same(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = at_peft(name)
    shard = disturbed(case)
    base = base_of(case)
    without = logits_of_peft(base)
    model = peft.PeftModel.from_pretrained(base, save([shard], tmp_path)).eval()
    num_adapters = sum(".lora_" in each for each, _ in model.named_parameters())
    assert num_adapters == len(adapters_of(shard)), "and no more of them"
    found = logits_of_peft(model)
    torch.testing.assert_close(logits_of(shard), found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, without, atol=0.05)


@THEIR_WARNINGS
@pytest.mark.parametrize("name", list(PEFT))
def test_we_read_what_peft_saved_and_compute_the_same(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = at_peft(name)
    targets = case.lora.target_modules
    if targets == "all-linear":  # of peft that might be others
        targets = tuple(make_shard(case, 0, None).adapters.target_modules)
    settings = peft.LoraConfig(
        r=case.lora.r,
        lora_alpha=case.lora.lora_alpha,
        use_rslora=case.lora.use_rslora,
        target_modules=list(targets),
        fan_in_fan_out=name == "gpt2",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base_of(case), settings).eval()
    model.save_pretrained(tmp_path)
    read = replace(case.lora, path=tmp_path, target_modules=targets)
    found = logits_of(make_shard(replace(case, lora=read), 0, None))
    torch.testing.assert_close(found, logits_of_peft(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits_of(make_shard(case, 0, None)), atol=0.05)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    placed = Model(config=case.config, tokenizer=tmp_path, lora=read)
    check_files(SFT(model=placed, dataset=Dataset(path=file)).compile())


def test_what_peft_takes_for_experts_is_what_we_think() -> None:
    pytest.importorskip("peft")
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING as THEIRS

    assert {name: frozenset(ends) for name, ends in THEIRS.items()} == adapters._TAKEN_FOR_EXPERTS
