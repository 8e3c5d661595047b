"""Generation against transformers' own, for any number of stages and microbatches.

Stages run in threads of this process, joined by real groups over an in-memory backend that checks what is exchanged.
"""

import os
import queue
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from trainmaster.api.errors import RunError
from trainmaster.api.sampling import Sampling
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.cache import KVCache
from trainmaster.workers.models.loading import init_stage, load_stage
from trainmaster.workers.parallel.groups import Group, form_group, host_store, join_store
from trainmaster.workers.pipeline import generation
from trainmaster.workers.pipeline.generation import Prompt, generate
from transformers import AutoConfig, AutoModelForCausalLM

CPU = torch.device("cpu")
DEADLINE = timedelta(seconds=30)
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
CONFIGS = {
    "qwen3": {**COMMON, "head_dim": 8, "tie_word_embeddings": True},
    "llama": {**COMMON, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None},
    "gemma2": {**COMMON, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "deepseek_v3": {**COMMON, **LATENT, **EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 1},
}
MAX_NEW_TOKENS = 9
LENGTHS = (5, 11, 1, 7, 3, 5, 9)  # of prompts
SPLITS = {1: (7,), 2: (3, 4), 5: (1, 2, 1, 2, 1)}  # sizes of microbatches, by their number
GREEDY = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
RANDOM = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=1.3, top_k=40, top_p=0.95)


@dataclass
class Channels:
    """What connects the backends of one pipe. `log` has, by rank, what it sent and received, in order."""

    queues: dict[tuple[int, int, int], queue.Queue] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    log: dict[int, list[tuple[str, int, int]]] = field(default_factory=dict)

    def between(self, source: int, target: int, tag: int) -> queue.Queue:
        with self.lock:
            return self.queues.setdefault((source, target, tag), queue.Queue())

    def note(self, rank: int, what: str, peer: int, tag: int) -> None:
        with self.lock:
            self.log.setdefault(rank, []).append((what, peer, tag))


class Work:
    def wait(self, deadline: timedelta) -> None:
        pass


@dataclass
class Backend:
    """As much of a torch backend as `Group` asks for point-to-point messages."""

    channels: Channels
    rank: int

    def send(self, tensors, target: int, tag: int) -> Work:
        (tensor,) = tensors
        assert tensor.is_contiguous()
        self.channels.note(self.rank, "send", target, tag)
        self.channels.between(self.rank, target, tag).put(tensor.clone())
        return Work()

    def recv(self, tensors, source: int, tag: int) -> Work:
        (tensor,) = tensors
        sent = self.channels.between(source, self.rank, tag).get(timeout=DEADLINE.total_seconds())
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(sent)
        self.channels.note(self.rank, "receive", source, tag)
        return Work()


def pipe_over(channels: Channels, rank: int, size: int) -> Group:
    return Group("pipe", tuple(range(size)), rank, Backend(channels, rank), DEADLINE)


def run(stages, microbatches, sampling, stop_ids=(), seed=0, channels=None, home=None):
    """Responses of the last stage; the others must give none, and leave no message."""
    if len(stages) == 1:
        return generate(stages[0], None, microbatches, sampling, stop_ids, seed, CPU)
    channels = channels or Channels()

    def on(stage):
        pipe = pipe_over(channels, stage.index, len(stages))
        way_home = None if home is None else pipe_over(home, stage.index, len(stages))
        return generate(stage, pipe, microbatches, sampling, stop_ids, seed, CPU, way_home)

    with ThreadPoolExecutor(len(stages)) as threads:
        results = list(threads.map(on, stages))
    assert results[:-1] == [None] * (len(stages) - 1)
    for each in (channels, home) if home else (channels,):
        check_messages(each, len(stages))
    return results[-1]


def check_messages(channels, num_stages):
    """All that was sent was received, and for each pair in order, tags apart (which some backends do not know)."""
    assert all(each.empty() for each in channels.queues.values())
    for source in range(num_stages):
        for target in range(num_stages):
            sent = [tag for what, peer, tag in channels.log.get(source, []) if (what, peer) == ("send", target)]
            received = [tag for what, peer, tag in channels.log.get(target, []) if (what, peer) == ("receive", source)]
            assert sent == received


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@dataclass
class Whole:
    """A checkpoint, prompts, and what transformers' own greedy `generate` makes of them without stop tokens."""

    directory: object
    prompts: list[Prompt]
    greedy: list[list[int]]

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end responses at different places, and some of them never."""
        return sorted({self.greedy[0][2], self.greedy[1][0], self.greedy[3][4]})

    def stages(self, num_stages):
        return [load_stage(self.directory, index, num_stages, CPU) for index in range(num_stages)]

    def microbatches(self, num_microbatches):
        rest, parts = list(self.prompts), []
        for size in SPLITS[num_microbatches]:
            parts.append([rest.pop(0) for _ in range(size)])
        return parts


@pytest.fixture(scope="module")
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


def compute(model_type, directory):
    with torch.random.fork_rng(devices=[]), hf_compat.quiet():
        torch.manual_seed(1)
        attention = "eager" if model_type == "gemma2" else "sdpa"
        config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # so that responses vary
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(directory)
        prompts, greedy = [], []
        for place, length in enumerate(LENGTHS):
            prompts.append(Prompt(f"task/0/{place}/0", torch.randint(1, 64, (length,))))
            ids = prompts[-1].tokens[None]
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS
            )
            greedy.append(out[0, length:].tolist())
    return Whole(directory, prompts, greedy)


def cut_at(tokens, stop_ids):
    ends = [place for place, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


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
    assert channels.log[0] == [
        ("send", 1, hidden[0]),
        ("send", 1, hidden[1]),  # before anything came back: both stages compute at once
        ("receive", 1, tokens[0]),
        ("send", 1, tokens[0]),  # the first response has ended, so this closes
        ("receive", 1, tokens[1]),
        ("send", 1, tokens[1]),
        ("send", 1, hidden[1]),
        ("receive", 1, tokens[1]),
        ("send", 1, tokens[1]),
    ]
    assert channels.log[1] == [
        ("receive", 0, hidden[0]),
        ("send", 0, tokens[0]),
        ("receive", 0, hidden[1]),
        ("send", 0, tokens[1]),
        ("receive", 0, tokens[0]),
        ("receive", 0, tokens[1]),
        ("receive", 0, hidden[1]),
        ("send", 0, tokens[1]),
        ("receive", 0, tokens[1]),
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
        return generate(stage, pipe, microbatches, RANDOM, stop_ids, 5, CPU)

    with ThreadPoolExecutor(3) as threads:
        *others, responses = threads.map(on, stages)
    del store
    assert others == [None, None]
    wanted = run(qwen3.stages(1), microbatches, RANDOM, stop_ids, seed=5)
    assert [each.tokens.tolist() for each in responses] == [each.tokens.tolist() for each in wanted]


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_greedy_responses_do_not_depend_on_the_device(whole):
    device = torch.device("cuda")
    stage = load_stage(whole.directory, 0, 1, device)
    responses = generate(stage, None, whole.microbatches(2), GREEDY, whole.stop_ids, 0, device)
    assert [each.tokens.tolist() for each in responses] == [cut_at(each, whole.stop_ids) for each in whole.greedy]
