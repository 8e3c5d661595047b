"""What calls, settings, models and hooks ask of each other in a compiled experiment.

A graph is right by itself when it is made, and so is each record; whoever compiles to them, our recipes or a user's
own, learns here whether they fit together. Each rule is a function; the first that is broken is a `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, assert_never

from ..algorithms import Generation, LogProbabilities, PolicyLoss, SupervisedLoss
from ..errors import ConfigError
from ..graph import Call, CallKind, FunctionCall, Graph, ModelFunctionCall
from ..hooks import ModelHook, Offload, Reshard
from ..remap import input_keys, output_keys

if TYPE_CHECKING:
    from .base import PlacedModel

SETTINGS = {
    CallKind.GENERATE: (Generation,),
    CallKind.INFERENCE: (SupervisedLoss, LogProbabilities),
    CallKind.TRAIN_STEP: (SupervisedLoss, PolicyLoss),
}
"""What each kind of call can run."""

Models = Mapping[str, "PlacedModel"]
"""By role."""


def check_models(models: Models) -> None:
    """Raises `ConfigError` for a model that says what of it is trained, and is not trained."""
    for placed in models.values():
        model, lora = placed.model, placed.model.lora
        if placed.optimizer is not None:
            continue
        cure = "leave it out"
        if model.trainable:
            raise ConfigError(f"{placed.field}.trainable", model.trainable, "this model is not trained", cure)
        if lora is not None and lora.path is None:
            rule = "this model is not trained, and adapters that begin here would change nothing"
            raise ConfigError(f"{placed.field}.lora.path", None, rule, f"name a directory of adapters, or {cure}")


def check_graph(graph: Graph, models: Models) -> None:
    """Raises `ConfigError` for the first call that does not fit its settings, its model or its hooks."""
    for call in graph.calls:
        field = f"graph {graph.name}, call {call.name}"
        _check_keys(call, field)
        if isinstance(call, FunctionCall):
            _check_whole_rows(call, graph.sequences_per_row, field)
            continue
        _check_role(call.model, models, f"{field}, model")
        _check_kind(call, field)
        _check_model(call, models[call.model], field)
        for name, hooks in (("pre_hooks", call.pre_hooks), ("post_hooks", call.post_hooks)):
            for hook in hooks:
                _check_hook(hook, models, models[call.model], f"{field}, {name}, {hook.type}")


def _check_keys(call: Call, field: str) -> None:
    runs = call.function if isinstance(call, FunctionCall) else call.settings
    name, keys = type(runs).__name__, input_keys(call)
    for read in runs.reads:
        if read not in keys:
            raise ConfigError(
                f"{field}, inputs",
                list(call.inputs),
                f"{name} reads {read}, and no input has this name (remaps included)",
                "add it, or map one of them to it by input_remap",
            )
    for written in output_keys(call):
        if written not in runs.writes:
            raise ConfigError(
                f"{field}, outputs",
                written,
                f"{name} writes {', '.join(runs.writes) or 'nothing'} (before remaps)",
                "take it out, or map it from one of these by output_remap" if runs.writes else "take it out",
            )


def _check_whole_rows(call: FunctionCall, sequences_per_row: int, field: str) -> None:
    if call.batch_size % sequences_per_row:
        raise ConfigError(
            f"{field}, batch_size",
            call.batch_size,
            f"a function is given whole groups, of {sequences_per_row} sequences each",
            f"use for example {-(-call.batch_size // sequences_per_row) * sequences_per_row}",
        )


def _check_role(role: str, models: Models, field: str) -> None:
    if role not in models:
        raise ConfigError(
            field, role, f"the experiment's models are {', '.join(models)}", "name one of these, or add the model"
        )


def _check_kind(call: ModelFunctionCall, field: str) -> None:
    fitting = SETTINGS[call.kind]
    if not isinstance(call.settings, fitting):
        raise ConfigError(
            f"{field}, settings",
            type(call.settings).__name__,
            f"a call of kind {call.kind} runs {' or '.join(each.__name__ for each in fitting)}",
            "change the call's kind, or its settings",
        )


def _check_model(call: ModelFunctionCall, placed: PlacedModel, field: str) -> None:
    if call.kind is CallKind.TRAIN_STEP and placed.optimizer is None:
        raise ConfigError(
            f"{field}, model",
            call.model,
            "a model without an optimizer cannot be trained",
            "give the model an optimizer, or train another",
        )
    replicas = placed.model.layout.dp
    if call.minibatch_size < replicas:
        raise ConfigError(
            f"{field}, minibatch_size",
            call.minibatch_size,
            f"each of the {replicas} replicas of {call.model} (layout.dp) needs a sequence",
            f"raise it, or lower {placed.field}.layout.dp",
        )


def _check_hook(hook: ModelHook, models: Models, called: PlacedModel, field: str) -> None:
    match hook:
        case Reshard():
            named = {"source": hook.source, "target": hook.target}
        case Offload():
            named = {"model": hook.model}
        case _:
            assert_never(hook)
    for name, role in named.items():
        _check_role(role, models, f"{field}, {name}")
        if not set(models[role].ranks) <= set(called.ranks):
            raise ConfigError(
                f"{field}, {name}",
                role,
                "a hook runs on the workers of its call's model, and this model has others",
                "place it on the same workers, or attach the hook to a call of its own",
            )
    if isinstance(hook, Reshard):
        _check_reshard(hook, models[hook.source], models[hook.target], f"{field}, target")


def _check_reshard(hook: Reshard, source: PlacedModel, target: PlacedModel, field: str) -> None:
    if hook.source == hook.target:
        raise ConfigError(field, hook.target, "a model does not move towards itself", "name another source or target")
    if not source.model.layout.is_cut_like(target.model.layout):
        raise ConfigError(
            field,
            hook.target,
            f"its layout is not that of its source, {hook.source}, and this version reshards between equal ones only",
            f"give {target.field} the layout of {source.field}",
        )
    if source.first_rank != target.first_rank:
        raise ConfigError(
            field,
            hook.target,
            f"it starts at worker {target.first_rank} and its source, {hook.source}, at {source.first_rank}, and this "
            "version reshards on the same workers only",
            "place both on the same workers",
        )
    if source.model.lora != target.model.lora:
        raise ConfigError(
            field,
            hook.target,
            f"it and its source, {hook.source}, differ in their adapters (lora), and a model moves towards one of the "
            "same parameters only",
            "train the source without lora, or take the hook away",
        )
    if target.optimizer is not None:
        raise ConfigError(
            field,
            hook.target,
            "a model that an optimizer trains cannot be a target: its state belongs to other weights",
            "take the optimizer or the hook away",
        )
