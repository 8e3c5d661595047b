"""One tiny policy in several layouts, over two real processes: what each layout makes of the same prompts and numbers.

    test --submit--> process of rank 0: shards of "one", "stages" (stage 0), "chunks" (0, 2), "copies" (replica 0) ---+
         --submit--> process of rank 1: shards of        "stages" (stage 1), "chunks" (1, 3), "copies" (replica 1) ---+
                                                                                                         gloo groups

For what needs no other worker, `lone_shard` makes any worker's shard of any layout here.

Shards are `ModelShard`, inputs pass through `Store`, and minibatches are cut by `plan_microbatches`, as in a run; there
is no master, so a test says what is trained on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from preloaded import forking
from trainmaster.api.algorithms import KLEstimator, LossNormalisation, PolicyLoss
from trainmaster.api.balance import plan_microbatches
from trainmaster.api.config import Dataset, Deadlines, Layout, Model, Optimizer, Precision, RunOptions, Schedule
from trainmaster.api.experiments.answers import PROMPT_KEYS, generate_call
from trainmaster.api.experiments.base import CompiledExperiment, PlacedModel
from trainmaster.api.experiments.grpo import GRPO
from trainmaster.api.graph import Graph
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling
from trainmaster.workers.algorithms.grpo import GroupRelativePolicy
from trainmaster.workers.context import ShardGroups, WorkerContext
from trainmaster.workers.data.store import describe
from trainmaster.workers.functions.advantages import group_advantages
from trainmaster.workers.parallel.groups import host_store
from trainmaster.workers.pipeline.generation import Prompt
from trainmaster.workers.shard import ModelShard
from workbench import TINY_MODEL

ADDRESS = "127.0.0.1"
NUM_WORKERS = 2
LAYOUTS = {
    "one": Layout(),
    "stages": Layout(pp=2),
    "chunks": Layout(pp=2, schedule=Schedule.INTERLEAVED, chunks=2),
    "copies": Layout(dp=2),
}
MODEL = Model(config=TINY_MODEL | {"initializer_range": 0.2}, tokenizer=Path("none"))
OPTIMIZER = Optimizer(learning_rate=1e-3, warmup_steps=2)
LOSS = PolicyLoss(
    clip_low=0.2,
    clip_high=0.28,
    kl_coefficient=0.0,
    kl_estimator=KLEstimator.K3,
    normalisation=LossNormalisation.TOKEN,
    temperature=1.0,
)
SAMPLING = Sampling(max_new_tokens=12, min_new_tokens=4)
STOP_IDS = (1,)
NUM_PROMPTS, GROUP_SIZE, NUM_MINIBATCHES = 8, 4, 2
GENERATION_TOKENS, TRAINING_TOKENS = 128, 48
"""The most tokens of a microbatch: a batch is cut into several, and differently in each layout."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A response and what training needs of it; plain numbers, so that they pass between processes as they are."""

    id: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    """Of each token of the response, when it was drawn."""
    advantage: float


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one optimizer step reported."""

    loss: float
    gradient_norm: float
    drift: float
    """`sampler_kl`: how far the policy is from the one that sampled."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One traversal of one layout: what was drawn, and what it was trained on."""

    rollouts: tuple[Rollout, ...]
    updates: tuple[Update, ...]


Report = dict[str, list[Step]]
"""By layout, of those that this rank reports on."""


class Worker:
    """One rank, with fresh shards of every layout that it takes part in."""

    def __init__(self, rank: int, port: int) -> None:
        torch.set_num_threads(1)
        self.rank = rank
        self.context = WorkerContext(
            rank=rank,
            num_workers=NUM_WORKERS,
            device=torch.device("cpu"),
            compiled=_compiled(),
            name="shards",
            address=ADDRESS,
        )
        self.context.join_groups(ADDRESS, port)
        self.shards = {
            role: ModelShard(placed, self.context, self.context.groups.get(role, ShardGroups()))
            for role, placed in self.context.compiled.models.items()
            if rank in placed.ranks
        }

    def generate(self, layout: str, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Responses to this replica's share of the prompts, on its last stage, with advantages."""
        lengths = [len(prompt.tokens) + SAMPLING.max_new_tokens for prompt in prompts]
        share = self._share(layout, lengths, [prompt.id for prompt in prompts], GENERATION_TOKENS)
        microbatches = [[prompts[at] for at in places] for places in share]
        responses = self.shards[layout].generate(microbatches, SAMPLING, STOP_IDS)
        if not responses:
            return []
        flat = [prompt for microbatch in microbatches for prompt in microbatch]
        return [
            Rollout(
                id=prompt.id,
                prompt=tuple(prompt.tokens.tolist()),
                response=tuple(response.tokens.tolist()),
                log_probabilities=tuple(response.logprobs.tolist()),
                advantage=0.0,
            )
            for prompt, response in zip(flat, responses, strict=True)
        ]

    def train(self, layout: str, rollouts: Sequence[Rollout]) -> Update:
        """One optimizer step. What it returns counts on the rank that reports only."""
        store = self.context.store
        values = {
            "tokens": [torch.tensor(each.prompt + each.response) for each in rollouts],
            "loss_mask": [torch.arange(len(each.prompt) + len(each.response)) >= len(each.prompt) for each in rollouts],
            "log_probabilities": [
                torch.tensor([0.0] * len(each.prompt) + list(each.log_probabilities)) for each in rollouts
            ],
            "advantage": [torch.tensor([each.advantage]) for each in rollouts],
        }
        samples = describe(values, [each.id for each in rollouts])
        for key, tensors in values.items():
            for sequence, tensor in zip(samples.ids, tensors, strict=True):
                store.put(sequence, key, tensor)
        shard, algorithm = self.shards[layout], GroupRelativePolicy(LOSS)
        keys = LOSS.reads if shard.stage.is_last else ("tokens",)
        share = self._share(layout, samples.lengths("tokens"), samples.ids, TRAINING_TOKENS)
        microbatches = [store.microbatch(samples.select(places), keys, self.context.device) for places in share]
        statistics = shard.train(algorithm, microbatches)
        store.release(samples.ids)
        means = {name: mean.total / mean.weight for name, mean in statistics.items()}
        if not self.reports(layout):
            return Update(loss=0.0, gradient_norm=means["gradient_norm"], drift=0.0)
        return Update(loss=means["loss"], gradient_norm=means["gradient_norm"], drift=means["sampler_kl"])

    def reports(self, layout: str) -> bool:
        return self.shards[layout].owns_outputs

    def exchange(self, layout: str, own: Sequence[Rollout], prompts: Sequence[Prompt]) -> tuple[Rollout, ...]:
        """What all ranks drew, in the order of prompts, with advantages: this takes the master's place."""
        place = {prompt.id: at for at, prompt in enumerate(prompts)}
        if LAYOUTS[layout].num_workers == 1:
            return _with_advantages(sorted(own, key=lambda each: place[each.id]))
        tokens = torch.zeros(len(prompts), SAMPLING.max_new_tokens, dtype=torch.float64)
        numbers = torch.zeros_like(tokens)
        for each in own:
            count = len(each.response)
            tokens[place[each.id], :count] = torch.tensor(each.response, dtype=torch.float64) + 1  # 0: no token
            numbers[place[each.id], :count] = torch.tensor(each.log_probabilities, dtype=torch.float64)
        assert self.context.transfer is not None, "two workers have a group"
        self.context.transfer.all_reduce(tokens)
        self.context.transfer.all_reduce(numbers)
        rollouts = []
        for at, prompt in enumerate(prompts):
            count = int(tokens[at].count_nonzero())
            rollouts.append(
                Rollout(
                    id=prompt.id,
                    prompt=tuple(prompt.tokens.tolist()),
                    response=tuple(int(token) - 1 for token in tokens[at, :count].tolist()),
                    log_probabilities=tuple(numbers[at, :count].tolist()),
                    advantage=0.0,
                )
            )
        return _with_advantages(rollouts)

    def _share(self, layout: str, lengths: Sequence[int], ids: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Places of the sequences in each of this replica's microbatches, as the executor cuts them."""
        place = self.shards[layout].place
        return plan_microbatches(lengths, place.layout.dp, max_tokens, place.layout.pp, ids)[place.dp]


def sample_and_train(worker: Worker, num_steps: int) -> Report:
    """GRPO without a master, each layout on what it draws itself."""
    done: Report = {layout: [] for layout in worker.shards}
    for layout, steps in done.items():
        for step in range(num_steps):
            prompts = _prompts(step)
            rollouts = worker.exchange(layout, worker.generate(layout, prompts), prompts)
            steps.append(Step(rollouts=rollouts, updates=_updates(worker, layout, rollouts)))
    return {layout: steps for layout, steps in done.items() if worker.reports(layout)}


def replay(worker: Worker, recorded: Sequence[Step], offloads: bool = False) -> Report:
    """Every layout on the same recorded rollouts. `offloads`: shards are offloaded before each optimizer step."""
    done = {
        layout: [
            Step(rollouts=step.rollouts, updates=_updates(worker, layout, step.rollouts, offloads)) for step in recorded
        ]
        for layout in worker.shards
    }
    return {layout: steps for layout, steps in done.items() if worker.reports(layout)}


class TwoProcesses:
    """Runs a job in two processes at once, one a rank."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, job: Callable[..., Report], *arguments: object) -> Report:
        """What the ranks report, by layout. Raises what one of them raised."""
        store, port = host_store(ADDRESS)  # lives until both are done
        futures = [self._pool.submit(_run, job, rank, port, arguments) for rank in range(NUM_WORKERS)]
        reports = [future.result(timeout=120) for future in futures]
        del store
        return {layout: steps for report in reports for layout, steps in report.items()}


@contextmanager
def two_processes() -> Iterator[TwoProcesses]:
    with ProcessPoolExecutor(NUM_WORKERS, mp_context=forking()) as pool:
        yield TwoProcesses(pool)


def _run(job: Callable[..., Report], rank: int, port: int, arguments: tuple[object, ...]) -> Report:
    return job(Worker(rank, port), *arguments)


def lone_shard(layout: Layout, rank: int, is_trained: bool = True, device: torch.device | None = None) -> ModelShard:
    """Rank's shard of a model in this layout, which knows no other worker."""
    return shard_of(layout, OPTIMIZER if is_trained else None, rank=rank, device=device)


def shard_of(
    layout: Layout,
    optimizer: Optimizer | None,
    dtype: Precision = Precision.FLOAT32,
    rank: int = 0,
    device: torch.device | None = None,
) -> ModelShard:
    """As `lone_shard`, with any optimizer (None: it is not trained) and of any type."""
    context = WorkerContext(
        rank=rank,
        num_workers=layout.num_workers,
        device=device or torch.device("cpu"),
        compiled=_compiled(),
        name="lone",
        address=ADDRESS,
    )
    placed = PlacedModel(model=replace(MODEL, layout=layout, dtype=dtype), optimizer=optimizer, field="actor")
    return ModelShard(placed, context, ShardGroups())


def _compiled() -> CompiledExperiment:
    nothing = GRPO(
        actor=MODEL,
        prompts=Dataset(path=Path("none")),
        reward=Reward(function="none"),
        sampling=SAMPLING,
        run=RunOptions(name="shards", seed=3, deadlines=Deadlines(setup_s=60.0, call_s=60.0)),
    )
    models = {
        role: PlacedModel(model=replace(MODEL, layout=layout), optimizer=OPTIMIZER, field="actor")
        for role, layout in LAYOUTS.items()
    }
    compiled = nothing.compile()
    graph = Graph("shards", (generate_call("one", MODEL, SAMPLING, 1, GENERATION_TOKENS),), PROMPT_KEYS)
    return replace(compiled, models=models, training=replace(compiled.training, graph=graph))


def _prompts(step: int) -> list[Prompt]:
    """New ones for each step, of 2 to 6 digits."""
    generator = torch.Generator().manual_seed(step)
    prompts = []
    for place in range(NUM_PROMPTS):
        length = 2 + (place + step) % 5
        tokens = torch.randint(3, TINY_MODEL["vocab_size"], (length,), generator=generator)
        prompts += [Prompt(f"prompts/{step}/{place}/{copy}", tokens) for copy in range(GROUP_SIZE)]
    return prompts


def _with_advantages(rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
    """The reward is the share of tokens with odd ids."""
    rewards = {each.id: sum(token % 2 for token in each.response) / len(each.response) for each in rollouts}
    advantages, _ = group_advantages(rewards, normalise_by_std=True)
    return tuple(replace(each, advantage=advantages[each.id]) for each in rollouts)


def _updates(worker: Worker, layout: str, rollouts: Sequence[Rollout], offloads: bool = False) -> tuple[Update, ...]:
    size, updates = len(rollouts) // NUM_MINIBATCHES, []
    for start in range(0, len(rollouts), size):
        if offloads:
            worker.shards[layout].offload()
        updates.append(worker.train(layout, rollouts[start : start + size]))
    return tuple(updates)
