"""Choosing tokens, against a slow reference that walks through the probabilities."""

import itertools

import pytest
import torch
from trainmaster.api.sampling import Sampling
from trainmaster.workers.pipeline.sampling import sample, uniforms

VOCABULARY = 23


@pytest.fixture
def logits():
    return torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def numbers():
    return torch.rand(64, generator=torch.Generator().manual_seed(1))


def reference(row, number, sampling, forbidden=()):
    """In float64, token by token."""
    scores = (row.double() / (sampling.temperature or 1.0)).tolist()
    probabilities = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    allowed = [token for token in range(len(scores)) if token not in forbidden]
    allowed.sort(key=lambda token: -scores[token])
    if sampling.temperature == 0:
        return allowed[0], probabilities[allowed[0]]
    if sampling.top_k is not None:
        allowed = allowed[: sampling.top_k]
    total, kept, mass = sum(probabilities[token] for token in allowed), [], 0.0
    for token in allowed:
        kept.append(token)
        mass += probabilities[token]
        if mass >= sampling.top_p * total:
            break
    walked = 0.0
    for token in sorted(kept):
        walked += probabilities[token]
        if walked > number * mass:
            break
    return token, probabilities[token]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 4, VOCABULARY, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05])
@pytest.mark.parametrize("forbidden", [(), (0, 5, 6, 7)])
def test_equals_the_reference(logits, numbers, temperature, top_k, top_p, forbidden):
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, logprobs = sample(logits, numbers, sampling, torch.tensor(forbidden) if forbidden else None)
    wanted = [reference(row, number, sampling, forbidden) for row, number in zip(logits, numbers.tolist(), strict=True)]
    assert tokens.tolist() == [token for token, _ in wanted]
    wanted_logprobs = torch.tensor([probability for _, probability in wanted]).log()
    torch.testing.assert_close(logprobs, wanted_logprobs, atol=1e-5, rtol=1e-5)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)


def test_top_k_of_one_is_greedy(logits, numbers):
    greedy, _ = sample(logits, None, Sampling(max_new_tokens=1, temperature=0.0))
    assert torch.equal(greedy, logits.argmax(-1))
    assert torch.equal(sample(logits, numbers, Sampling(max_new_tokens=1, top_k=1))[0], greedy)
    assert torch.equal(sample(logits, numbers, Sampling(max_new_tokens=1, top_p=1e-6))[0], greedy)


def test_equal_weights_stay_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for limits in ({"top_k": 2}, {"top_p": 0.6}):
        drawn = {
            sample(logits, torch.tensor([number / 64]), Sampling(max_new_tokens=1, **limits))[0].item()
            for number in range(64)
        }
        assert drawn == {0, 1, 2}


def test_a_rows_choice_is_its_own(logits, numbers):
    sampling = Sampling(max_new_tokens=1, temperature=0.8, top_k=9, top_p=0.9)
    tokens, logprobs = sample(logits, numbers, sampling)
    for row in range(len(logits)):
        token, logprob = sample(logits[row : row + 1], numbers[row : row + 1], sampling)
        assert token.item() == tokens[row]
        torch.testing.assert_close(logprob[0], logprobs[row])


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-24])
def test_the_ends_of_the_interval_choose_tokens_of_some_weight(number):
    logits = torch.full((1, 9), float("-inf"))
    logits[0, 2:6] = torch.tensor([0.3, 0.1, 0.7, 0.2])
    token, logprob = sample(logits, torch.tensor([number]), Sampling(max_new_tokens=1))
    assert token.item() == (2 if number == 0.0 else 5)
    assert logprob.isfinite().all()


def test_a_forbidden_token_of_almost_all_weight_is_avoided(numbers):
    logits = torch.zeros(64, 5)
    logits[:, 1] = 200.0
    tokens, logprobs = sample(logits, numbers, Sampling(max_new_tokens=1), torch.tensor([1]))
    assert set(tokens.tolist()) == {0, 2, 3, 4}
    torch.testing.assert_close(logprobs, torch.full((64,), -200.0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_forbidden_to_the_rows_that_are_held(logits, numbers, temperature):
    sampling, forbidden = Sampling(max_new_tokens=1, temperature=temperature), torch.arange(0, VOCABULARY, 2)
    held = torch.arange(64) % 3 == 0
    tokens, logprobs = sample(logits, numbers, sampling, forbidden, held)
    for rows, limits in ((held, (forbidden,)), (~held, ())):
        wanted, wanted_logprobs = sample(logits[rows], numbers[rows], sampling, *limits)
        assert torch.equal(tokens[rows], wanted)
        assert torch.equal(logprobs[rows], wanted_logprobs)


def test_half_precision_logits_give_float32_logprobs(logits, numbers):
    tokens, logprobs = sample(logits.bfloat16(), numbers, Sampling(max_new_tokens=1))
    wanted = logits.bfloat16().float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted)


@pytest.mark.parametrize("limits", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.5}])
def test_logits_that_are_no_numbers_choose_within_the_vocabulary(numbers, limits):
    tokens, logprobs = sample(torch.full((64, 5), float("nan")), numbers, Sampling(max_new_tokens=1, **limits))
    assert tokens.max() < 5
    assert logprobs.isnan().all()


def test_uniforms_are_a_function_of_seed_sequence_and_position():
    ids = ["task/0/1/0", "task/0/2/0", "task/0/2/1"]
    table = uniforms(3, ids, 16)
    assert table.shape == (3, 16)
    assert table.dtype == torch.float32
    for row, sequence in enumerate(ids):
        assert torch.equal(uniforms(3, [sequence], 16)[0], table[row])
        assert torch.equal(uniforms(3, [sequence], 5)[0], table[row, :5])
    for one, other in itertools.combinations(torch.cat([table, uniforms(4, ids, 16)]), 2):
        assert not torch.equal(one, other)


def test_uniforms_are_the_same_on_every_machine():
    assert (uniforms(0, ["a"], 3) * 2**24).tolist() == [[8541320.0, 7180021.0, 1682138.0]]


def test_uniforms_fill_the_interval_evenly():
    table = uniforms(0, [str(place) for place in range(100)], 100).flatten().sort().values
    assert table[0] >= 0
    assert table[-1] < 1
    assert (table - torch.arange(10_000) / 10_000).abs().max() < 0.02  # Kolmogorov-Smirnov at a far tail
