"""Responses that are interrupted and continued, and records of them."""

import pytest
import torch
from generating import GREEDY, RANDOM, ROOM, as_lists, run
from trainmaster.api.sampling import Sampling
from trainmaster.workers.pipeline.generation import Round


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def in_rounds(whole, num_stages, sampling, limits_of_rounds, num_microbatches=2):
    """Responses, each put together from what the rounds gave; the last round goes to the end."""
    stages, pieces = whole.stages(num_stages), {}
    microbatches, num_rounds = whole.microbatches(num_microbatches), 0
    for limits in [*limits_of_rounds, None]:
        prompts = {prompt.id: prompt for prompts in microbatches for prompt in prompts}
        responses = run(stages, microbatches, sampling, whole.stop_ids, seed=5, limits=limits)
        for response in responses:
            before = pieces.get(response.id)
            pieces[response.id] = response if before is None else before.continued(response)
        left = [prompts[each.id].continued(each) for each in responses if each.is_interrupted]
        microbatches, num_rounds = [part for part in (left[::2], left[1::2]) if part], num_rounds + 1
        if not left:
            break
    assert num_rounds > 1
    return [pieces[prompt.id] for prompt in whole.prompts]


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
@pytest.mark.parametrize("max_tokens", [None, 2 * ROOM])
def test_interrupted_and_continued_equals_uninterrupted(whole, num_stages, sampling, max_tokens):
    wanted = run(whole.stages(1), [whole.prompts], sampling, whole.stop_ids, seed=5)
    rounds = [Round(max_new_tokens=count, max_tokens=max_tokens) for count in (1, 3, 2)]
    got = in_rounds(whole, num_stages, sampling, rounds)
    assert as_lists(got) == as_lists(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
@pytest.mark.parametrize("max_tokens", [None, 2 * ROOM])
@pytest.mark.parametrize("num_trips", [1, 4])
def test_a_round_ends_when_it_is_told_to(qwen3, num_stages, num_microbatches, max_tokens, num_trips):
    wanted = run(qwen3.stages(1), [qwen3.prompts], RANDOM, qwen3.stop_ids, seed=5)

    def told_after(count):
        asked = iter(range(1, count + 1))
        return lambda: next(asked, count) == count  # only the last stage asks

    rounds = [Round(max_tokens=max_tokens, is_over=told_after(num_trips + more)) for more in range(2)]
    got = in_rounds(qwen3, num_stages, RANDOM, rounds, num_microbatches)
    assert as_lists(got) == as_lists(wanted)


def test_what_was_interrupted_is_told_from_what_was_cut(qwen3):
    limits = Round(max_new_tokens=3)
    for response in run(qwen3.stages(1), [qwen3.prompts], GREEDY, limits=limits):
        assert (len(response.tokens), response.is_finished, response.is_interrupted) == (3, False, True)
    short = Sampling(max_new_tokens=3, temperature=0.0)
    for response in run(qwen3.stages(1), [qwen3.prompts], short, limits=limits):
        assert (len(response.tokens), response.is_finished, response.is_interrupted) == (3, False, False)


def test_a_response_may_be_interrupted_before_its_first_token(qwen3):
    (first, second) = run(
        qwen3.stages(1), [qwen3.prompts[:1], qwen3.prompts[1:2]], GREEDY, limits=Round(is_over=lambda: True)
    )
    assert (len(first.tokens), first.is_interrupted) == (1, True)
    assert (len(second.tokens), second.is_interrupted) == (0, True)
    prompt = qwen3.prompts[1].continued(second)
    assert (prompt.tokens.tolist(), prompt.num_drawn) == (qwen3.prompts[1].tokens.tolist(), 0)


def test_the_fewest_tokens_are_counted_over_rounds(qwen3):
    stop_ids, sampling = list(range(0, 64, 2)), Sampling(max_new_tokens=9, min_new_tokens=4)
    wanted = run(qwen3.stages(1), [qwen3.prompts], sampling, stop_ids)
    stages, limits = qwen3.stages(1), Round(max_new_tokens=2, max_tokens=3 * ROOM)
    pieces = run(stages, [qwen3.prompts], sampling, stop_ids, limits=limits)
    prompts = [prompt.continued(piece) for prompt, piece in zip(qwen3.prompts, pieces, strict=True)]
    refill = Round(max_tokens=3 * ROOM)  # rows before and after the fourth token share passes
    got = [
        a.continued(b) for a, b in zip(pieces, run(stages, [prompts], sampling, stop_ids, limits=refill), strict=True)
    ]
    assert as_lists(got) == as_lists(wanted)


def test_a_whole_response_is_not_continued(qwen3):
    (response, *_) = run(qwen3.stages(1), [qwen3.prompts], GREEDY)
    with pytest.raises(AssertionError, match="is whole"):
        qwen3.prompts[0].continued(response)
    with pytest.raises(AssertionError, match="does not follow"):
        qwen3.prompts[1].continued(response)
