"""A worker's requests from first to last, with neither master nor wire: what hooks around calls do to models."""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainmaster.api.algorithms import LogProbabilities, SupervisedLoss
from trainmaster.api.batch import Samples
from trainmaster.api.config import Dataset, Model, Optimizer, RunOptions
from trainmaster.api.experiment_file import LoadedExperiment
from trainmaster.api.experiments.base import CompiledExperiment, FedGraph, PlacedModel
from trainmaster.api.experiments.sft import SFT
from trainmaster.api.graph import CallKind, Graph, Microbatching, ModelFunctionCall
from trainmaster.system.rpc.commands import (
    CallDone,
    CallModel,
    Command,
    Echo,
    Echoed,
    Fetch,
    Fetched,
    Hook,
    LoadModel,
    Offload,
    OpenDataset,
    Release,
    Reshard,
    Save,
)
from trainmaster.system.rpc.messages import Failure, Lane, Reply, Request, Success, Welcome
from trainmaster.workers.handlers import Handlers
from trainmaster.workers.memory import Room
from trainmaster.workers.service import Worker
from trainmaster.workers.tally import Tally
from workbench import TINY_MODEL

KEYS = ("tokens", "loss_mask")
SIZES = {"batch_size": 4, "minibatch_size": 4, "microbatching": Microbatching(max_tokens=64)}
TRAIN = ModelFunctionCall(
    name="train", model="actor", kind=CallKind.TRAIN_STEP, settings=SupervisedLoss(), inputs=KEYS, **SIZES
)
SCORE = ModelFunctionCall(
    name="score",
    model="reference",
    kind=CallKind.INFERENCE,
    settings=LogProbabilities(temperature=1.0),
    inputs=KEYS,
    outputs=("scores",),
    output_remap={"log_probabilities": "scores"},
    **SIZES,
)
WELCOME = Welcome(
    run="test",
    epoch=1,
    rank=0,
    num_workers=1,
    num_local_workers=1,
    overrides=(),
    experiment_digest="",
    log_directory="",
    orphan_s=1.0,
    silence_s=1.0,
)


class FakeClient:
    """Asks what it was made with, and keeps the replies."""

    current = WELCOME
    on_epoch = None

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests, self.replies = list(requests), list[Reply]()

    def next_request(self, lane: Lane) -> tuple[Request, float] | None:
        return (self._requests.pop(0), 60.0) if lane is Lane.COMPUTE and self._requests else None

    def reply(self, reply: Reply) -> None:
        self.replies.append(reply)


class FakeAlarm:
    def within(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Bench:
    """One worker with two models of the same start, of which one is trained."""

    def __init__(self, folder: Path) -> None:
        model = Model(config=TINY_MODEL, tokenizer=folder / "tokenizer")
        data = Dataset(path=folder / "train.jsonl")
        run = RunOptions(threads=1)
        compiled = CompiledExperiment(
            run=run,
            models={
                "actor": PlacedModel(model=model, field="actor", optimizer=Optimizer(learning_rate=0.1)),
                "reference": PlacedModel(model=model, field="reference"),
            },
            training=FedGraph(graph=Graph("g", (TRAIN, SCORE), KEYS), dataset=data, dataset_field="dataset"),
        )
        loaded = LoadedExperiment(
            file=folder / "experiment.py",
            overrides=(),
            experiment=SFT(model=model, dataset=data, run=run),
            compiled=compiled,
            code_digest="",
            experiment_digest="",
        )
        self.folder, self._handlers = folder, Handlers(WELCOME, loaded, "127.0.0.1")
        self._num_saves = 0
        for command in (LoadModel(model="actor"), LoadModel(model="reference"), OpenDataset(graph="g")):
            self.ask(command)
        fetched, _ = self.ask(Fetch(graph="g", start=0, count=4))
        assert isinstance(fetched.result, Fetched)
        self.samples: Samples = fetched.result.samples

    def ask(
        self, command: Command, pre_hooks: tuple[Hook, ...] = (), post_hooks: tuple[Hook, ...] = ()
    ) -> tuple[Success, dict[str, float]]:
        """The outcome of one request, and its times."""
        request = Request(
            run="test",
            epoch=1,
            id=1,
            lane=Lane.COMPUTE,
            deadline_s=60.0,
            submitted_s=0.0,
            command=command,
            pre_hooks=pre_hooks,
            post_hooks=post_hooks,
        )
        client = FakeClient([request])
        Worker(client, lambda welcome: self._handlers, FakeAlarm(), Tally(client)).run()  # type: ignore[arg-type]
        (reply,) = client.replies
        assert isinstance(reply.outcome, Success), reply.outcome
        return reply.outcome, reply.seconds

    def call(
        self, name: str, pre_hooks: tuple[Hook, ...] = (), post_hooks: tuple[Hook, ...] = ()
    ) -> tuple[CallDone, dict[str, float]]:
        success, seconds = self.ask(
            CallModel(graph="g", call=name, samples=self.samples, sizes=(len(self.samples),)), pre_hooks, post_hooks
        )
        assert isinstance(success.result, CallDone)
        return success.result, seconds

    def weights(self, role: str) -> dict[str, Tensor]:
        self._num_saves += 1
        directory = self.folder / f"save-{self._num_saves}"
        success, _ = self.ask(Release(ids=()), post_hooks=(Save(model=role, directory=str(directory)),))
        (file,) = success.files
        return load_file(directory / file.file)


@pytest.fixture
def bench(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return Bench(tmp_path)


def test_a_save_writes_the_optimizer_too_if_it_is_asked_to(bench: Bench) -> None:
    bench.call("train")
    directory = bench.folder / "saved"
    save = Save(model="actor", directory=str(directory), with_optimizer=True)
    success, _ = bench.ask(Release(ids=()), post_hooks=(save,))
    assert [file.file for file in success.files] == ["model.safetensors", "optimizer/00001-of-00001.safetensors"]
    for file in success.files:
        assert file.sha256 == hashlib.sha256((directory / file.file).read_bytes()).hexdigest()
    weights, state = (load_file(directory / file.file) for file in success.files)
    assert state.keys() == {f"{name}.{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}


def test_resharding_after_a_training_copies_its_weights_and_their_version(bench: Bench) -> None:
    before = bench.weights("reference")
    assert bench.call("score")[0].version == 0
    trained, seconds = bench.call("train", post_hooks=(Reshard(source="actor", target="reference"),))
    assert trained.version == 1
    assert "reshard" in seconds
    actor, reference = bench.weights("actor"), bench.weights("reference")
    assert actor.keys() == reference.keys() == before.keys()
    for name, tensor in reference.items():
        assert tensor.equal(actor[name]), name
        assert not tensor.equal(before[name]), name
    scored, _ = bench.call("score")
    assert scored.version == 1
    assert scored.outputs is not None
    assert set(scored.outputs.keys) == {"scores"}


def test_a_reference_follows_as_a_moving_average(bench: Bench) -> None:
    wanted = {name: tensor.double() for name, tensor in bench.weights("reference").items()}
    for version in (1, 2):
        done, _ = bench.call("train", post_hooks=(Reshard(source="actor", target="reference", eta=0.3),))
        assert done.version == version
        actor = bench.weights("actor")
        wanted = {name: 0.3 * actor[name].double() + 0.7 * tensor for name, tensor in wanted.items()}
    for name, tensor in bench.weights("reference").items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-7, msg=name)
    assert bench.call("score")[0].version == 2


def test_a_hook_before_a_call_comes_before_it(bench: Bench) -> None:
    bench.call("train")
    scored, _ = bench.call("score", pre_hooks=(Reshard(source="actor", target="reference"),))
    assert scored.version == 1


def test_offloading_is_invisible(bench: Bench) -> None:
    offloads = (Offload(model="actor"), Offload(model="reference"))
    for _ in range(2):
        _, seconds = bench.call("train", pre_hooks=offloads, post_hooks=offloads)
        assert "offload" in seconds
        bench.ask(Release(ids=()), post_hooks=(Reshard(source="actor", target="reference", eta=0.5), *offloads))
    got = {role: bench.weights(role) for role in ("actor", "reference")}
    done = bench.call("score", post_hooks=offloads)[0]
    other = Bench(bench.folder)
    for _ in range(2):
        other.call("train", post_hooks=(Reshard(source="actor", target="reference", eta=0.5),))
    for role, weights in got.items():
        for name, tensor in other.weights(role).items():
            assert tensor.equal(weights[name]), f"{name} of {role}"
    assert done == other.call("score")[0]


def test_hooks_of_models_that_are_elsewhere_do_nothing_here(bench: Bench) -> None:
    before = bench.weights("actor")
    hooks = (Reshard(source="there", target="elsewhere"), Offload(model="elsewhere"))
    bench.ask(Release(ids=()), post_hooks=hooks)
    assert all(tensor.equal(before[name]) for name, tensor in bench.weights("actor").items())


class Epoch:
    """What handlers are to a worker, in a cycle as models are."""

    num_stored = 0

    def __init__(self) -> None:
        self.itself = self

    def execute(self, command: Echo, step: int) -> Echoed:
        return Echoed(text=command.text)

    def close(self) -> None:
        pass


def test_what_an_epoch_held_is_let_go_of_before_the_next_is_set_up() -> None:
    requests = [
        Request(run="test", epoch=epoch, id=epoch, lane=Lane.COMPUTE, deadline_s=60.0, submitted_s=0.0, command=Echo())
        for epoch in (1, 2)
    ]
    client, earlier = FakeClient(requests), list[weakref.ref[Epoch]]()
    num_alive = []

    def set_up(_welcome: Welcome) -> Epoch:
        Room.on(torch.device("cpu"), 1)  # as handlers do
        num_alive.append(sum(each() is not None for each in earlier))
        made = Epoch()
        earlier.append(weakref.ref(made))
        return made

    Worker(client, set_up, FakeAlarm(), Tally(client)).run()  # type: ignore[arg-type]
    assert [type(reply.outcome) for reply in client.replies] == [Success, Success]
    assert num_alive == [0, 0]


class FakeHandlers:
    """Has done nothing but echo."""

    num_stored = 0

    def execute(self, command: Command, step: int) -> Echoed:
        if isinstance(command, Release):
            raise ValueError("there is nothing to release")
        return Echoed()


def test_replies_to_a_silent_request_say_so():
    def asked(command: Command) -> FakeClient:
        request = Request(
            run="test", epoch=1, id=3, lane=Lane.COMPUTE, deadline_s=60, submitted_s=0, command=command, is_silent=True
        )
        client = FakeClient([request])
        Worker(client, lambda welcome: FakeHandlers(), FakeAlarm(), Tally(client)).run()  # type: ignore[arg-type, return-value]
        return client

    (reply,) = asked(Echo()).replies
    assert (reply.id, reply.is_unasked, reply.outcome) == (3, True, Success(result=Echoed()))
    (reply,) = asked(Release(ids=("a",))).replies
    assert isinstance(reply.outcome, Failure)
    assert (reply.id, reply.is_unasked, reply.outcome.message) == (3, True, "there is nothing to release")
    assert "release" in reply.seconds
