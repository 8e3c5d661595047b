"""Generation against transformers' own, for any number of stages, microbatches and slots."""

import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generating import (
    CONFIGS,
    CPU,
    DEADLINE,
    GREEDY,
    LENGTHS,
    MAX_NEW_TOKENS,
    RANDOM,
    ROOM,
    Channels,
    as_lists,
    cut_at,
    run,
)
from trainmaster.api.errors import RunError
from trainmaster.api.sampling import Sampling
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.cache import KVCache
from trainmaster.workers.models.loading import init_stage, load_stage
from trainmaster.workers.parallel.groups import form_group, host_store, join_store
from trainmaster.workers.pipeline import generation
from trainmaster.workers.pipeline.generation import Prompt, Round, generate


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
def test_greedy_responses_equal_transformers(whole, num_stages, num_microbatches):
    stop_ids = whole.stop_ids
    wanted = [cut_at(tokens, stop_ids) for tokens in whole.greedy]
    assert len({len(tokens) for tokens in wanted}) >= 3
    responses = run(whole.stages(num_stages), whole.microbatches(num_microbatches), GREEDY, stop_ids)
    assert [response.id for response in responses] == [prompt.id for prompt in whole.prompts]
    assert [response.tokens.tolist() for response in responses] == wanted
    assert [response.is_finished for response in responses] == [tokens[-1] in stop_ids for tokens in wanted]


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_logprobs_equal_a_fresh_forward_of_prompt_and_response(whole, num_stages, sampling):
    stages = whole.stages(num_stages)
    (stage,) = whole.stages(1)
    responses = run(stages, whole.microbatches(2), sampling, whole.stop_ids)
    with torch.no_grad():
        for prompt, response in zip(whole.prompts, responses, strict=True):
            ids = torch.cat([prompt.tokens, response.tokens])
            hidden = stage.eval()(ids[None, :-1], PackedBatch((len(ids) - 1,), CPU))
            logits = stage.logits(hidden[:, len(prompt.tokens) - 1 :])[0]
            logprobs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
            wanted = logprobs.gather(1, response.tokens[:, None])[:, 0]
            torch.testing.assert_close(response.logprobs, wanted, atol=1e-5, rtol=1e-5)


def test_samples_do_not_depend_on_stages_microbatches_or_order(whole):
    stop_ids = whole.stop_ids
    wanted = {each.id: each for each in run(whole.stages(1), whole.microbatches(1), RANDOM, stop_ids, seed=5)}
    assert len({len(response.tokens) for response in wanted.values()}) > 1
    for num_stages, num_microbatches in ((1, 5), (2, 1), (2, 5), (3, 2)):
        microbatches = [part[::-1] for part in reversed(whole.microbatches(num_microbatches))]
        responses = run(whole.stages(num_stages), microbatches, RANDOM, stop_ids, seed=5)
        assert [each.id for each in responses] == [prompt.id for part in microbatches for prompt in part]
        for response in responses:
            assert torch.equal(response.tokens, wanted[response.id].tokens)
            assert response.is_finished == wanted[response.id].is_finished
            torch.testing.assert_close(response.logprobs, wanted[response.id].logprobs, atol=1e-5, rtol=1e-5)


def test_samples_depend_on_the_seed_and_the_sequence(qwen3):
    stages, (prompt, *_) = qwen3.stages(1), qwen3.prompts
    group = [[Prompt(f"task/0/0/{response}", prompt.tokens) for response in range(8)]]
    first = [response.tokens.tolist() for response in run(stages, group, RANDOM, seed=1)]
    assert first == [response.tokens.tolist() for response in run(stages, group, RANDOM, seed=1)]
    assert len({tuple(tokens) for tokens in first}) == 8
    assert first != [response.tokens.tolist() for response in run(stages, group, RANDOM, seed=2)]


def test_a_longer_limit_only_lengthens_responses(qwen3):
    stages = qwen3.stages(1)
    short = run(stages, [qwen3.prompts], Sampling(max_new_tokens=3))
    for before, after in zip(short, run(stages, [qwen3.prompts], Sampling(max_new_tokens=6)), strict=True):
        assert torch.equal(after.tokens[:3], before.tokens)


@pytest.mark.parametrize("max_new_tokens", [1, 4])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_responses_are_cut_at_the_most_tokens(qwen3, num_stages, max_new_tokens):
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    responses = run(qwen3.stages(num_stages), qwen3.microbatches(2), sampling)
    assert [each.tokens.tolist() for each in responses] == [tokens[:max_new_tokens] for tokens in qwen3.greedy]
    assert not any(response.is_finished for response in responses)


def test_a_stop_at_the_limit_finishes_a_response(qwen3):
    place = next(place for place, tokens in enumerate(qwen3.greedy) if tokens[2] not in tokens[:2])
    prompt, wanted = qwen3.prompts[place], qwen3.greedy[place][:3]
    (response,) = run(qwen3.stages(1), [[prompt]], Sampling(max_new_tokens=3, temperature=0.0), wanted[-1:])
    assert response.is_finished
    assert response.tokens.tolist() == wanted


def test_no_response_ends_before_the_fewest_tokens(qwen3):
    stop_ids = list(range(0, 64, 2))
    free = run(qwen3.stages(1), [qwen3.prompts], Sampling(max_new_tokens=9), stop_ids)
    held = run(qwen3.stages(1), [qwen3.prompts], Sampling(max_new_tokens=9, min_new_tokens=4), stop_ids)
    assert min(len(response.tokens) for response in free) < 4
    for response in held:
        tokens = response.tokens.tolist()
        assert len(tokens) > 4
        assert not set(tokens[:-1]) & set(stop_ids)
        assert response.is_finished == (tokens[-1] in stop_ids)
    never = run(qwen3.stages(1), [qwen3.prompts], Sampling(max_new_tokens=5, min_new_tokens=5), stop_ids)
    assert [(len(response.tokens), response.is_finished) for response in never] == [(5, False)] * 7


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
def test_nothing_is_computed_for_what_has_ended(qwen3, num_stages, num_microbatches):
    stages, microbatches = qwen3.stages(num_stages), qwen3.microbatches(num_microbatches)
    computed = [[] for _ in stages]
    for stage, sizes in zip(stages, computed, strict=True):
        count_forwards(stage, sizes)
    responses = iter(run(stages, microbatches, GREEDY, qwen3.stop_ids))
    wanted = Counter()
    for prompts in microbatches:
        lengths = [len(next(responses).tokens) for _ in prompts]
        wanted[sum(len(prompt.tokens) for prompt in prompts)] += 1
        wanted.update(sum(length > trip for length in lengths) for trip in range(1, max(lengths)))
    assert [Counter(sizes) for sizes in computed] == [wanted] * num_stages


def count_forwards(stage, sizes):
    run_stage = stage.run

    def counted(ids, current, hidden=None):
        sizes.append(ids.shape[1])
        return run_stage(ids, current, hidden)

    stage.run = counted


def test_messages_of_two_stages_and_two_microbatches(qwen3):
    channels = Channels()
    sampling = Sampling(max_new_tokens=2, temperature=0.0)
    stop_ids = [qwen3.greedy[0][0]]
    assert qwen3.greedy[1][0] not in stop_ids
    run(qwen3.stages(2), [qwen3.prompts[:1], qwen3.prompts[1:2]], sampling, stop_ids, channels=channels)
    tokens, hidden = [0, 2], [1, 3]  # tags, by microbatch
    assert channels.log[0] == [  # a receive stands where it begins
        ("send", 1, hidden[0]),
        ("receive", 1, tokens[0]),
        ("send", 1, hidden[1]),  # before anything came back: both stages compute at once
        ("receive", 1, tokens[1]),  # the first response has ended, so its microbatch is closed
        ("send", 1, hidden[1]),
        ("receive", 1, tokens[1]),
    ]
    assert channels.log[1] == [
        ("receive", 0, hidden[0]),
        ("receive", 0, hidden[1]),
        ("send", 0, tokens[0]),
        ("send", 0, tokens[1]),
        ("receive", 0, hidden[1]),
        ("send", 0, tokens[1]),
    ]


@pytest.mark.parametrize("num_stages", [2, 3])
def test_tokens_may_go_home_over_a_group_of_their_own(qwen3, num_stages):
    pipe, home = Channels(), Channels()
    microbatches, stop_ids = qwen3.microbatches(5), qwen3.stop_ids
    responses = run(qwen3.stages(num_stages), microbatches, GREEDY, stop_ids, channels=pipe, home=home)
    assert [each.tokens.tolist() for each in responses] == [cut_at(each, stop_ids) for each in qwen3.greedy]
    last = num_stages - 1
    assert {(source, target) for source, target, _ in home.queues} == {(last, 0)}
    assert {(source, target) for source, target, _ in pipe.queues} == {(stage, stage + 1) for stage in range(last)}


@pytest.mark.parametrize("num_stages", [1, 2])
def test_no_more_caches_than_stages_are_held(qwen3, num_stages, monkeypatch):
    held, counts = {}, []

    class Counted(KVCache):
        def __init__(self, num_rows, max_length):
            super().__init__(num_rows, max_length)
            caches = held.setdefault(threading.get_ident(), weakref.WeakSet())
            caches.add(self)
            counts.append((len(caches), max_length))

    monkeypatch.setattr(generation, "KVCache", Counted)
    microbatches = qwen3.microbatches(5)
    run(qwen3.stages(num_stages), microbatches, GREEDY, qwen3.stop_ids)
    assert max(count for count, _ in counts) == num_stages
    longest = [max(len(prompt.tokens) for prompt in prompts) for prompts in microbatches]
    assert {length for _, length in counts} == {length + MAX_NEW_TOKENS - 1 for length in longest}


def test_over_gloo(qwen3):
    store, port = host_store("127.0.0.1")
    stages, microbatches, stop_ids = qwen3.stages(3), qwen3.microbatches(5), qwen3.stop_ids

    def on(stage):
        own = join_store("127.0.0.1", port, DEADLINE)
        pipe = form_group(own, "pipe", range(3), stage.index, CPU, "127.0.0.1", DEADLINE)
        return generate([stage], pipe, microbatches, RANDOM, stop_ids, 5, CPU)

    with ThreadPoolExecutor(3) as threads:
        *others, responses = threads.map(on, stages)
    del store
    assert others == [None, None]
    wanted = run(qwen3.stages(1), microbatches, RANDOM, stop_ids, seed=5)
    assert [each.tokens.tolist() for each in responses] == [each.tokens.tolist() for each in wanted]


# -- several stages a rank --------------------------------------------------------------------------------------------

CHUNKS = [(2, 2), (1, 3), (3, 1), (1, 2)]
"""Ranks, and stages of each."""


@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
@pytest.mark.parametrize(("num_ranks", "num_chunks"), CHUNKS)
def test_chunks_change_no_token_and_compute_nothing_in_vain(qwen3, num_ranks, num_chunks, num_microbatches):
    stages, microbatches = qwen3.stages(num_ranks * num_chunks), qwen3.microbatches(num_microbatches)
    computed = [[] for _ in stages]
    for stage, sizes in zip(stages, computed, strict=True):
        count_forwards(stage, sizes)
    for sampling, max_tokens in ((GREEDY, None), (RANDOM, None), (RANDOM, 2 * ROOM)):
        wanted = run(qwen3.stages(1), [qwen3.prompts], sampling, qwen3.stop_ids, seed=5)
        limits = Round(max_tokens=max_tokens)
        got = run(stages, microbatches, sampling, qwen3.stop_ids, 5, limits=limits, num_chunks=num_chunks)
        assert as_lists(got) == as_lists(wanted)
        num_tokens = sum(LENGTHS) + sum(len(response.tokens) - 1 for response in got)
        assert [sum(sizes) for sizes in computed] == [num_tokens] * len(stages)
        for sizes in computed:
            sizes.clear()


def test_greedy_responses_in_chunks_equal_transformers(whole_of):
    for model_type in ("gemma2", "deepseek_v3"):  # of four layers
        whole = whole_of(model_type)
        responses = run(whole.stages(4), whole.microbatches(5), GREEDY, whole.stop_ids, num_chunks=2)
        assert [each.tokens.tolist() for each in responses] == [cut_at(each, whole.stop_ids) for each in whole.greedy]


def test_all_that_the_last_rank_sends_to_the_first_goes_home(qwen3):
    pipe, home = Channels(), Channels()
    stages, microbatches = qwen3.stages(4), qwen3.microbatches(5)
    responses = run(stages, microbatches, GREEDY, qwen3.stop_ids, channels=pipe, home=home, num_chunks=2)
    assert [each.tokens.tolist() for each in responses] == [cut_at(each, qwen3.stop_ids) for each in qwen3.greedy]
    assert {key[:2] for key in home.queues} == {(1, 0)}
    assert {key[:2] for key in pipe.queues} == {(0, 1)}


def test_a_rank_with_chunks_holds_no_more_microbatches_than_there_are_ranks(qwen3, monkeypatch):
    held, counts = {}, []

    class Counted(KVCache):
        def __init__(self, num_rows, max_length):
            super().__init__(num_rows, max_length)
            caches = held.setdefault(threading.get_ident(), weakref.WeakSet())
            caches.add(self)
            counts.append(len(caches))

    monkeypatch.setattr(generation, "KVCache", Counted)
    run(qwen3.stages(4), qwen3.microbatches(5), GREEDY, qwen3.stop_ids, num_chunks=2)
    assert max(counts) == 2 * 2


def test_a_rank_without_its_own_stages_is_refused(qwen3):
    with pytest.raises(AssertionError, match="rank 0 of 1 holds other stages than its own"):
        generate(qwen3.stages(2)[1:], None, [qwen3.prompts], GREEDY, [], 0, CPU)


def test_half_precision_does_not_depend_on_the_stages():
    config = {"model_type": "llama", **CONFIGS["llama"]}
    prompts = [Prompt(str(place), torch.arange(1, 2 + place)) for place in range(5)]
    responses = []
    for num_stages in (1, 3):
        stages = [init_stage(config, 3, index, num_stages, CPU, torch.bfloat16) for index in range(num_stages)]
        responses.append(run(stages, [prompts[:2], prompts[2:]], RANDOM))
    for one, other in zip(*responses, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.logprobs, other.logprobs)
        assert one.logprobs.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_the_stages_mode_is_left_as_it_was(qwen3, training):
    (stage,) = qwen3.stages(1)
    stage.train(training)
    run([stage], [qwen3.prompts], GREEDY)
    assert {module.training for module in stage.modules()} == {training}


def test_responses_can_take_part_in_a_loss(qwen3):
    (response, *_) = run(qwen3.stages(1), [qwen3.prompts], RANDOM)
    weight = torch.ones(len(response.tokens), requires_grad=True)
    (weight * response.logprobs).sum().backward()
    assert torch.equal(weight.grad, response.logprobs)


def test_no_prompts_no_responses(qwen3):
    assert run(qwen3.stages(1), [], GREEDY) == []
    assert run(qwen3.stages(2), [], GREEDY) == []


def test_logits_that_are_no_numbers_are_an_error(qwen3):
    (stage,) = qwen3.stages(1)
    with torch.no_grad():
        next(stage.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match="no finite numbers"):
        run([stage], [qwen3.prompts], RANDOM)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_refilled_responses_equal_those_of_whole_microbatches(qwen3, num_stages, num_microbatches, num_slots):
    stages, microbatches = qwen3.stages(num_stages), qwen3.microbatches(num_microbatches)
    limits = Round(max_tokens=num_slots * ROOM + 3)
    for sampling in (GREEDY, RANDOM):
        wanted = run(qwen3.stages(1), [qwen3.prompts], sampling, qwen3.stop_ids, seed=5)
        refilled = run(stages, microbatches, sampling, qwen3.stop_ids, seed=5, limits=limits)
        assert as_lists(refilled) == as_lists(wanted)
        for one, other in zip(refilled, wanted, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=1e-5)


def test_refilled_responses_equal_transformers(whole):
    stop_ids, limits = whole.stop_ids, Round(max_tokens=3 * ROOM)
    wanted = [cut_at(tokens, stop_ids) for tokens in whole.greedy]
    for num_stages in (1, 2):
        responses = run(whole.stages(num_stages), whole.microbatches(2), GREEDY, stop_ids, limits=limits)
        assert [response.tokens.tolist() for response in responses] == wanted


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_refilled_generation_computes_nothing_in_vain(qwen3, num_stages, num_slots):
    stages = qwen3.stages(num_stages)
    computed = [[] for _ in stages]
    for stage, sizes in zip(stages, computed, strict=True):
        count_forwards(stage, sizes)
    limits = Round(max_tokens=num_slots * ROOM)
    responses = run(stages, qwen3.microbatches(5), GREEDY, qwen3.stop_ids, limits=limits)
    wanted = sum(LENGTHS) + sum(len(response.tokens) - 1 for response in responses)
    assert [sum(sizes) for sizes in computed] == [wanted] * num_stages


@pytest.mark.parametrize("num_stages", [1, 2])
def test_caches_stay_within_the_budget(qwen3, num_stages, monkeypatch):
    reserved = []

    class Noted(KVCache):
        def __init__(self, num_rows, max_length):
            super().__init__(num_rows, max_length)
            reserved.append(num_rows * max_length)

    monkeypatch.setattr(generation, "KVCache", Noted)
    run(qwen3.stages(num_stages), qwen3.microbatches(5), GREEDY, qwen3.stop_ids, limits=Round(max_tokens=2 * ROOM + 1))
    assert reserved == [2 * ROOM] * num_stages * num_stages  # one a stage and open microbatch


def test_a_prompt_that_outgrows_the_budget_is_refused(qwen3):
    with pytest.raises(RunError, match=f"may grow to {ROOM} tokens"):
        run(qwen3.stages(1), [qwen3.prompts], GREEDY, limits=Round(max_tokens=ROOM - 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_greedy_responses_do_not_depend_on_the_device(whole):
    device = torch.device("cuda")
    stage = load_stage(whole.directory, 0, 1, device)
    responses = generate([stage], None, whole.microbatches(2), GREEDY, whole.stop_ids, 0, device)
    assert [each.tokens.tolist() for each in responses] == [cut_at(each, whole.stop_ids) for each in whole.greedy]
