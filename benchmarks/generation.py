"""Trainmaster's generation beside transformers' own `generate`, on one model, in one process, in turns.

    python benchmarks/generation.py --json

Both sides have one thread, draw at temperature 1 from the whole distribution, and give each token's log-probability.
transformers pads prompts on the left and goes on until the last response of its batch is done; it ends each response
where ours ended, since two samplers would draw different lengths, so that both do the same work:

    fixed        64 prompts of 8 to 48 tokens, 128 new tokens each
    skewed       the same prompts; a response ends after any token with a probability of 1/32, at the latest after 256
    continuous   the same with 96 prompts and 16 slots: transformers takes batches of 16, ours refills

Before anything is timed, greedy tokens of both are compared: they are equal, or this fails. `speedup_*` are medians of
ratios of one round. `wasted_forwards`: rows that any stage computed beyond the prompts and one a token that goes on.

Then two processes over gloo, with one stage each, on 1, 2, 4 microbatches of 16 prompts: `formula`, m / max(m, p);
`counted`, from the program's turns if all of them took as long; `measured`, the share of time that stages compute, of
the time from the first trip to the last. Stages are not quite alike (the last has the head): `balance`, the mean of
their work over the largest, is what may be had at most where m >= p.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from trainmaster.api.sampling import Sampling
from trainmaster.workers.models import hf_compat
from trainmaster.workers.models.loading import load_stage
from trainmaster.workers.models.stage import Stage
from trainmaster.workers.parallel.groups import form_group, host_store, join_store
from trainmaster.workers.pipeline.generation import Prompt, Response, Round, generate
from trainmaster.workers.pipeline.instructions import Op
from trainmaster.workers.pipeline.responses import Drafts
from trainmaster.workers.pipeline.rounds import ring, turns
from trainmaster.workers.pipeline.slots import ENDED, Claim, Slots
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria

CPU = torch.device("cpu")
VOCABULARY = 2048
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 688,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
STOPS = list(range(1, 1 + VOCABULARY // 32))
LONGEST_PROMPT = 48
DEADLINE = timedelta(seconds=120)
MICROBATCHES = (1, 2, 4)
"""Numbers of them, for two stages."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often every side runs")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.check_greedy()
        result: dict[str, Any] = {"rounds": options.rounds}
        result |= bench.compare("fixed", 64, 128, stops=[], num_slots=None, rounds=options.rounds)
        result |= bench.compare("skewed", 64, 256, stops=STOPS, num_slots=None, rounds=options.rounds)
        result |= bench.compare("continuous", 96, 256, stops=STOPS, num_slots=16, rounds=options.rounds)
        result["pp2"] = utilisations(Path(folder), options.rounds)
    result["wasted_forwards"] = bench.num_wasted + sum(each.pop("wasted_forwards") for each in result["pp2"].values())
    result["machine"] = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps(result, indent=None if options.json else 2))


class CountedStage:
    """Counts and times what the one stage of this process computes."""

    def __init__(self, stage: Stage) -> None:
        self.num_rows, self.busy_s, self.first_s = 0, 0.0, 0.0
        run, logits = stage.run, stage.logits

        def timed(function: Any, *args: Any) -> Tensor:  # of any signature
            start_s = time.perf_counter()
            self.first_s = self.first_s or start_s
            out: Tensor = function(*args)
            self.busy_s += time.perf_counter() - start_s
            return out

        def counted(ids: Tensor, *args: Any) -> Tensor:
            self.num_rows += ids.shape[1]
            return timed(run, ids, *args)

        add = Drafts.add
        Drafts.add = lambda drafts, rows, logits: timed(add, drafts, rows, logits)  # type: ignore[method-assign]
        stage.run = counted  # type: ignore[method-assign]
        stage.logits = lambda hidden: timed(logits, hidden)  # type: ignore[method-assign]


def needed(prompts: list[Prompt], responses: list[Response]) -> int:
    """Rows of all passes: prompts, and every token but the last."""
    return sum(len(each.tokens) for each in prompts) + sum(len(each.tokens) - 1 for each in responses)


def make_prompts(count: int, seed: int) -> list[Prompt]:
    source, draws = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [source.randint(8, LONGEST_PROMPT) for _ in range(count)]
    lengths[0] = LONGEST_PROMPT
    return [
        Prompt(f"prompt/{seed}/{at}", torch.randint(0, VOCABULARY, (length,), generator=draws))
        for at, length in enumerate(lengths)
    ]


class Ends(StoppingCriteria):  # type: ignore[misc]  # transformers has no types for it
    """Ends each row after its number of new tokens."""

    def __init__(self, prompt_length: int, lengths: list[int]) -> None:
        self.ends = torch.tensor(lengths) + prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # a foreign signature
        return input_ids.shape[1] >= self.ends


class Bench:
    """One model, for both sides."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        with hf_compat.quiet():
            config = AutoConfig.for_model("qwen3", **CONFIG)
            self.model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
            self.model.save_pretrained(folder)
        self.stage = load_stage(folder, 0, 1, CPU)
        self.counter, self.num_wasted = CountedStage(self.stage), 0

    def check_greedy(self) -> None:
        prompts = make_prompts(16, seed=1)
        ours = self.ours(prompts, Sampling(max_new_tokens=64, temperature=0.0), [], None)
        theirs, _ = self.theirs(prompts, [64] * 16, do_sample=False)
        assert [each.tokens.tolist() for each in ours] == theirs.tolist(), "greedy tokens are not those of transformers"

    def ours(
        self, prompts: list[Prompt], sampling: Sampling, stops: list[int], num_slots: int | None, seed: int = 0
    ) -> list[Response]:
        """With `num_slots`, in slots for the longest prompt and response."""
        room = None if num_slots is None else num_slots * (LONGEST_PROMPT + sampling.max_new_tokens - 1)
        before = self.counter.num_rows
        responses = generate([self.stage], None, [prompts], sampling, stops, seed, CPU, limits=Round(max_tokens=room))
        assert responses is not None, "one stage is the last"
        self.num_wasted += self.counter.num_rows - before - needed(prompts, responses)
        return responses

    def theirs(self, prompts: list[Prompt], lengths: list[int], do_sample: bool = True) -> tuple[Tensor, Tensor]:
        """One batch: tokens and log-probabilities `[n, r]` of responses of these lengths."""
        longest = max(len(each.tokens) for each in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt.tokens) :] = prompt.tokens
            mask[row, longest - len(prompt.tokens) :] = 1
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=do_sample,
                top_k=0 if do_sample else None,
                max_new_tokens=max(lengths),
                stopping_criteria=[Ends(longest, lengths)],
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens = out.sequences[:, longest:]
            logits = torch.stack(out.logits, 1)  # [n, r, V]
            logprobs = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
        return tokens, logprobs

    def compare(
        self, name: str, count: int, max_new_tokens: int, stops: list[int], num_slots: int | None, rounds: int
    ) -> dict[str, Any]:
        sampling, size = Sampling(max_new_tokens=max_new_tokens), num_slots or count
        ratios, rates, lengths = [], [], []
        for at in range(rounds + 1):
            prompts = make_prompts(count, seed=100 + at)
            start_s = time.perf_counter()
            responses = self.ours(prompts, sampling, stops, num_slots, seed=at)
            middle_s = time.perf_counter()
            lengths = [len(each.tokens) for each in responses]
            for first in range(0, count, size):
                part = slice(first, first + size)
                tokens, _ = self.theirs(prompts[part], lengths[part])
                assert tokens.shape[1] == max(lengths[part]), "transformers ends where ours did"
            end_s = time.perf_counter()
            if at > 0:  # the first round warms up
                ratios.append((end_s - middle_s) / (middle_s - start_s))
                rates.append(sum(lengths) / (middle_s - start_s))
        return {
            f"speedup_{name}": round(statistics.median(ratios), 3),
            name: {
                "ratios": [round(each, 2) for each in sorted(ratios)],
                "tokens_per_s": round(statistics.median(rates)),
                "mean_length": round(statistics.mean(lengths), 1),
                "longest": max(lengths),
            },
        }


def utilisations(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Of two stages, by the number of microbatches."""
    store, port = host_store("127.0.0.1")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        both = list(pool.map(run_stage, [folder] * 2, [port] * 2, range(2), [rounds] * 2))
    del store
    result = {}
    for num_microbatches, first, last in zip(MICROBATCHES, *both, strict=True):
        runs = []
        for one, other in zip(first["runs"], last["runs"], strict=True):
            busy_s = [one["busy_s"], other["busy_s"]]
            runs.append((sum(busy_s) / (2 * one["wall_s"]), sum(busy_s) / (2 * max(busy_s))))
        measured, balance = (statistics.median(values) for values in zip(*runs, strict=True))
        result[f"m={num_microbatches}"] = {
            "formula": round(num_microbatches / max(num_microbatches, 2), 3),
            "counted": round(counted_utilisation(2, num_microbatches, num_trips=200), 3),
            "measured": round(measured, 3),
            "balance": round(balance, 3),
            "wasted_forwards": first["num_wasted"] + last["num_wasted"],
        }
    return result


def run_stage(folder: Path, port: int, index: int, rounds: int) -> list[dict[str, Any]]:
    """One of two stages, in a process of its own."""
    torch.set_num_threads(1)
    stage = load_stage(folder, index, 2, CPU)
    store = join_store("127.0.0.1", port, DEADLINE)
    pipe = form_group(store, "pipe", range(2), index, CPU, "127.0.0.1", DEADLINE)
    sampling, results = Sampling(max_new_tokens=96), []
    counter = CountedStage(stage)
    for count in MICROBATCHES:
        prompts, runs, num_rows, total = make_prompts(16 * count, seed=7), [], 0, 0
        microbatches = [prompts[at::count] for at in range(count)]
        for at in range(rounds + 1):
            counter.busy_s = counter.first_s = 0.0
            counter.num_rows = 0
            generate([stage], pipe, microbatches, sampling, [], at, CPU)
            if at > 0:
                runs.append({"wall_s": time.perf_counter() - counter.first_s, "busy_s": counter.busy_s})
            num_rows += counter.num_rows
            total += sum(len(each.tokens) for each in prompts) + len(prompts) * (sampling.max_new_tokens - 1)
        results.append({"runs": runs, "num_wasted": num_rows - total})
    return results


def counted_utilisation(num_stages: int, num_microbatches: int, num_trips: int) -> float:
    """The share of units of time in which a stage computes, if every pass took one and a message none."""
    topology, sequences = ring(num_stages), [[at] for at in range(num_microbatches)]
    claims = [Claim(1, num_trips) for _ in sequences]
    ends: dict[tuple[int, int, int], float] = {}  # of a pass, by stage, microbatch, trip
    free, orders = [0.0] * num_stages, []
    for stage in range(num_stages):
        walk, answer, order = turns(topology, stage, Slots(claims, sequences, num_stages, None)), None, []
        while True:
            try:
                turn = walk.send(answer)
            except StopIteration:
                break
            at = turn.instruction
            answer = [ENDED if at.trip == num_trips - 1 else 1] * len(turn.pool.rows) if turn.is_answered else None
            if at.op is Op.FORWARD:
                order.append((turn.pool.microbatch, at.trip))
        orders.append(order)
    for step in range(len(orders[0])):
        for stage in range(num_stages):
            microbatch, trip = orders[stage][step]
            before = (stage - 1, microbatch, trip) if stage else (num_stages - 1, microbatch, trip - 1)
            free[stage] = max(free[stage], ends.get(before, 0.0)) + 1.0
            ends[stage, microbatch, trip] = free[stage]
    return len(ends) / (num_stages * max(free))


if __name__ == "__main__":
    main()
