"""Configs of tiny random models, by transformers' model types: four layers or three, and 64 words."""

from __future__ import annotations

from typing import Any

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 64}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**COMMON, "tie_word_embeddings": True},
    "qwen3": {**COMMON, "head_dim": 8, "tie_word_embeddings": True},
    "llama": {**COMMON, "num_hidden_layers": 3},
    "gpt2": {**GPT2, **NO_DROPOUT, "bos_token_id": 1, "eos_token_id": 2},
    "gemma2": {**COMMON, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "gpt_oss": {**COMMON, "head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**COMMON, **EXPERTS, "head_dim": 8, "num_experts": 4},
    "deepseek_v3": COMMON
    | EXPERTS
    | LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "llama4_text": COMMON
    | {"head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}
    | {"num_experts_per_tok": 1},
    "opt": {key: COMMON[key] for key in COMMON if "key_value" not in key and key != "intermediate_size"} | OPT,
}
