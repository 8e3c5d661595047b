"""Model configurations: from keywords that a user wrote, or from a checkpoint's directory.

Owns the checks that transformers leaves out: it takes any keyword in silence and files it as an attribute. Does not
say which models run: `api.model_support` does, and `probe` looks at the one that is there.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from ...api.config import Model
from ...api.errors import ConfigError, ModelError
from ...api.hub import advice, directory_of
from . import hf_compat


def config_from_keywords(keywords: dict[str, Any]) -> PretrainedConfig:  # values are those of a foreign class
    """The configuration that `keywords` describe: `{"model_type": "qwen2", "hidden_size": 64, ...}`.

    The contents of a config.json will do. Raises ConfigError on `model.config.<key>` for an unknown or missing
    model type, an unknown keyword, or a value that transformers refuses.
    """
    keywords = dict(keywords)
    model_type = keywords.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        similar = difflib.get_close_matches(str(model_type), CONFIG_MAPPING, n=3)
        cure = f"you may mean {' or '.join(similar)}" if similar else 'name one, such as "qwen2"'
        raise ConfigError("model.config.model_type", model_type, "must be a model type of transformers", cure)
    config_class = CONFIG_MAPPING[model_type]
    config = _construct(config_class, keywords)
    for key, value in keywords.items():
        if not _knows(config_class, config, key, keywords):
            similar = difflib.get_close_matches(key, _fields(config_class), n=1)
            cure = f"you may mean {similar[0]}; else remove it" if similar else "remove it"
            raise ConfigError(f"model.config.{key}", value, f"is no keyword of {config_class.__name__}", cure)
    return config


def config_from_directory(directory: Path) -> PretrainedConfig:
    """The configuration of a Hugging Face directory. Raises ModelError if there is none."""
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no config.json; {advice(directory)}")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{directory / 'config.json'} is no configuration that transformers takes: {error}") from error
    return config


def _construct(config_class: type[PretrainedConfig], keywords: dict[str, Any]) -> PretrainedConfig:
    try:
        return config_class(**keywords)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        named = re.search(r"field '(\w+)'", str(error))
        field = f"model.config.{named[1]}" if named else "model.config"
        value = keywords.get(named[1]) if named else keywords
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(field, value, f"{config_class.__name__} refuses it: {reason}", "change it") from error


def _fields(config_class: type[PretrainedConfig]) -> set[str]:
    return set(config_class.__dataclass_fields__) | set(config_class.attribute_map)


def _knows(config_class: type[PretrainedConfig], config: PretrainedConfig, key: str, keywords: dict[str, Any]) -> bool:
    """Whether a keyword means anything to the class: a field, a property, translated, or read by its model."""
    if key == "attn_implementation":  # ours to choose
        return False
    if key in _fields(config_class) or hasattr(config_class, key):
        return True
    if key in GenerationConfig().to_dict():  # dropped without a word
        return False
    if key not in vars(config):  # translated (rope_theta)
        return True
    others = {name: value for name, value in keywords.items() if name in _fields(config_class)}
    if key in vars(_construct(config_class, others)):  # read, and then set by the class itself
        return True
    source = inspect.getsource(sys.modules[hf_compat.causal_lm_class(config).__module__])
    read = rf"config(\.|, \"){re.escape(key)}\b"  # qwen3_moe reads a head_dim that its configuration does not declare
    return re.search(read, source) is not None


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Inside, errors on `model`, which is what this package calls any, are on the experiment's `field`: `actor`."""
    try:
        yield
    except ConfigError as error:
        model, _, rest = error.field.partition(".")
        if model != "model":
            raise
        raise ConfigError(f"{field}.{rest}", error.value, error.rule, error.cure) from error


def config_of(model: Model, field: str = "model") -> PretrainedConfig:
    """The configuration of the model that an experiment holds as `field`."""
    if model.path is not None:
        return config_from_directory(directory_of(model.path))
    with naming(field):
        return config_from_keywords(model.config)


def model_limits(model: Model, field: str = "model") -> tuple[int, int]:
    """The most tokens that a sequence of this model may have (no limit: `sys.maxsize`), and the vocabulary's size.

    `field`: the experiment's that holds it.
    """
    config = config_of(model, field)
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    limits = (context, rotary_limit(config), row_limit(config))
    return min(limit for limit in limits if limit is not None), config.vocab_size


def rotary_limit(config: PretrainedConfig) -> int | None:
    """The tokens of a sequence beyond which it would change the rotary embedding of the others in its row, if any.

    Such embeddings (longrope, dynamic) scale with the longest sequence that transformers sees in a call.
    """
    described = getattr(config, "rope_parameters", None) or {}
    kinds = [described, *(kind for kind in described.values() if isinstance(kind, dict))]  # one for all, or by layer
    limits = []
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            limits.append(kind["original_max_position_embeddings"])
        elif kind.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def row_limit(config: PretrainedConfig) -> int | None:
    """The tokens of a row beyond which places in it would count for positions in a sequence, if any.

    Some layers without rotary embeddings (of llama4) temper their scores by a token's place in the call; before
    `floor_scale` by nothing.
    """
    return config.floor_scale - 1 if getattr(config, "attn_temperature_tuning", False) else None
