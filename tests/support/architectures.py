"""Tiny configurations of the families that most tests run, one of each kind that is cut or attends in a way of its own.

They are those of `tiny_models`, some with a change that a test needs.
"""

from __future__ import annotations

from typing import Any

from tiny_models import tiny_config

_CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"num_hidden_layers": 3},
    "gpt2": {},
    "gemma2": {},
    "gpt_oss": {},
    "qwen3_moe": {"mlp_only_layers": []},
    "deepseek_v3": {},
    "llama4_text": {},
    "opt": {},
}
CONFIGS: dict[str, dict[str, Any]] = {name: tiny_config(name) | change for name, change in _CHANGES.items()}
MODEL_TYPES = tuple(name for name in CONFIGS if name != "qwen3")  # which differs from qwen3_moe in nothing that is cut
