"""Tiny random models of several families, and what transformers' own greedy `generate` answers with them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from generating import CONFIGS, compute


@pytest.fixture(scope="session")
def whole_of(tmp_path_factory):
    made = {}

    def make(model_type):
        if model_type not in made:
            made[model_type] = compute(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return make


@pytest.fixture(params=list(CONFIGS))
def whole(request, whole_of):
    return whole_of(request.param)


@pytest.fixture
def qwen3(whole_of):
    return whole_of("qwen3")
