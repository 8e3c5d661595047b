"""The executor against workers that are a table of answers; with real ones it runs in `tests/integration`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.config import Dataset, Layout, Model, RunOptions
from trainmaster.api.errors import RunError
from trainmaster.api.experiments.base import CompiledExperiment
from trainmaster.api.experiments.grpo import GRPO
from trainmaster.api.graph import FunctionCall, Graph
from trainmaster.api.hooks import Offload, Reshard
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling
from trainmaster.system.executor import Executor
from trainmaster.system.rpc.commands import (
    CallDone,
    CallFunction,
    CallModel,
    Command,
    Done,
    FunctionDone,
    Mean,
    Redistribute,
    Release,
    Save,
    ShardFile,
)
from trainmaster.system.rpc.messages import Lane, Success
from trainmaster.system.rpc.peer import Answer, Asked
from trainmaster.system.storage import Storage

NUM_WORKERS, GROUP = 4, 4


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:  # Any: whatever fixtures give
        asyncio.run(test(**arguments))

    return run


def compiled(minibatches: int = 1, **run: Any) -> CompiledExperiment:  # Any: fields of RunOptions
    """dp=2 x pp=2: workers 1 and 3 have the last stages."""
    model = Model(config={"model_type": "qwen3"}, tokenizer="tokenizer", layout=Layout(dp=2, pp=2))
    return GRPO(
        actor=model,
        prompts=Dataset(path="prompts.jsonl"),
        reward=Reward(function="exact_match"),
        sampling=Sampling(max_new_tokens=4),
        batch_size=4,
        group_size=GROUP,
        minibatches=minibatches,
        kl_coefficient=0.1,
        run=RunOptions(name="test", **run),
    ).compile()


def prompts(num_groups: int = 4, step: int = 1) -> Samples:
    ids = tuple(f"prompts/{step}/{row}/{copy}" for row in range(num_groups) for copy in range(GROUP))
    return Samples(ids=ids, keys={"prompt": column(len(ids), 3)})


def column(count: int, length: int) -> KeyColumn:
    return KeyColumn(dtype="int64", lengths=np.full(count, length, np.int32))


@dataclass(frozen=True)
class Said:
    """A request that came to a worker."""

    rank: int
    command: Command
    lane: Lane
    step: int
    name: str
    pre_hooks: tuple[Any, ...]
    post_hooks: tuple[Any, ...]


@dataclass
class Workers:
    """In place of the server: answers each request a few turns of the loop later."""

    graph: Graph
    said: list[Said] = field(default_factory=list)
    fails: Callable[[Said], bool] = lambda _: False
    drops: tuple[str, ...] = ()
    num_open: int = 0

    def __post_init__(self) -> None:
        registers = [SimpleNamespace(register=SimpleNamespace(host="here")) for _ in range(NUM_WORKERS)]
        self.roster = SimpleNamespace(by_rank=registers)
        self.lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def probe(self) -> None:
        """Nobody is lost."""

    def ask(
        self,
        commands: dict[int, Command],
        *,
        name: str,
        deadline_s: float,
        lane: Lane = Lane.COMPUTE,
        step: int = 0,
        pre_hooks: tuple[Any, ...] = (),
        post_hooks: tuple[Any, ...] = (),
    ) -> Asked:
        loop = asyncio.get_running_loop()
        asked = Asked(loop, len(self.said), name, step, loop.time(), deadline_s, lambda *_: None)
        asked.wait_for({rank: SimpleNamespace(pending={}, lost=None) for rank in commands}, 0.0)
        for rank, command in commands.items():
            said = Said(rank, command, lane, step, name, pre_hooks, post_hooks)
            self.said.append(said)
            loop.call_later(0.001, self._answer, said, asked)
            self.num_open += 1
        return asked

    def tell(self, commands: dict[int, Command], deadline_s: float, lane: Lane) -> None:
        self.said += [Said(rank, command, lane, 0, "", (), ()) for rank, command in commands.items()]

    def _answer(self, said: Said, asked: Asked) -> None:
        self.num_open -= 1
        if asked.done():
            return
        if self.fails(said):
            asked.fail(said.rank, RunError(f"{said.name} on {said.rank} failed"))
            return
        files = tuple(ShardFile(file=f"{said.rank}") for hook in said.post_hooks if isinstance(hook, Save))
        success = Success(result=self._result(said), files=files)
        asked.answer(said.rank, Answer(success, {said.command.type: 1.0}))

    def _result(self, said: Said) -> CallDone | FunctionDone | Done:
        match said.command:
            case CallModel(call=name, samples=samples):
                ids = samples.ids
                keys = {key: column(len(ids), 7) for key in self.graph.call(name).outputs}
                outputs = Samples(ids=ids, keys=keys) if keys and said.rank % 2 else None
                return CallDone(statistics={"loss": Mean(total=2.0, weight=2.0)}, version=1, outputs=outputs)
            case CallFunction(call=name, samples=samples):
                kept = tuple(each for each in samples.ids if each not in self.drops)
                keys = {key: column(len(kept), 1) for key in self.graph.call(name).outputs}
                outputs = Samples(ids=kept, keys=keys)
                dropped = tuple(each for each in samples.ids if each in self.drops)
                return FunctionDone(statistics={}, outputs=outputs, dropped=dropped, failures=(), examples=())
            case _:
                return Done()

    def of(self, kind: type[Command], call: str | None = None) -> list[Said]:
        return [
            each
            for each in self.said
            if isinstance(each.command, kind) and (call is None or getattr(each.command, "call", None) == call)
        ]


def make(experiment: CompiledExperiment, max_steps_ahead: int = 0) -> tuple[Executor, Workers, Storage]:
    graph = experiment.training.graph
    workers, storage = Workers(graph), Storage()
    where = "step {} of this test".format
    return Executor(graph, experiment, workers, storage, max_steps_ahead, where), workers, storage


@on_a_loop
async def test_a_step_moves_data_calls_models_and_frees_everything():
    executor, workers, storage = make(compiled())
    samples = prompts()
    storage.add(0, samples)
    async with executor:
        traversal = await executor.admit(1, samples)
    assert traversal.num_sequences == 16
    assert traversal.num_read == dict.fromkeys(("generate", "reward", "reference", "train"), 16)
    assert set(traversal.lags.values()) == {0}
    assert traversal.num_tokens == 16 * 7
    assert traversal.seconds["train"] == {"redistribute": 1.0, "call_model": 1.0}
    released = [each for said in workers.of(Release) for each in said.command.ids]
    assert set(released) == set(samples.ids)
    assert (len(storage), workers.num_open) == (0, 0)


@on_a_loop
async def test_data_is_moved_on_the_transfer_lane_before_a_call_starts():
    executor, workers, storage = make(compiled())
    samples = prompts()
    storage.add(0, samples)
    async with executor:
        await executor.admit(1, samples)
    kinds = [type(said.command) for said in workers.said]
    assert kinds[: kinds.index(CallModel)] == [Redistribute] * NUM_WORKERS, "all but the first stage of 0 lack prompts"
    assert {said.lane for said in workers.of(Redistribute)} == {Lane.TRANSFER}
    assert {said.step for said in workers.of(CallModel)} == {1}
    received = [said.command.receives for said in workers.of(Redistribute)]
    cells = [
        (said.rank, key, sequence)
        for said, parcels in zip(workers.of(Redistribute), received, strict=True)
        for parcel in parcels
        for block in parcel.blocks
        for key in block.keys
        for sequence in block.ids
    ]
    assert len(set(cells)) == len(cells), "nothing is moved to a worker twice"


@on_a_loop
async def test_stages_get_the_share_of_their_replica():
    executor, workers, storage = make(compiled())
    storage.add(0, prompts())
    async with executor:
        await executor.admit(1, prompts())
    shares = {said.rank: list(said.command.samples.ids) for said in workers.of(CallModel, "train")}
    assert (shares[0], shares[2]) == (shares[1], shares[3])
    assert sorted(shares[0] + shares[2]) == sorted(prompts().ids)


@on_a_loop
async def test_hooks_stand_around_the_first_and_the_last_request():
    experiment = compiled(minibatches=2, steps=1)
    graph = experiment.training.graph
    before, after = Offload(model="reference"), Reshard(source="actor", target="reference", eta=0.5)
    save = Save(model="actor", directory="aside")
    train = replace(graph.call("train"), pre_hooks=(before,), post_hooks=(after,), passes=2)
    calls = tuple(train if call.name == "train" else call for call in graph.calls)
    experiment = replace(
        experiment, training=replace(experiment.training, graph=Graph("grpo", calls, ("prompt",), GROUP))
    )
    executor, workers, storage = make(experiment)
    storage.add(0, prompts())
    async with executor:
        traversal = await executor.admit(1, prompts(), {"train": save})
    of_one = [(said.pre_hooks, said.post_hooks) for said in workers.of(CallModel, "train") if said.rank == 3]
    assert of_one == [((before,), ()), ((), ()), ((), ()), ((), (after, save))], "two minibatches, twice"
    assert [file.file for file in traversal.files] == ["0", "1", "2", "3"]


@on_a_loop
async def test_a_later_pass_moves_nothing_again():
    experiment = compiled(minibatches=2)
    executor, workers, storage = make(experiment)
    storage.add(0, prompts())
    async with executor:
        await executor.admit(1, prompts())
    names = [said.name for said in workers.of(Redistribute)]
    assert names.count("data for train") <= NUM_WORKERS, "one move for all minibatches and passes"


@on_a_loop
async def test_steps_ahead_are_in_flight_at_once_and_say_how_far_they_lag():
    executor, workers, storage = make(compiled(), max_steps_ahead=1)
    traversals = []
    async with executor:
        for step in (1, 2):
            storage.add(0, prompts(step=step))
            traversals.append(executor.admit(step, prompts(step=step)))
        assert not executor.has_room
        await asyncio.gather(*traversals)
    assert [set(each.result().lags.values()) for each in traversals] == [{0}, {1}]
    trained = [said.step for said in workers.of(CallModel, "train") if said.rank == 0]
    assert trained == [1, 2]
    assert len(storage) == 0


@on_a_loop
async def test_what_was_dropped_is_not_trained_on_and_too_little_is_skipped_but_saved():
    executor, workers, storage = make(compiled())
    samples = prompts()
    storage.add(0, samples)
    workers.drops = samples.ids[1:]
    save = Save(model="actor", directory="aside")
    async with executor:
        traversal = await executor.admit(1, samples, {"train": save})
    assert traversal.num_read["train"] == 1
    assert traversal.skipped == ["train"], "one sequence is not enough for two replicas"
    assert workers.of(CallModel, "train") == []
    assert len(traversal.files) == NUM_WORKERS
    assert len(storage) == 0


@on_a_loop
async def test_what_a_skipped_call_would_have_read_is_missed_by_those_that_wait_for_its_outputs():
    experiment = compiled()
    reference = experiment.training.graph.call("reference")
    calls = [call for call in experiment.training.graph.calls if call.name != "reference"]
    after_reward = replace(reference, inputs=(*reference.inputs, "reward"))
    graph = Graph("grpo", (*calls, after_reward), ("prompt",), GROUP)
    executor, workers, storage = make(replace(experiment, training=replace(experiment.training, graph=graph)))
    storage.add(0, prompts())
    workers.drops = prompts().ids[1:]
    async with executor:
        traversal = await executor.admit(1, prompts())
    assert traversal.skipped == ["reference", "train"]
    assert (traversal.num_read["reference"], traversal.num_read["train"]) == (1, 0)
    assert len(storage) == 0


@on_a_loop
async def test_outputs_of_a_minibatch_are_scored_while_the_next_is_generated():
    experiment = compiled()
    calls = []
    for call in experiment.training.graph.calls:
        if call.name == "generate":
            call = replace(call, minibatch_size=4)
        elif isinstance(call, FunctionCall):
            call = replace(call, batch_size=4)
        calls.append(call)
    graph = Graph("grpo", tuple(calls), ("prompt",), GROUP)
    executor, workers, storage = make(replace(experiment, training=replace(experiment.training, graph=graph)))
    storage.add(0, prompts())
    async with executor:
        traversal = await executor.admit(1, prompts())
    assert [len(said.command.samples) for said in workers.of(CallFunction)] == [4, 4, 4, 4]
    assert traversal.num_read["reward"] == 16


@pytest.mark.parametrize("name", ["data for generate", "call generate", "call reward", "call train"])
@on_a_loop
async def test_the_first_failure_ends_all_and_says_where_it_was(name: str):
    executor, workers, storage = make(compiled())
    storage.add(0, prompts())
    workers.fails = lambda said: said.name == name
    with pytest.raises(ExceptionGroup) as raised:
        async with executor:
            await executor.admit(3, prompts())
    (error,) = raised.value.exceptions
    assert isinstance(error, RunError)
    if name != "release":
        assert error.__notes__ == ["step 3 of this test"]


@on_a_loop
async def test_models_are_saved_as_they_are():
    executor, workers, _ = make(compiled())
    async with executor:
        files = await executor.save(5, {"train": Save(model="actor", directory="aside")})
    assert len(files) == NUM_WORKERS
    assert {said.step for said in workers.said} == {5}
