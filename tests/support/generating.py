"""Generation by pipeline ranks in threads of this process, joined by real groups over an in-memory backend.

The backend checks what is exchanged; `Whole` is what transformers' own `generate` makes of the same prompts.
"""

import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

os.environ["HF_HUB_OFFLINE"] = "1"

import architectures
import torch
from trainmaster.api.sampling import Sampling
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.loading import load_stage
from trainmaster.workers.parallel.groups import Group
from trainmaster.workers.pipeline.generation import Prompt, generate
from transformers import AutoConfig, AutoModelForCausalLM

CPU = torch.device("cpu")
DEADLINE = timedelta(seconds=30)
ENDLESS = {"bos_token_id": None, "eos_token_id": None}
CONFIGS = {name: architectures.CONFIGS[name] | ENDLESS for name in ("qwen3", "llama", "gpt2", "gemma2", "deepseek_v3")}
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
    def __init__(self, finish=None) -> None:
        self.finish = finish

    def wait(self, deadline: timedelta) -> None:
        if self.finish is not None:
            self.finish()


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
        self.channels.note(self.rank, "receive", source, tag)  # as it begins

        def finish():
            sent = self.channels.between(source, self.rank, tag).get(timeout=DEADLINE.total_seconds())
            assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
            tensor.copy_(sent)

        return Work(finish)


def pipe_over(channels: Channels, rank: int, size: int) -> Group:
    return Group("pipe", tuple(range(size)), rank, Backend(channels, rank), DEADLINE)


def run(stages, microbatches, sampling, stop_ids=(), seed=0, channels=None, home=None, limits=None, num_chunks=1):
    """Responses of the last rank; the others must give none, and leave no message. A rank has `num_chunks` stages."""
    num_ranks = len(stages) // num_chunks
    if num_ranks == 1:
        return generate(stages, None, microbatches, sampling, stop_ids, seed, CPU, None, limits)
    channels = channels or Channels()

    def on(rank):
        pipe = pipe_over(channels, rank, num_ranks)
        way_home = None if home is None else pipe_over(home, rank, num_ranks)
        own = stages[rank::num_ranks]
        return generate(own, pipe, microbatches, sampling, stop_ids, seed, CPU, way_home, limits)

    with ThreadPoolExecutor(num_ranks) as threads:
        results = list(threads.map(on, range(num_ranks)))
    assert results[:-1] == [None] * (num_ranks - 1)
    for each in (channels, home) if home else (channels,):
        check_messages(each, num_ranks)
    return results[-1]


def check_messages(channels, num_ranks):
    """All that was sent was received, and for each pair in order, tags apart (which some backends do not know)."""
    assert all(each.empty() for each in channels.queues.values())
    for source in range(num_ranks):
        for target in range(num_ranks):
            sent = [tag for what, peer, tag in channels.log.get(source, []) if (what, peer) == ("send", target)]
            received = [tag for what, peer, tag in channels.log.get(target, []) if (what, peer) == ("receive", source)]
            assert sent == received


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


def compute(model_type, directory):
    with torch.random.fork_rng(devices=[]), hf_compat.quiet():
        torch.manual_seed(1)
        attention = "eager" if model_type == "gemma2" else "sdpa"
        config = AutoConfig.for_model(**CONFIGS[model_type])
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


ROOM = max(LENGTHS) + MAX_NEW_TOKENS - 1
"""Of a slot."""


def as_lists(responses):
    return [(each.id, each.tokens.tolist(), each.is_finished, each.is_interrupted) for each in responses]
