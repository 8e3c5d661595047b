"""A tiny model trained in any layout by up to four real processes, on microbatches of any lengths.

    test --submit--> processes of rank 0, 1, ...: one `ModelShard` each, gloo groups between them
         <--Outcome-- gradients of the first step, weights after the last, by names in the whole model

`alone` is the same in this process, on all microbatches of all replicas: what every layout must come to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import torch
from preloaded import forking
from trainmaster.api.config import Dataset, Deadlines, Layout, LoRA, Model, Optimizer, Precision, RunOptions
from trainmaster.api.experiments.base import CompiledExperiment, PlacedModel
from trainmaster.api.experiments.sft import SFT
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.context import ShardGroups, WorkerContext
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.parallel.groups import host_store
from trainmaster.workers.shard import ModelShard
from workbench import TINY_MODEL

ADDRESS = "127.0.0.1"
NUM_WORKERS = 4
CPU = torch.device("cpu")
QWEN = TINY_MODEL | {"initializer_range": 0.2}
"""Its embedding is its head."""
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 16,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
}
"""With dropout, biases, and products that are not linear modules."""
OPTIMIZER = Optimizer(learning_rate=1e-2, epsilon=1e-3, max_gradient_norm=0.5)
LENGTHS = ((7, 13), (5,), (9, 2, 3), (11, 11), (4, 6), (8,), (3, 12))
"""Of sequences, by microbatch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how."""

    layout: Layout
    num_microbatches: int = 3
    """Of each replica."""
    config: dict[str, Any] = field(default_factory=lambda: QWEN)
    num_steps: int = 2
    optimizer: Optimizer = OPTIMIZER
    dtype: Precision = Precision.FLOAT32
    trainable: tuple[str, ...] = ()
    lora: LoRA | None = None

    def share(self, dp: int, step: int) -> list[Microbatch]:
        """A replica's microbatches of a step."""
        own = range(dp * self.num_microbatches, (dp + 1) * self.num_microbatches)
        return [microbatch(at, step) for at in own]


@dataclass(frozen=True)
class Outcome:
    """Of one shard, or of all shards of a replica together."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    gradients: dict[str, numpy.ndarray]
    """Of the first step, clipped."""
    before: dict[str, numpy.ndarray]
    weights: dict[str, numpy.ndarray]
    """After the last step."""
    stages: dict[str, int]
    """By name, the stage that it is on; the last one, where several have it."""


def microbatch(at: int, step: int = 0) -> Microbatch:
    lengths = LENGTHS[at % len(LENGTHS)]
    generator = torch.Generator().manual_seed(100 * step + at)
    tokens = torch.randint(3, 16, (1, sum(lengths)), generator=generator)
    mask = torch.rand(sum(lengths), generator=generator) < 0.7
    ids = tuple(f"data/{step}/{at}/{place}" for place in range(len(lengths)))
    return Microbatch(tokens=tokens, packed=PackedBatch(lengths, CPU), keys={"loss_mask": mask}, ids=ids)


def alone(case: Case) -> Outcome:
    """One process, on what all replicas get."""
    layout = case.layout
    whole = replace(case, layout=Layout(), num_microbatches=case.num_microbatches * layout.dp)
    return outcome(make_shard(whole, 0, None), whole)


def outcome(shard: ModelShard, case: Case) -> Outcome:
    losses, norms, gradients, before = [], [], {}, _weights(shard)
    for step in range(case.num_steps):
        done = shard.train(SupervisedFineTuning(), case.share(shard.place.dp, step))
        norms.append(done["gradient_norm"].total)
        if "loss" in done:
            losses.append(done["loss"].total / done["loss"].weight)
        if step == 0:
            for stage in shard.stages:
                gradients |= {
                    name: each.grad.numpy().copy()
                    for name, each in stage.model.named_parameters()
                    if each.grad is not None
                }
    stages = {name: stage.index for stage in shard.stages for name, _ in stage.model.named_parameters()}
    return Outcome(tuple(losses), tuple(norms), gradients, before, _weights(shard), stages)


def _weights(shard: ModelShard) -> dict[str, numpy.ndarray]:
    return {
        name: each.detach().float().numpy().copy()
        for stage in shard.stages
        for name, each in stage.model.named_parameters()
    }


def make_shard(case: Case, rank: int, port: int | None) -> ModelShard:
    """With groups, if there is a store for them."""
    torch.set_num_threads(1)
    context = make_context(case, rank)
    if port is not None:
        context.join_groups(ADDRESS, port)
    return ModelShard(context.compiled.models["model"], context, context.groups.get("model", ShardGroups()))


def make_context(case: Case, rank: int) -> WorkerContext:
    layout = case.layout
    return WorkerContext(
        rank=rank,
        num_workers=layout.num_workers,
        device=CPU,
        compiled=_compiled(case),
        name="pipes",
        address=ADDRESS,
    )


def _compiled(case: Case) -> CompiledExperiment:
    model = Model(
        config=case.config,
        tokenizer=Path("none"),
        layout=case.layout,
        dtype=case.dtype,
        trainable=case.trainable,
        lora=case.lora,
    )
    compiled = SFT(
        model=model,
        dataset=Dataset(path=Path("none")),
        optimizer=case.optimizer,
        batch_size=16,
        run=RunOptions(name="pipes", seed=3, deadlines=Deadlines(setup_s=60.0, call_s=60.0)),
    ).compile()
    return replace(compiled, models={"model": PlacedModel(model=model, optimizer=case.optimizer, field="model")})


class Pool:
    """Runs a job in several processes at once, one a rank."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, job: Callable[..., Any], num_ranks: int, *arguments: object) -> list[Any]:
        """`job(rank, port of a store, ...)`: what each rank returns. Raises what one of them raised."""
        store, port = host_store(ADDRESS)  # lives until all are done
        futures: list[Future[Any]] = [self._pool.submit(job, rank, port, *arguments) for rank in range(num_ranks)]
        done = [future.result(timeout=120) for future in futures]
        del store
        return done

    def train(self, case: Case) -> list[Outcome]:
        """Of each worker."""
        return self.run(_train, case.layout.num_workers, case)


def _train(rank: int, port: int, case: Case) -> Outcome:
    return outcome(make_shard(case, rank, port), case)


@contextmanager
def processes() -> Iterator[Pool]:
    """All of which have imported what they need, so that none keeps the others waiting in a group."""
    with ProcessPoolExecutor(NUM_WORKERS, mp_context=forking()) as executor:
        pool = Pool(executor)
        pool.run(_meet, NUM_WORKERS)
        yield pool


def _meet(rank: int, port: int) -> None:
    store = torch.distributed.TCPStore(ADDRESS, port, timeout=timedelta(seconds=110))
    store.set(str(rank), "here")
    store.wait([str(other) for other in range(NUM_WORKERS)])


def joined(outcomes: Sequence[Outcome]) -> tuple[dict[str, numpy.ndarray], dict[str, numpy.ndarray]]:
    """Gradients and weights of all of them; copies of one parameter must be equal."""
    gradients: dict[str, numpy.ndarray] = {}
    weights: dict[str, numpy.ndarray] = {}
    for each in outcomes:
        for found, own in ((gradients, each.gradients), (weights, each.weights)):
            for name, array in own.items():
                numpy.testing.assert_array_equal(found.setdefault(name, array), array, err_msg=name)
    return gradients, weights
