"""Our runner beside torch.distributed.pipelining: the same stages, microbatches and losses, in turns, step by step.

    python benchmarks/pipeline.py --json

Two processes over gloo, one thread each, m = 8 microbatches; a step is forward, loss and backward of all of them (no
optimizer). Both sides run the same modules (a random qwen3 in two stages), so what differs is the runner alone.

    ratio_gpipe, ratio_1f1b   our seconds over theirs, equal lengths: paired medians; the bar is 1.05
    ragged_speedup            their seconds over ours with lengths of 32 to 512, which they must pad; the bar is 1.5
    efficiency                one process's seconds over twice ours (1f1b), beside `ceiling`, m / (m + p - 1)
    ratio_zb_h1               our ZB-H1 over our 1f1b

Run it on a machine with two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.models.loading import init_stage
from trainmaster.workers.models.stage import Stage
from trainmaster.workers.parallel.groups import Group, form_group, host_store, join_store
from trainmaster.workers.pipeline.lowering import training_program
from trainmaster.workers.pipeline.runner import Runner, Training
from trainmaster.workers.pipeline.schedules import Kind

ADDRESS, NUM_RANKS, NUM_MICROBATCHES, NUM_SEQUENCES = "127.0.0.1", 2, 8, 2
LENGTH, SHORTEST, LONGEST = 256, 32, 512
IGNORED = -100
CPU = torch.device("cpu")
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
}
Step = Callable[[], None]


def loss_of(stage: Stage, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross-entropy, summed. hidden [1, T, H], tokens and targets [T]."""
    return F.cross_entropy(stage.logits(hidden)[0], targets, reduction="sum", ignore_index=IGNORED)


def microbatch(lengths: tuple[int, ...], seed: int) -> Microbatch:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, CONFIG["vocab_size"], (length,), generator=generator) for length in lengths]
    targets = torch.cat([F.pad(row[1:], (0, 1), value=IGNORED) for row in rows])
    return Microbatch(tokens=torch.cat(rows)[None], packed=PackedBatch(lengths, CPU), keys={"targets": targets})


class Padded(nn.Module):
    """A stage as torch's pipelining takes it: ids [B, L] or hidden [B, L, H] in, hidden [B, L, H] out."""

    def __init__(self, stage: Stage, length: int) -> None:
        super().__init__()
        self.stage = stage
        self.batch = PackedBatch((length,) * NUM_SEQUENCES, CPU)
        self.ids = torch.zeros(1, length * NUM_SEQUENCES, dtype=torch.int64)

    def forward(self, given: Tensor) -> Tensor:
        if self.stage.is_first:
            hidden = self.stage(given.reshape(1, -1), self.batch)
        else:
            hidden = self.stage(self.ids, self.batch, given.flatten(0, 1)[None])
        return hidden.unflatten(1, (NUM_SEQUENCES, -1))[0]


def padded_rows(microbatches: list[Microbatch], length: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, [m * B, L]."""
    tokens, targets = [], []
    for each in microbatches:
        for row, target in zip(
            each.tokens[0].split(each.packed.seqlens), each.keys["targets"].split(each.packed.seqlens), strict=True
        ):
            tokens.append(F.pad(row, (0, length - len(row))))
            targets.append(F.pad(target, (0, length - len(row)), value=IGNORED))
    return torch.stack(tokens), torch.stack(targets)


def our_step(
    stages: list[Stage], pipe: Group | None, back: Group | None, microbatches: list[Microbatch], kind: Kind
) -> Step:
    runner = Runner(stages, pipe, back, CPU, torch.float32)
    program = training_program(1 if pipe is None else NUM_RANKS, len(microbatches), kind)
    duties = Training(seed="0", reduce=lambda stage: None, step=lambda: None)

    def finish(stage: Stage, hidden: Tensor, each: Microbatch) -> Tensor:
        return loss_of(stage, hidden, each.tokens[0], each.keys["targets"])

    return lambda: runner.run(program, microbatches, finish, duties)


def their_step(stage: Stage, microbatches: list[Microbatch], length: int, kind: Kind) -> Step:
    tokens, targets = padded_rows(microbatches, length)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return loss_of(stage, hidden.flatten(0, 1)[None], tokens, target.flatten())

    placed = PipelineStage(Padded(stage, length), stage.index, NUM_RANKS, CPU)
    schedule = {Kind.GPIPE: ScheduleGPipe, Kind.ONE_F_ONE_B: Schedule1F1B}[kind](
        placed, NUM_MICROBATCHES, loss_fn=loss, scale_grads=False
    )
    if stage.is_first:
        return lambda: schedule.step(tokens)
    return lambda: schedule.step(target=targets, losses=[])


def timed(step: Step, stages: list[Stage]) -> float:
    """Seconds until both ranks are done."""
    for stage in stages:
        stage.zero_grad(set_to_none=True)
    dist.barrier()
    start_s = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - start_s


def measure(rank: int, port: int, num_rounds: int, answers: SimpleQueue[dict[str, object]]) -> None:
    torch.set_num_threads(1)
    deadline = timedelta(seconds=120)
    store = join_store(ADDRESS, port, deadline)
    dist.init_process_group("gloo", store=dist.PrefixStore("theirs", store), rank=rank, world_size=NUM_RANKS)
    pipe, back = (form_group(store, name, [0, 1], rank, CPU, ADDRESS, deadline) for name in ("pipe", "back"))
    ours, theirs = (init_stage(CONFIG, 1, rank, NUM_RANKS, CPU) for _ in range(2))
    whole = init_stage(CONFIG, 1, 0, 1, CPU) if rank == 0 else None
    equal = [microbatch((LENGTH,) * NUM_SEQUENCES, at) for at in range(NUM_MICROBATCHES)]
    lengths = torch.randint(
        SHORTEST, LONGEST + 1, (NUM_MICROBATCHES, NUM_SEQUENCES), generator=torch.Generator().manual_seed(0)
    )
    ragged = [microbatch(tuple(row), at) for at, row in enumerate(lengths.tolist())]
    one = our_step([whole], None, None, equal, Kind.ONE_F_ONE_B) if whole is not None else lambda: None
    steps: dict[str, tuple[Step, list[Stage]]] = {
        "ours_gpipe": (our_step([ours], pipe, back, equal, Kind.GPIPE), [ours]),
        "theirs_gpipe": (their_step(theirs, equal, LENGTH, Kind.GPIPE), [theirs]),
        "ours_1f1b": (our_step([ours], pipe, back, equal, Kind.ONE_F_ONE_B), [ours]),
        "theirs_1f1b": (their_step(theirs, equal, LENGTH, Kind.ONE_F_ONE_B), [theirs]),
        "ours_zb_h1": (our_step([ours], pipe, back, equal, Kind.ZB_H1), [ours]),
        "ours_ragged": (our_step([ours], pipe, back, ragged, Kind.ONE_F_ONE_B), [ours]),
        "theirs_ragged": (their_step(theirs, ragged, LONGEST, Kind.ONE_F_ONE_B), [theirs]),
        "one_process": (one, [whole] if whole is not None else []),
    }
    gradients = {}
    for name, (step, stages) in steps.items():  # warm up
        timed(step, stages)
        gradients[name] = [parameter.grad.clone() for stage in stages for parameter in stage.parameters()]
    for kind in ("gpipe", "1f1b", "ragged"):
        for mine, other in zip(gradients[f"ours_{kind}"], gradients[f"theirs_{kind}"], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    seconds = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, (step, stages) in steps.items():
            seconds[name].append(timed(step, stages))
    if rank == 0:
        answers.put(figures(seconds))
    dist.destroy_process_group()


def figures(seconds: dict[str, list[float]]) -> dict[str, object]:
    def paired(one: str, other: str) -> float:
        return round(median(a / b for a, b in zip(seconds[one], seconds[other], strict=True)), 3)

    return {
        "ratio_gpipe": paired("ours_gpipe", "theirs_gpipe"),
        "ratio_1f1b": paired("ours_1f1b", "theirs_1f1b"),
        "ragged_speedup": paired("theirs_ragged", "ours_ragged"),
        "efficiency": round(paired("one_process", "ours_1f1b") / NUM_RANKS, 3),
        "ceiling": round(NUM_MICROBATCHES / (NUM_MICROBATCHES + NUM_RANKS - 1), 3),
        "ratio_zb_h1": paired("ours_zb_h1", "ours_1f1b"),
        "median_s": {name: round(median(each), 4) for name, each in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    store, port = host_store(ADDRESS)
    context = get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=measure, args=(rank, port, options.rounds, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    del store
    if any(process.exitcode for process in processes):
        raise SystemExit(1)
    print(json.dumps(answers.get(), indent=None if options.json else 2))


if __name__ == "__main__":
    main()
