from pathlib import Path

import pytest
from trainmaster.api.config import (
    Dataset,
    Deadlines,
    Layout,
    LoRA,
    Model,
    NaNPolicy,
    Optimizer,
    ParameterGroup,
    Recompute,
    RunOptions,
    Schedule,
)
from trainmaster.api.errors import ConfigError


def test_a_layout_counts_its_workers():
    assert Layout(dp=3, pp=2).num_workers == 6
    assert Layout().num_workers == 1


@pytest.mark.parametrize("axis", ["tp", "sp"])
def test_a_layout_refuses_axes_that_this_version_does_not_run(axis: str):
    with pytest.raises(ConfigError, match=rf"Layout\.{axis} = 2: this version runs 1 only\. Set it to 1 and spread"):
        Layout(**{axis: 2})


@pytest.mark.parametrize("axis", ["dp", "pp", "tp", "sp"])
@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_layout_refuses_sizes_that_are_no_counts(axis: str, size: float):
    with pytest.raises(ConfigError, match=rf"Layout\.{axis} = {size}: input should be .*\. Correct this field\."):
        Layout(**{axis: size})


def test_a_model_needs_a_path_or_a_config():
    with pytest.raises(ConfigError, match=r"Model\.path = None: exactly one of .* must be given\. Give one"):
        Model()


def test_a_model_refuses_both_a_path_and_a_config():
    with pytest.raises(ConfigError, match=r"Model\.path = 'here': exactly one of .* must be given\. Give one"):
        Model(path=Path("here"), config={"model_type": "qwen2"}, tokenizer=Path("there"))


def test_a_config_names_its_model_type():
    with pytest.raises(ConfigError, match=r"Model\.config = \['hidden_size'\]: must name a `model_type`\. Add for ex"):
        Model(config={"hidden_size": 8}, tokenizer=Path("there"))


def test_a_model_from_a_config_needs_a_tokenizer():
    with pytest.raises(ConfigError, match=r"Model\.tokenizer = None: a model from a config brings no tokenizer\. Name"):
        Model(config={"model_type": "qwen2"})


def test_the_tokenizer_is_by_default_the_models():
    assert Model(path=Path("here")).tokenizer_path == Path("here")
    assert Model(path=Path("here"), tokenizer=Path("there")).tokenizer_path == Path("there")


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_betas_are_below_one(name: str):
    with pytest.raises(ConfigError, match=rf"Optimizer\.{name} = 1\.0: must be below 1\. Use a value such as"):
        Optimizer(**{name: 1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0),
        ("warmup_steps", -1),
        ("beta1", -0.1),
        ("beta2", -0.1),
        ("epsilon", 0),
        ("weight_decay", -1),
        ("max_gradient_norm", 0),
    ],
)
def test_the_optimizers_ranges(name: str, value: float):
    with pytest.raises(ConfigError, match=rf"Optimizer\.{name} = {value}: input should be greater"):
        Optimizer(**{name: value})


def test_clipping_can_be_turned_off():
    assert Optimizer(max_gradient_norm=None).max_gradient_norm is None


def test_a_dataset_takes_a_path_as_text():
    assert Dataset(path="train.jsonl").path == Path("train.jsonl")


@pytest.mark.parametrize("name", ["register_s", "setup_s", "call_s", "silence_s"])
def test_deadlines_are_positive(name: str):
    with pytest.raises(ConfigError, match=rf"Deadlines\.{name} = 0: input should be greater than 0"):
        Deadlines(**{name: 0})


def test_a_run_has_steps_or_passes():
    with pytest.raises(ConfigError, match=r"RunOptions\.passes = 2\.0: `steps` is given too \(3\)\. Give one"):
        RunOptions(steps=3, passes=2.0)


@pytest.mark.parametrize("name", ["", "a/b", "/a", "..", ".", "a/"])
def test_a_runs_name_is_a_folder_name(name: str):
    with pytest.raises(ConfigError, match=r"RunOptions\.name = '.*': must be a plain folder name\. Take the slashes"):
        RunOptions(name=name)


@pytest.mark.parametrize("name", ["steps", "passes", "save_every", "evaluate_every", "workers", "threads"])
def test_the_counts_of_a_run_are_positive(name: str):
    with pytest.raises(ConfigError, match=rf"RunOptions\.{name} = 0: input should be greater than 0"):
        RunOptions(**{name: 0})


def test_a_seed_is_not_negative():
    with pytest.raises(ConfigError, match=r"RunOptions\.seed = -1"):
        RunOptions(seed=-1)


def test_the_run_directory():
    assert RunOptions(name="first", directory="runs").path == Path("runs/first")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pp": 2, "chunks": 2},
            r"Layout\.chunks = 2: schedule 1f1b has one stage a worker\. Set it to 1, or schedule",
        ),
        ({"pp": 2, "chunks": 2, "schedule": "zb-h1"}, r"Layout\.chunks = 2: schedule zb-h1 has one stage a worker"),
        (
            {"chunks": 2, "schedule": "interleaved"},
            r"Layout\.chunks = 2: chunks are of a pipeline, and pp is 1\. Raise",
        ),
        ({"pp": 2, "schedule": "interleaved"}, r"Layout\.chunks = 1: interleaved has 2 stages a worker or more"),
        ({"recompute": True}, r"Layout\.recompute = 'stage': with pp = 1 each backward follows its forward at once"),
        ({"recompute": "all"}, r"Layout\.recompute = 'all': input should be 'none', 'selective', 'full' or 'stage'"),
        ({"pp": 2, "schedule": "chimera"}, r"Layout\.schedule = 'chimera': "),
    ],
)
def test_a_pipeline_that_makes_no_sense_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        Layout(**fields)


def test_a_layout_says_how_it_cuts():
    layout = Layout(dp=2, pp=2, chunks=3, schedule="interleaved", recompute=True)
    assert (layout.num_workers, layout.num_stages, layout.schedule) == (4, 6, Schedule.INTERLEAVED)
    assert Layout(pp=2).is_cut_like(Layout(pp=2, schedule="zb-h1", recompute=True))
    assert not Layout(pp=2).is_cut_like(Layout(pp=2, schedule="interleaved", chunks=2))
    assert Layout(pp=2).schedule is Schedule.ONE_F_ONE_B


def test_what_is_recomputed_has_one_field():
    assert Layout().recompute is Layout(recompute=False).recompute is Recompute.NONE
    assert Layout(pp=2, recompute=True).recompute is Recompute.STAGE
    assert Layout(recompute="full").recompute is Recompute.FULL, "layers need no pipeline"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"decay_floor": 0.1},
            r"Optimizer\.decay_floor = 0\.1: the rate of schedule constant does not fall\. Leave it",
        ),
        ({"decay_steps": 5}, r"Optimizer\.decay_steps = 5: the rate of schedule constant does not fall"),
        (
            {"schedule": "cosine", "decay_floor": 1.5},
            r"Optimizer\.decay_floor = 1\.5: is a part of the rate\. Use 0 to",
        ),
        (
            {"schedule": "linear", "warmup_steps": 5, "decay_steps": 5},
            r"Optimizer\.decay_steps = 5: includes the 5 warmup_steps, so nothing is left to fall in\. Raise it",
        ),
        ({"schedule": "step"}, r"Optimizer\.schedule = 'step': input should be 'constant', 'linear' or 'cosine'"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        Optimizer(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": "(", "weight_decay": 0.0}, r"ParameterGroup\.parameters = '\(': is no regular expression \("),
        ({"parameters": "norm"}, r"ParameterGroup\.parameters = 'norm': the group changes nothing\. Give it a"),
        (
            {"parameters": "norm", "learning_rate": 0.0},
            r"ParameterGroup\.learning_rate = 0\.0: input should be greater",
        ),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        ParameterGroup(**fields)


def test_a_bad_loss_stops_a_run_unless_told_otherwise():
    assert Optimizer().on_nan_loss is NaNPolicy.STOP
    assert Optimizer(on_nan_loss="skip").on_nan_loss is NaNPolicy.SKIP


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"LoRA\.r = 0: input should be greater than 0"),
        ({"rank": 8}, r"LoRA\.rank = 8: LoRA has no such field"),
        ({"lora_dropout": 1.0}, r"LoRA\.lora_dropout = 1\.0: input should be less than 1"),
        ({"target_modules": "("}, r"LoRA\.target_modules = '\(': is no regular expression"),
        ({"target_modules": ()}, r"LoRA\.target_modules = \(\): there is nothing to train"),
        ({"target_modules": ("a", "")}, r"LoRA\.target_modules = .*: no module has an empty name"),
    ],
)
def test_adapters_that_make_no_sense_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        LoRA(**fields)


def test_adapters_are_scaled_as_pefts():
    assert LoRA().scale == 1.0
    assert LoRA(r=16, lora_alpha=32).scale == 2.0
    assert LoRA(r=16, lora_alpha=32, use_rslora=True).scale == 8.0
    assert LoRA(target_modules=["q_proj"]).target_modules == ("q_proj",)


def test_a_model_trains_named_parts_or_adapters():
    with pytest.raises(ConfigError, match=r"Model\.trainable = \('norm',\): with `lora`, adapters alone are trained"):
        Model(path="m", trainable=("norm",), lora=LoRA())
    with pytest.raises(ConfigError, match=r"Model\.trainable\[1\] = '\(': is no regular expression"):
        Model(path="m", trainable=("norm", "("))
