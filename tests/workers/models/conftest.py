"""Tiny random models of several families, and what transformers itself computes with them, one sequence at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from architectures import CONFIGS
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.checkpoint import write_config, write_stage
from trainmaster.workers.models.stage import Stage
from transformers import AutoConfig, AutoModelForCausalLM

CPU = torch.device("cpu")
MICROBATCHES = ((5, 17, 1, 23), (12, 9))  # lengths of sequences; windows are of 8
MODEL_TYPES = [each for each in CONFIGS if each != "qwen3"]  # which differs from qwen3_moe in nothing that is cut


@dataclass
class Whole:
    """A whole model by transformers: where it lies and what it gives."""

    config: dict[str, Any]
    directory: Path
    model: torch.nn.Module
    ids: list[torch.Tensor]
    """Of each microbatch, [1, T]."""
    logits: list[torch.Tensor]
    """Of each microbatch, [1, T, V]."""
    weights: list[torch.Tensor]
    """The loss of a microbatch is sum(logits * weights)."""
    gradients: dict[str, torch.Tensor]
    """Of the summed loss."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    chosen = {name for names in marks for name in ([names] if isinstance(names, str) else names)}
    for name, values in (("model_type", MODEL_TYPES), ("num_stages", [1, 2, 3])):
        if name in metafunc.fixturenames and name not in chosen:
            metafunc.parametrize(name, values)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def whole_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    made: dict[str, Whole] = {}

    def make(model_type: str) -> Whole:
        if model_type not in made:
            made[model_type] = _compute(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return make


@pytest.fixture
def whole(whole_of: Callable[[str], Whole], model_type: str) -> Whole:
    return whole_of(model_type)


@pytest.fixture
def config(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, **CONFIGS[model_type]}


@pytest.fixture
def qwen2() -> dict[str, Any]:
    return {"model_type": "qwen2", **CONFIGS["qwen2"]}


@pytest.fixture
def write_checkpoint() -> Callable[[list[Stage], Path], None]:
    """What the processes of all stages and the master do together."""

    def write(stages: list[Stage], directory: Path) -> None:
        files = [write_stage(stage, directory) for stage in stages]
        write_config(stages[0], directory)
        if len(files) > 1:
            weight_map = {name: part.file for part in files for name in part.tensors}
            assert len(weight_map) == sum(len(part.tensors) for part in files), "a tensor was written twice"
            index = {"metadata": {"total_size": sum(part.size_bytes for part in files)}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


@pytest.fixture
def run_stages() -> Callable[[list[Stage], torch.Tensor, tuple[int, ...]], torch.Tensor]:
    """Packed logits [1, T, V] of a chain of stages, in one autograd graph."""

    def run(stages: list[Stage], ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        batch, hidden = PackedBatch(lengths, CPU), None
        for stage in stages:
            hidden = stage(ids, batch, hidden)
        return stages[-1].logits(hidden)

    return run


def _compute(model_type: str, directory: Path) -> Whole:
    config = {"model_type": model_type, **CONFIGS[model_type]}
    with torch.random.fork_rng(devices=[]), hf_compat.quiet():
        torch.manual_seed(0)
        attention = "eager" if model_type in ("gpt_oss", "gemma2") else "sdpa"
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():  # away from ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.eval().save_pretrained(directory)
        result = Whole(config, directory, model, [], [], [], {})
        for lengths in MICROBATCHES:
            sequences = [torch.randint(3, 64, (1, length)) for length in lengths]
            logits = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in sequences], 1)
            weights = torch.randn_like(logits)
            (logits * weights).sum().backward()
            result.ids.append(torch.cat(sequences, 1))
            result.logits.append(logits.detach())
            result.weights.append(weights)
    result.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result
