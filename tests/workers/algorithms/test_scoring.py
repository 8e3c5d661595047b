"""Scores in chunks against the closed form in double precision, on whole logits of the model's own head."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from trainmaster.workers.algorithms import scoring
from trainmaster.workers.algorithms.functional import token_log_probabilities
from trainmaster.workers.algorithms.scoring import score
from trainmaster.workers.models.loading import init_stage
from trainmaster.workers.models.stage import Stage
from trainmaster.workers.precision import round_to

CPU = torch.device("cpu")
V, H, N = 40, 16, 11
"""Words, hidden size, tokens."""
CHUNKS = (1, 4, 11, 100)
"""Tokens of a chunk."""
SHAPE = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HEADS = {
    "tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "untied": {"model_type": "qwen3", "tie_word_embeddings": False},
    "softcap": {"model_type": "gemma2", "final_logit_softcapping": 3.0},
    "multiplied": {"model_type": "cohere", "logit_scale": 0.3},
    "divided": {"model_type": "granite", "logits_scaling": 2.5},
    "biased": {"model_type": "phi", "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    """One small stage for each kind of head."""
    made = {}
    for name, fields in HEADS.items():
        shape = {key: value for key, value in SHAPE.items() if key != "head_dim" or fields["model_type"] in KNOW_HEADS}
        made[name] = init_stage(shape | fields, 3, 0, 1, CPU)
    return made


KNOW_HEADS = ("qwen3", "gemma2")
"""Model types whose configs have a `head_dim`."""


@pytest.fixture
def chunk_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def set_chunk(num_tokens: int, num_words: int = V) -> None:
        monkeypatch.setattr(scoring, "LEAST_TOKENS", 1)
        monkeypatch.setattr(scoring, "CHUNK_BYTES", MappingProxyType({"cpu": num_tokens * num_words * 4}))

    return set_chunk


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[1, N, H]`, tokens `[N]`, and what a loss multiplies log-probabilities by, `[N]`."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(1, N, H, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)


def gradients(stage: Stage) -> dict[str, Tensor]:
    found = {name: each.grad.clone() for name, each in stage.model.named_parameters() if each.grad is not None}
    stage.zero_grad(set_to_none=True)
    return found


def closed_form(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [N, V] -> log-probability and entropy, float64."""
    p = torch.softmax(logits.double() / temperature, -1)
    return p[torch.arange(N), tokens].log(), -(p * p.log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", CHUNKS)
def test_values_and_gradients_are_those_of_the_closed_form(stages, chunk_of, head: str, size: int, temperature: float):
    stage = stages[head]
    hidden, tokens, weights = inputs()
    wanted, wanted_entropy = closed_form(stage.logits(hidden)[0], tokens, temperature)
    (wanted * weights).sum().backward()
    wanted_slope, hidden.grad, wanted_gradients = hidden.grad, None, gradients(stage)

    chunk_of(size)
    got, entropy = score(stage.logits, hidden, tokens, V, temperature, with_entropy=True)
    assert entropy is not None
    assert (got.dtype, entropy.requires_grad) == (torch.float32, False)
    (got * weights).sum().backward()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), wanted_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, wanted_slope, rtol=1e-4, atol=1e-5)
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 0.05
    got_gradients = gradients(stage)
    assert set(got_gradients) == set(wanted_gradients)
    for name, wanted_gradient in wanted_gradients.items():
        torch.testing.assert_close(got_gradients[name], wanted_gradient, rtol=1e-4, atol=2e-5, msg=name)


def test_neither_pass_ever_has_the_logits_of_more_than_a_chunk(stages, chunk_of):
    chunk_of(3)
    hidden, tokens, _ = inputs()
    asked, saved = [], []

    def head(given: Tensor) -> Tensor:
        asked.append(given.shape[1])
        return stages["untied"].logits(given)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda it: it):
        log_probabilities, _ = score(head, hidden, tokens, V, 1.0, with_entropy=True)
    assert asked == [3, 3, 3, 2]
    assert max(saved) == hidden.numel() < N * V, "what is kept between the passes are hidden states"
    log_probabilities.sum().backward()
    assert asked == [3, 3, 3, 2] * 2


def test_a_vocabulary_beyond_any_budget_goes_token_by_token(stages, chunk_of):
    chunk_of(1, num_words=1)
    hidden, tokens, _ = inputs()
    got, entropy = score(stages["tied"].logits, hidden, tokens, V, 1.0, with_entropy=False)
    assert entropy is None
    wanted, _ = closed_form(stages["tied"].logits(hidden)[0], tokens, 1.0)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_chunks_have_at_least_as_many_tokens_as_hidden_states_are_wide(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_BYTES", MappingProxyType({"cpu": 1}))
    matrix, asked = torch.randn(V, 4), []

    def head(given: Tensor) -> Tensor:
        asked.append(given.shape[1])
        return given @ matrix.t()

    score(head, torch.randn(1, N, 4), torch.zeros(N, dtype=torch.int64), V, 1.0, with_entropy=False)
    assert asked == [4, 4, 3]


@pytest.mark.parametrize("trains", ["head", "hidden", "nothing"])
def test_what_is_frozen_gets_no_gradient_and_all_else_does(trains: str):
    matrix = nn.Parameter(torch.randn(V, H), requires_grad=trains == "head")
    hidden, tokens, _ = inputs()
    hidden.requires_grad_(trains == "hidden")
    score(lambda given: given @ matrix.t(), hidden, tokens, V, 1.0, with_entropy=False)[0].sum().backward()
    assert (matrix.grad is not None) == (trains == "head")
    assert (hidden.grad is not None) == (trains == "hidden")


def test_a_head_that_drops_out_drops_the_same_both_times(chunk_of):
    """The gradient is the finite difference of what the forward gave."""
    chunk_of(4)
    hidden, tokens, weights = inputs()
    matrix = torch.randn(V, H, generator=torch.Generator().manual_seed(1))
    dropout = nn.Dropout(0.5)

    def loss(given: Tensor) -> Tensor:
        torch.manual_seed(5)
        scored, _ = score(lambda part: dropout(part) @ matrix.t(), given, tokens, V, 1.0, with_entropy=False)
        return (scored * weights).sum()

    value = loss(hidden)
    before = torch.get_rng_state()
    value.backward()
    assert torch.equal(torch.get_rng_state(), before), "the recomputation draws nothing from the generator"
    step = 1e-2 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = (loss(hidden + step) - loss(hidden - step)) / 2
    assert hidden.grad is not None
    assert float((hidden.grad * step).sum()) == pytest.approx(float(difference), rel=1e-2)
    assert abs(float(difference)) > 1e-2


def test_in_half_precision_only_what_is_given_is_rounded():
    """bfloat16 logits of this size would be off by hundreds of times as much."""
    stage = init_stage(SHAPE | HEADS["untied"] | {"initializer_range": 2.0}, 3, 0, 1, CPU)
    round_to(stage, torch.bfloat16, keeps_masters=False)
    hidden, tokens, weights = inputs(torch.bfloat16)
    matrix = stage.model.lm_head.weight.detach().double().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    wanted, wanted_entropy = closed_form(exact[0] @ matrix.t(), tokens, 1.0)
    (wanted * weights).sum().backward()

    got, entropy = score(stage.logits, hidden, tokens, V, 1.0, with_entropy=True)
    (got * weights).sum().backward()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), wanted_entropy, rtol=1e-4, atol=1e-5)
    rounded = (hidden.detach()[0] @ stage.model.lm_head.weight.t()).float().log_softmax(-1)
    assert (rounded[torch.arange(N), tokens] - wanted).abs().max() > 1e-2
    slope, gradient = hidden.grad, stage.model.lm_head.weight.grad
    assert slope is not None
    assert (slope.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    for found, right in ((slope, exact.grad), (gradient, matrix.grad)):
        assert (found.double() - right).norm() < 4e-3 * right.norm(), "2^-8, of one rounding"


def test_positions_are_scored_by_what_precedes_them(stages):
    stage = stages["tied"]
    hidden, _, _ = inputs()
    tokens, positions = torch.arange(N)[None] % V, torch.tensor([3, 1, 9])
    with torch.no_grad():
        got = token_log_probabilities(stage, hidden, tokens, positions, temperature=2.0)
        table = (stage.logits(hidden)[0] / 2).log_softmax(-1)
    assert got.tolist() == pytest.approx([float(table[at - 1, at]) for at in positions.tolist()], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_they_are_those_of_the_cpu(dtype: torch.dtype):
    found = []
    for device in (CPU, torch.device("cuda")):
        stage = init_stage(SHAPE | HEADS["softcap"], 3, 0, 1, CPU)
        round_to(stage, dtype, keeps_masters=False)
        stage = stage.to(device)
        hidden, tokens, weights = inputs(dtype)
        given = hidden.detach().to(device).requires_grad_()
        got, entropy = score(stage.logits, given, tokens.to(device), V, 1.0, with_entropy=True)
        (got * weights.to(device)).sum().backward()
        values = (got.detach(), entropy, given.grad, *gradients(stage).values())
        found.append([each.float().cpu() for each in values])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < (1e-2 if dtype is torch.bfloat16 else 1e-4) * one.norm()
