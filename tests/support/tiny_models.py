"""A tiny configuration for every decoder-only text model of transformers, with every kind of layer that the type has.

Keywords come from the fields of the type's own configuration class (`SIZES`), layer by layer patterns from the kinds
that its source names, and the rest from `BY_TYPE`. `missing_kinds` tells what a type's configurations leave out.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

NUM_LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "local_attention": 16,
    "log_scaling_n_floor": 4,
    "n_embd": 32,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "ffn_dim": 48,
    "d_model": 32,
    "num_layers": NUM_LAYERS,
    "num_heads": 4,
    "n_layers": NUM_LAYERS,
    "n_heads": 4,
    "word_embed_proj_dim": 32,
    "decoder_layers": NUM_LAYERS,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "expert_ffn_hidden_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 2,
    "num_dense_layers": 2,
    "moe_layer_start_index": 2,
    "n_group": 1,
    "topk_group": 1,
    "dense_intermediate_size": 48,
    "mlp_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    # multi-head latent attention, and indexers of sparse attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 8,
    "index_topk_blocks": 2,
    # recurrences
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "ssm_state_size": 8,
    "mamba_expand": 2,
    "lru_width": 32,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "index_block_size"), 8),
    # factors and caps that do nothing, or next to nothing, at their usual values
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"), 2.0),
    **dict.fromkeys(("moe_router_logit_softcapping", "swiglu_limit"), 1.0),
    **dict.fromkeys(("routed_scaling_factor", "moe_routed_scaling_factor", "route_scale", "embedding_multiplier"), 3.0),
    **dict.fromkeys(("attention_multiplier", "residual_multiplier", "logit_scale", "lm_head_multiplier"), 0.5),
    **dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier", "key_multiplier"), 0.5),
    **dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier", "attention_value_scale", "clip_qkv"), 0.5),
    **dict.fromkeys(("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"), 2.0),
    "logits_scaling": 0.25,
    # others
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 8,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "dim_model_base": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(
        (
            "activation_dropout",
            "attention_dropout",
            "attention_probs_dropout_prob",
            "attn_dropout",
            "attn_pdrop",
            "dropout",
            "embd_pdrop",
            "embed_dropout",
            "embedding_dropout",
            "emb_dropout",
            "hidden_dropout",
            "hidden_dropout_prob",
            "layerdrop",
            "decoder_layerdrop",
            "resid_dropout",
            "resid_pdrop",
        ),
        0.0,
    ),
}
ROPE_BY_KIND = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
INKLING = {
    "layer_types": ["hybrid", "hybrid_sliding"] * 2,
    "sliding_window_size": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
}
BY_TYPE: dict[str, dict[str, Any]] = {
    "axk2": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": ROPE_BY_KIND},
    "cpmant": {"dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 16, "position_bias_max_distance": 32},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2,
        "mlp_layer_types": ["hash_moe", "moe"] * 3,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_groups": 2,
        "o_lora_rank": 8,
        "partial_rotary_factor": 0.5,
    },
    "doge": {"keep_window_size": 8, "num_experts": 16},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 4,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.9, 0.0, 0.9, 0.0],
        "altup_num_inputs": 2,
    },
    "gemma4_text": {"num_kv_shared_layers": 0, "head_dim": 16, "global_head_dim": 16},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "head_dim": 16, "global_head_dim": 16},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 3},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm3": {"num_hidden_layers": 6, "layer_types": ["conv", "full_attention", "sliding_attention"] * 2},
    "longcat_flash": {"num_hidden_layers": 2 * NUM_LAYERS, "head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
    "nemotron_h": {},
    "qwen2": {"use_sliding_window": True},
    "qwen2_moe": {"use_sliding_window": True, "mlp_only_layers": [0, 3]},
    "qwen3": {"use_sliding_window": True},
    "qwen3_moe": {"mlp_only_layers": [0, 3]},
    "qwen3_next": {"mlp_only_layers": [0, 3]},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "ple_layer_ids": [1, 3],
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 8],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "attn_layers": ["local", "lsh"] * 2,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "xlm": {"emb_dim": 32},
    "xlnet": {"d_inner": 48},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "router_hidden_size": 16},
}
"""What a type's own fields do not tell, or what `SIZES` gets wrong for it."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cohere2_moe": [{"rms_norm_eps": 1e-5}],
    "doge": [{"is_moe": True}],
    "falcon_h1": [{"mamba_rms_norm": True}],
    "gemma3n_text": [{"num_kv_shared_layers": 2}],
    "gemma4_text": [{"enable_moe_block": True}],
    "granitemoehybrid": [{"position_embedding_type": "rope"}],
    "reformer": [{"axial_pos_embds": False}],
    "stablelm": [{"qk_layernorm": True}],
    "trocr": [{"use_learned_position_embeddings": False}],
    "zamba2": [{"use_mem_rope": True}],
}
"""Changes that bring kinds of layers which exclude those of the configuration they are made to."""
_OTHER_PARTS = re.compile(
    "Vision|Audio|Multi[mM]odal|Projector|CrossAttention|SequenceSummary|Pooler|SQuAD|Flash|Classification|Unfold|Clippable"
)
_ASIDE = {
    "add_cross_attention", "is_decoder", "is_encoder_decoder",  # what `BY_TYPE` sets
    "use_cache",  # which every call says anew
    "use_mamba_kernels", "use_mambapy", "use_associative_scan", "use_mem_eff_path",  # kernels for a device
    "summary_use_proj", "summary_proj_to_labels",  # other tasks
}  # fmt: skip


def model_types() -> tuple[str, ...]:
    """Those that transformers maps to a causal language model, of text and by a decoder alone."""
    return tuple(name for name in sorted(_causal_types()) if _why_not(CONFIG_MAPPING[name]) is None)


def others() -> dict[str, str]:
    """What transformers maps to a causal language model besides, and why it is none of `model_types`."""
    reasons = {}
    for name in sorted(_causal_types()):
        reason = _why_not(CONFIG_MAPPING[name])
        if reason is not None and f"{name}_text" in CONFIG_MAPPING:
            reason += f" ({name}_text is that)"
        if reason is not None:
            reasons[name] = reason
    return reasons


def _causal_types() -> list[str]:
    return [name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in MODEL_FOR_CAUSAL_LM_MAPPING]


def _why_not(config_class: type[PretrainedConfig]) -> str | None:
    fields = config_class.__dataclass_fields__
    if config_class.is_encoder_decoder or fields["is_encoder_decoder"].default:
        return "is an encoder-decoder"
    if any(not re.match("attn|ffn", part) for part in config_class.sub_configs):
        return "has more parts than a language model of text"
    if {"is_decoder", "add_cross_attention"} <= fields.keys():
        return "is an encoder"
    return None


def tiny_config(model_type: str) -> dict[str, Any]:
    """Keywords, `model_type` among them."""
    config_class = CONFIG_MAPPING[model_type]
    fields = set(config_class.__dataclass_fields__)
    keywords = {name: value for name, value in SIZES.items() if name in fields}
    if "qk_rope_head_dim" in fields:  # heads are of two parts
        keywords.pop("head_dim", None)
        keywords["num_key_value_heads"] = 4
    kinds = _attention_kinds(config_class)
    if "layer_types" in fields and kinds:
        keywords["layer_types"] = [kinds[at % len(kinds)] for at in range(NUM_LAYERS)]
    if "mlp_layer_types" in fields:
        keywords["mlp_layer_types"] = ["dense", "dense", "sparse", "sparse"]
    return {"model_type": model_type, **keywords, **BY_TYPE.get(model_type, {})}


def tiny_configs(model_type: str) -> list[dict[str, Any]]:
    """All that together have every kind of layer."""
    first = tiny_config(model_type)
    return [first] + [first | change for change in VARIANTS.get(model_type, [])]


def flipped(config: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Switches of the type's own, and what the configuration does not have them at."""
    config_class = CONFIG_MAPPING[config["model_type"]]
    for name, each in config_class.__dataclass_fields__.items():
        is_switch = isinstance(each.default, bool) or (each.default is None and str(each.type) == "bool | None")
        if is_switch and name not in PretrainedConfig.__dataclass_fields__ and name not in _ASIDE:
            yield name, not config.get(name, each.default)


def flip(config: dict[str, Any], name: str, value: bool) -> dict[str, Any]:
    """The configuration with a switch at another value; where that is the usual one, with the usual layers, too."""
    changed = {**config, name: value}
    if CONFIG_MAPPING[config["model_type"]].__dataclass_fields__[name].default is value:
        changed.pop("layer_types", None)
    return changed


def missing_kinds(models: Sequence[PreTrainedModel]) -> list[str]:
    """Kinds of layers, by their classes, that the type's source can make and none of its models has.

    A class counts if the source names it anywhere but where it is defined. Those of other tasks and of other parts
    (vision, audio) do not.
    """
    home = sys.modules[type(models[0]).__module__]
    source = inspect.getsource(home)
    has = {cls for model in models for module in model.modules() for cls in type(module).__mro__}
    missing = []
    for name, cls in vars(home).items():
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)) or cls.__module__ != home.__name__:
            continue
        is_used = len(re.findall(rf"\b{name}\b(?=[(,\]}}\s])", source.replace(f"class {name}", ""))) > 0
        if is_used and cls not in has and not issubclass(cls, PreTrainedModel) and not _OTHER_PARTS.search(name):
            missing.append(name)
    return sorted(missing)


def causal_class(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """What transformers makes of a configuration of this class."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]  # a class, or several
    return found[0] if isinstance(found, tuple | list) else found


def _attention_kinds(config_class: type[PretrainedConfig]) -> list[str]:
    """Kinds of attention layers, or of what stands in their place, that a type's source names."""
    modules = (causal_class(config_class).__module__, config_class.__module__)
    source = "".join(inspect.getsource(sys.modules[name]) for name in modules)
    return [kind for kind in ALLOWED_ATTN_LAYER_TYPES if f'"{kind}"' in source]
