"""One tiny model twice: as a stage that is given packed rows, and as transformers runs it, one sequence at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.loading import init_stage
from trainmaster.workers.models.stage import Stage
from transformers import AutoConfig, AutoModelForCausalLM

CPU = torch.device("cpu")
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # logits far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES = ((3, 4, 1.3), (5, 1, -0.7), (1, 6, -1.1), (6, 0, 0.4), (4, 7, 0.9), (2, 5, 0.0))
"""Prompt tokens, response tokens, advantage."""


@dataclass
class PromptAndResponse:
    """A prompt and its response. T tokens together."""

    tokens: Tensor
    """`[T]`."""
    prompt: int
    """How many of them are the prompt's."""
    advantage: float
    keys: dict[str, Tensor] = field(default_factory=dict)
    """Each `[T]`, or `[1]`."""

    @property
    def response(self) -> range:
        return range(self.prompt, len(self.tokens))


@dataclass
class Twin:
    """The same weights twice."""

    stage: Stage
    whole: torch.nn.Module
    sequences: list[PromptAndResponse]

    def microbatch(self, chosen: Sequence[int]) -> Microbatch:
        """These sequences, packed by hand."""
        picked = [self.sequences[at] for at in chosen]
        return Microbatch(
            tokens=torch.cat([one.tokens for one in picked])[None],
            packed=PackedBatch(tuple(len(one.tokens) for one in picked), CPU),
            keys={key: torch.cat([one.keys[key] for one in picked]) for key in picked[0].keys},
        )

    def hidden(self, microbatch: Microbatch) -> Tensor:
        return self.stage(microbatch.tokens, microbatch.packed)

    def log_probabilities(self, one: PromptAndResponse, temperature: float) -> Tensor:
        """`[T, V]`: row t is the distribution of token t + 1."""
        logits = self.whole(input_ids=one.tokens[None], use_cache=False).logits[0].double()
        return torch.log(torch.softmax(logits / temperature, dim=-1))

    def assert_gradients_are_equal(self) -> None:
        """Of every parameter, and they say something."""
        wanted = dict(self.whole.named_parameters())
        got = dict(self.stage.model.named_parameters())
        assert set(got) == set(wanted)
        for name, parameter in wanted.items():
            assert got[name].grad is not None, name
            torch.testing.assert_close(
                got[name].grad, parameter.grad, rtol=1e-3, atol=2e-5 * parameter.grad.abs().max().item(), msg=name
            )
            assert parameter.grad.abs().max() > 1e-4, name


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _models() -> tuple[Stage, torch.nn.Module]:
    stage = init_stage(QWEN3, 5, 0, 1, CPU)
    with hf_compat.quiet():
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN3), attn_implementation="eager")
    whole.load_state_dict(stage.model.state_dict())
    return stage, whole


@pytest.fixture
def twin(_models: tuple[Stage, torch.nn.Module]) -> Iterator[Twin]:
    """With the loss mask and the advantage of every sequence."""
    stage, whole = _models
    generator = torch.Generator().manual_seed(11)
    sequences = []
    for prompt, response, advantage in SHAPES:
        tokens = torch.randint(3, QWEN3["vocab_size"], (prompt + response,), generator=generator)
        keys = {"loss_mask": torch.arange(len(tokens)) >= prompt, "advantage": torch.tensor([advantage])}
        sequences.append(PromptAndResponse(tokens, prompt, advantage, keys))
    yield Twin(stage, whole, sequences)
    for model in (stage, whole):
        model.zero_grad(set_to_none=True)


@pytest.fixture
def with_policies(twin: Twin) -> Callable[[float], Twin]:
    """Adds log-probabilities of a sampling policy and of a reference that lie known distances from the model's."""

    def add(temperature: float) -> Twin:
        generator = torch.Generator().manual_seed(12)
        ratios = torch.tensor([-0.9, -0.3, -0.05, 0.0, 0.06, 0.26, 0.8])  # log(p / q): about (0.8, 1.28), both sides
        for one in twin.sequences:
            now = torch.zeros(len(one.tokens))
            with torch.no_grad():
                table = twin.log_probabilities(one, temperature)
            for at in one.response:
                now[at] = table[at - 1, one.tokens[at]]
            mask = one.keys["loss_mask"]
            drawn = ratios[torch.randint(len(ratios), mask.shape, generator=generator)]
            one.keys["log_probabilities"] = torch.where(mask, now - drawn, 0.0)
            noise = torch.randn(mask.shape, generator=generator)
            one.keys["reference_log_probabilities"] = torch.where(mask, now + noise, 0.0)
        return twin

    return add
