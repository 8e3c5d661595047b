"""The one place that touches transformers surfaces that are private or may move between minor versions.

Owns: quiet calls, the model class behind a config, the attention and mask registries, the pipeline plan, building a
pruned model, one module's initialisation, weight conversions and undoing them. The pinned version is in
`pyproject.toml`; when it changes, this file and the per-type tests in `tests/workers/models` are what to look at.

Does not: decide how a model is cut (`cut`), computed (`attention`), loaded (`loading`) or written (`checkpoint`).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    build_glob_alternation,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as hf_logging

from ...api.errors import ModelError

Prune = Callable[[PreTrainedModel], None]

_COMPUTED = (".inv_freq", ".position_ids")
"""Ends of names of buffers that older versions saved, and that are computed now."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars inside, and leave its settings as they were."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def causal_lm_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The `...ForCausalLM` class of a config. Raises ModelError if its type has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model type {config.model_type!r} has no causal language model in transformers; use one that has"
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # a class, or several of which the first is the usual one
    return found[0] if isinstance(found, tuple | list) else found


def own_model(config: PretrainedConfig, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A whole model as transformers itself runs it, in its own attention, with copies of these weights."""
    config._attn_implementation = "eager"
    with quiet():
        model = causal_lm_class(config)(config)
        model.load_state_dict(weights)
    return model.eval()


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make `name` an attention implementation: a pair of attention and mask function. Idempotent."""
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)


def is_plain_causal(visible: Callable[..., Any]) -> bool:
    """Whether a mask predicate is transformers' causal one, without window, chunk or overlay."""
    return visible is causal_mask_function


def num_active_experts(config: PretrainedConfig) -> int | None:
    """How many experts a token is sent to, if the configuration says so."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    found = [getattr(config, name, None) for name in names]
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def scalar_name(config: PretrainedConfig) -> str:
    """The name of the class that holds a decoder of this type and a score: `Qwen3ForSequenceClassification`."""
    known: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)  # a name, or several
    if known is None:
        return re.sub(r"(For\w+|LMHeadModel)$", "ForSequenceClassification", causal_lm_class(config).__name__)
    return known if isinstance(known, str) else known[0]


def pipeline_plan(decoder: PreTrainedModel) -> Sequence[str]:
    """Names of a decoder's children in the order of computation, as its author planned; empty without a plan."""
    return list(decoder.config.base_model_pp_plan or {})


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal language model that turns tokens into hidden states: the model without its head."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # modernbert-decoder calls its head "decoder"
        decoder = model.base_model
    if decoder is model:  # a base_model_prefix that names no child (llama4)
        decoder = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    if decoder is None:
        raise ModelError(f"{type(model).__name__} has no decoder apart from its head, so it cannot be cut into stages")
    return decoder


def pruned_class(base: type[PreTrainedModel], prune: Prune, name: str) -> type[PreTrainedModel]:
    """A class like `base`, of this name, whose instances are pruned as soon as they are built: before any loading."""

    # transformers gives no types for what it passes on
    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        try:
            base.__init__(self, config, *args, **kwargs)
        except (AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            reason = f"cannot be built from its configuration: {type(error).__name__}: {error}"
            if error.args == (config._attn_implementation,):  # the model looked it up among its own
                reason = "takes no attention but its own, which cannot keep packed sequences apart; use another type"
            raise ModelError(f"model type {config.model_type!r} {reason}") from error
        prune(self)

    return type(name, (base,), {"__init__": __init__, "__module__": base.__module__})


def read_pruned(
    directory: Path, config: PretrainedConfig, prune: Prune, attention: str | None, name: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """Load a pruned model on the CPU and tie it; reads only the tensors that are left after pruning.

    `attention`: None for the author's choice; `name`: of its class, as it stands in a config.json.

    Returns the model and what is wrong with the checkpoint: one line for each tensor that is missing, misshapen, or of
    no stage.
    """
    names: set[str] = set()

    def note_and_prune(model: PreTrainedModel) -> None:
        names.update(model.state_dict())
        prune(model)

    loaded: Any = pruned_class(
        causal_lm_class(config), note_and_prune, name
    ).from_pretrained(  # its type depends on its arguments
        directory,
        config=config,
        attn_implementation=attention,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported to us
        local_files_only=True,
        use_safetensors=True,
    )
    model, report = loaded
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    if name != causal_lm_class(config).__name__:
        names.add("score.weight")  # a scalar head's, on another stage
    extra = set(report["unexpected_keys"]) - names
    if extra:  # patterns that rename this stage's tensors may meet those of others, too
        renamings, converters = _conversions(model)
        state, prefix = model.state_dict(), model.base_model_prefix
        extra -= {rename_source_key(each, renamings, converters, prefix, state)[0] for each in names}
    faults += [f"{name} is of no use to the model" for name in sorted(extra) if not name.endswith(_COMPUTED)]
    for name, found, wanted in sorted(report["mismatched_keys"]):
        faults.append(f"{name} has shape {list(found)} where the model has {list(wanted)}")
    return model, faults


def conversion_faults(model: PreTrainedModel, found: Mapping[str, Sequence[int]]) -> list[str]:
    """What is wrong with those tensors of a checkpoint that loading makes others of (experts, which it stacks).

    transformers stacks whatever it finds, so one that is missing would shift all that follow. `model`: on the meta
    device, perhaps pruned; `found`: shapes, by name, of the whole checkpoint. One line for each tensor that is missing,
    misshapen, or one too many. Says nothing of tensors in a format that transformers reads, but would not write.
    """
    state = model.state_dict()
    written = {name: list(tensor.shape) for name, tensor in checkpoint_format(model, state).items()}
    wanted, there = _by_target(model, state, written), _by_target(model, state, found)
    faults = []
    for target, parts in wanted.items():
        others = there.get(target, {})
        if not parts.keys() & others.keys():
            continue
        faults += [f"{parts[key]} is missing" for key in parts if key not in others]
        faults += [f"{others[key]} is of no use to the model" for key in others if key not in parts]
        faults += [
            f"{others[key]} has shape {list(found[others[key]])} where the model has {written[name]}"
            for key, name in parts.items()
            if key in others and list(found[others[key]]) != written[name]
        ]
    return faults


def _by_target(
    model: PreTrainedModel, state: dict[str, torch.Tensor], names: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Names of a checkpoint's tensors that are converted, by the (first) parameter that is made of them.

    Each with a key that does not depend on what older versions called it.
    """
    renamings, converters = _conversions(model)
    prefix = model.base_model_prefix
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if pattern is not None and target in state:
            key = apply_renamings(name, renamings).removeprefix(f"{prefix}.")
            found.setdefault(target, {})[key] = name
    return found


def _conversions(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def build_pruned(
    config: PretrainedConfig, prune: Prune, attention: str | None, name: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A pruned model on the meta device: shapes and dtypes as after loading, no memory, nothing tied.

    `attention` and `name` as for `read_pruned`.
    """
    config._attn_implementation = attention
    config.dtype = dtype
    model_class = pruned_class(causal_lm_class(config), prune, name)
    with ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model = model_class(config)
    kept = float32_names(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in kept:
            tensor.data = tensor.data.to(torch.float32)
    return model


def tensor_types(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Which types parameters and buffers, by name, have in a model that transformers itself loads in `dtype`.

    `model`: of the same configuration, pruned or not, in any type. Names are those of the whole model.
    """
    config = copy.deepcopy(model.config)
    whole = build_pruned(config, lambda _: None, config._attn_implementation, type(model).__name__, dtype)
    return {name: tensor.dtype for name, tensor in (*whole.named_parameters(), *whole.named_buffers())}


def float32_names(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of parameters and buffers that the model's author keeps in float32 in models of this half precision."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    pattern, _, _ = build_glob_alternation(list(plan))
    tensors = model.state_dict(keep_vars=True).items()
    return {name for name, tensor in tensors if tensor.is_floating_point() and re.search(pattern, name) is not None}


def initialise_module(model: PreTrainedModel, module: nn.Module) -> None:
    """Draw one module's own parameters and buffers as its model's author wrote, from torch's default generator."""
    model._init_weights(module)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Which parameter (key) is another one (value), by name: `{"lm_head.weight": "model.embed_tokens.weight"}`."""
    return dict(model.all_tied_weights_keys)


def untie(model: PreTrainedModel) -> None:
    """Forget the ties of a model that has lost the tied modules to other stages."""
    model.all_tied_weights_keys = {}


def tie(model: PreTrainedModel) -> None:
    """Make the parameters that `tied_names` lists one."""
    model.tie_weights(recompute_mapping=False)


def names_not_saved(model: PreTrainedModel) -> set[str]:
    """State that transformers keeps out of checkpoints because it is computed."""
    return set(model._keys_to_ignore_on_save or ())


def checkpoint_format(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names and in the shapes that checkpoints of this type use (experts apart, old prefixes)."""
    return revert_weight_conversion(model, tensors)


def conversion_type(config: PretrainedConfig) -> str | None:
    """The other model type by whose rules checkpoints of this type are converted; None if it has none or its own."""
    return _MODEL_TO_CONVERSION_PATTERN.get(config.model_type)
