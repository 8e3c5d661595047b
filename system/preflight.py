"""Checks an experiment against this machine's disk, before anything starts. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO  # Any: the values of a config are transformers' own

from ..api.algorithms import Generation
from ..api.config import LoRA, Model
from ..api.errors import ConfigError, ModelError
from ..api.experiment_file import LoadedExperiment
from ..api.experiments.base import CompiledExperiment, FedGraph, PlacedModel
from ..api.graph import Graph
from ..api.hub import advice, directory_of
from ..api.json_lines import check_json_lines
from ..api.model_support import support_table
from ..api.rewards import resolve_reward
from .service.adapter import CONFIG, WEIGHTS
from .service.claims import claim, owner_of
from .service.keys import DIRECTORY

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""How transformers' configs name the number of layers."""
_CONTEXTS = ("max_position_embeddings", "n_positions")
"""How they name the longest sequence."""
_KNOWN = frozenset(
    (
        *("r", "lora_alpha", "use_rslora", "bias", "peft_type", "init_lora_weights"),  # compared, below
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # by names of tensors, later
        *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"),
        *("fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of first values
    )
)
"""Fields of peft's adapters (0.21) that leave ours as they are, or are compared. Any other that is set changes what
adapters compute, for all that we know."""
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva")
"""First values of peft's adapters that leave the base as it is; all others that have a name change it."""


def check_files(compiled: CompiledExperiment) -> None:
    """Datasets are readable and whole, models and tokenizers are there, layers and contexts are enough.

    Raises `ConfigError` for the first that is not.
    """
    calls = [call for fed in compiled.graphs.values() for call in fed.graph.model_calls]
    generating = {call.model for call in calls if isinstance(call.settings, Generation)}
    configs = {
        role: _check_model(placed.model, placed.field, role in generating) for role, placed in compiled.models.items()
    }
    for placed in compiled.models.values():
        if placed.optimizer is not None and placed.optimizer.state is not None:
            _check_state(placed, placed.optimizer.state)
    for fed in compiled.graphs.values():
        check_json_lines(fed.dataset, f"{fed.dataset_field}.path", _has_answers(fed.graph))
        _check_room(fed, configs)


def check_functions(loaded: LoadedExperiment) -> None:
    """Every function that a graph calls is in the experiment file, or ships with us. Raises `ConfigError`."""
    calls = [call for fed in loaded.compiled.graphs.values() for call in fed.graph.function_calls]
    for name in dict.fromkeys(call.function.reward.function for call in calls):
        resolve_reward(loaded.file, name)


def _has_answers(graph: Graph) -> bool:
    """Whether the dataset brings what is learnt, and not just prompts."""
    return "loss_mask" in graph.dataset_keys


def check_run_directory(path: Path) -> None:
    """Raises `ConfigError` if the run exists already. One of which there are but the keys does not."""
    if path.exists() and not _has_only_keys(path):
        raise _exists(path)


def claim_run_directory(path: Path) -> TextIO:
    """Makes the run directory; whoever makes it owns the run, and holds the returned file open while it lasts.

    Raises `ConfigError` if it exists.
    """
    try:
        path.mkdir(parents=True, exist_ok=_has_only_keys(path))
        return claim(path)
    except (FileExistsError, BlockingIOError):
        raise _exists(path) from None
    except OSError as error:
        raise ConfigError(
            "run.directory", str(path.parent), f"cannot be written: {error.strerror}", "choose another directory"
        ) from None


def _has_only_keys(path: Path) -> bool:
    return path.is_dir() and {entry.name for entry in path.iterdir()} == {DIRECTORY}


def _check_room(fed: FedGraph, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether a prompt of one token and the longest response fit in."""
    owner, _, _ = fed.dataset_field.rpartition("dataset")
    for call in fed.graph.model_calls:
        if not isinstance(call.settings, Generation):
            continue
        contexts = [configs[call.model][name] for name in _CONTEXTS if isinstance(configs[call.model].get(name), int)]
        limit, longest = min([call.microbatching.max_tokens, *contexts]), call.settings.sampling.max_new_tokens
        if longest >= limit:
            raise ConfigError(
                f"{owner}sampling.max_new_tokens",
                longest,
                f"leaves no room for a prompt in {limit} tokens (the smaller of the model's context and "
                "microbatch_tokens)",
                "lower it, raise microbatch_tokens, or take a model with a longer context",
            )


def _exists(path: Path) -> ConfigError:
    owner = owner_of(path)
    if owner is not None:
        return ConfigError(
            "run.name",
            path.name,
            f"this run is going on in {path} ({owner})",
            f"choose another name (--run.name {path.name}-2), or wait for its end",
        )
    return ConfigError(
        "run.name",
        path.name,
        f"the run directory {path} exists already, and no run is ever overwritten",
        f"choose another name (--run.name {path.name}-2), or remove the directory",
    )


def _check_state(placed: PlacedModel, state: Path) -> None:
    """There is a state of an optimizer, and what is trained begins as it was then."""
    if not any(state.glob("optimizer/*.safetensors")):
        raise ConfigError(
            "optimizer.state",
            str(state),
            "there is no state of an optimizer (optimizer/*.safetensors) in it",
            "name a checkpoint of a run with run.save_optimizer, or leave it out",
        )
    lora = placed.model.lora
    field, path = ("path", placed.model.path) if lora is None else ("lora.path", lora.path)
    if path is None or directory_of(path).resolve() != state.resolve():
        raise ConfigError(
            "optimizer.state",
            str(state),
            f"it goes with the weights of its own checkpoint, and {placed.field}.{field} is {path}",
            f"name the same checkpoint as {placed.field}.{field}, or leave optimizer.state out",
        )


def _check_model(model: Model, field: str, generates: bool) -> Mapping[str, Any]:
    """Returns its config."""
    config = model.config
    if model.path is not None:
        directory = directory_of(model.path)
        file = directory / "config.json"
        if not file.is_file():
            cure = advice(model.path)
            if (directory / CONFIG).is_file():
                cure = f"these are adapters: name the model that they are for, and this directory as {field}.lora.path"
            raise ConfigError(f"{field}.path", str(model.path), "there is no config.json in it", cure)
        if not any(directory.glob("*.safetensors")):
            raise ConfigError(
                f"{field}.path",
                str(model.path),
                "there are no weights (*.safetensors) in it",
                "convert the model with `save_pretrained`, or start from random weights with `config`",
            )
        config = _read_json(file, f"{field}.path")
    if model.lora is not None and model.lora.path is not None:
        _check_adapter(model.lora, model.lora.path, f"{field}.lora")
    if not directory_of(model.tokenizer_path).is_dir():
        raise ConfigError(
            f"{field}.tokenizer",
            str(model.tokenizer_path),
            "there is no such directory",
            "name the tokenizer's directory",
        )
    for name in _LAYER_COUNTS:
        num_layers = config.get(name)
        if num_layers is None:
            continue
        if not isinstance(num_layers, int):
            raise ConfigError(f"{field}.config.{name}", num_layers, "must be a whole number", "write it without quotes")
        if model.layout.num_stages > num_layers:
            rule = f"the model has only {num_layers} layers"
            if model.layout.chunks > 1:
                rule += f", and pp * chunks is {model.layout.num_stages}"
            raise ConfigError(f"{field}.layout.pp", model.layout.pp, rule, "lower it")
    _check_type(
        config, model.layout.num_stages, generates, f"{field}.path" if model.path else f"{field}.config.model_type"
    )
    return config


def _check_type(config: Mapping[str, Any], num_stages: int, generates: bool, field: str) -> None:
    """Whether models of its type run as they are to be used."""
    model_type = config.get("model_type")
    try:
        support = support_table().of(model_type)
    except ModelError as error:
        rule, _, cure = str(error).partition("; ")
        raise ConfigError(field, model_type, rule, cure) from None
    if refusal := support.refusal(config, num_stages, generates):
        raise ConfigError(field, model_type, *refusal)


def _check_adapter(lora: LoRA, path: Path, field: str) -> None:
    """The directory is one of peft's, and its adapters compute what this record says."""
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            cure = "name a directory of peft's, such as a checkpoint of a run with lora"
            raise ConfigError(f"{field}.path", str(path), f"there is no {name} in it", cure)
    config = _read_json(path / CONFIG, f"{field}.path")
    start = config.get("init_lora_weights", True)
    others = [name for name in sorted(config.keys() - _KNOWN) if config[name]]
    others += [f"bias {config['bias']!r}"] if config.get("bias", "none") != "none" else []
    others += [f"init_lora_weights {start!r}"] if isinstance(start, str) and start not in _PLAIN_STARTS else []
    others += [f"peft_type {config['peft_type']!r}"] if config.get("peft_type", "LORA") != "LORA" else []
    if others:
        rule = f"its adapters have {', '.join(others)}, and this version has none of that"
        raise ConfigError(
            f"{field}.path", str(path), rule, "name other adapters, or merge these into their model by peft"
        )
    for name, value in (("r", lora.r), ("lora_alpha", lora.lora_alpha), ("use_rslora", lora.use_rslora)):
        there = config.get(name, False if name == "use_rslora" else None)
        if there != value:
            raise ConfigError(f"{field}.{name}", value, f"{path / CONFIG} says {there}", f"set it to {there}")


def _read_json(file: Path, field: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(field, str(file), f"cannot be read: {error.strerror}", "let this user read it") from None
    except ValueError as error:
        raise ConfigError(field, str(file), f"not JSON ({error})", "restore the file") from None
    if not isinstance(found, dict):
        raise ConfigError(field, str(file), "holds no JSON object ({...})", "restore the file")
    return found
