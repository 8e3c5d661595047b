"""Layouts against each other, stage by stage in real processes: the same draws, and the same losses on the same draws.
Then what a shard does by itself: it moves towards another, and to the host's memory and back.

Generation and training are checked apart: a run trains each layout on its own draws, where one token that falls to the
other side of a rounded boundary changes all that follows; a replay trains all of them on the draws of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from shards import (
    LAYOUTS,
    NUM_MINIBATCHES,
    SAMPLING,
    STOP_IDS,
    Report,
    Rollout,
    TwoProcesses,
    lone_shard,
    replay,
    sample_and_train,
    two_processes,
)
from torch import Tensor
from trainmaster.api.config import Layout
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models.attention import PackedBatch
from trainmaster.workers.pipeline.generation import Prompt
from trainmaster.workers.shard import ModelShard

NUM_STEPS = 6
TOLERANCE = 1e-5
MIN_AGREEMENT = 0.99
OTHERS = [layout for layout in LAYOUTS if layout != "one"]


@pytest.fixture(scope="module")
def processes() -> Iterator[TwoProcesses]:
    with two_processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def runs(processes: TwoProcesses) -> Report:
    return processes.run(sample_and_train, NUM_STEPS)


@pytest.fixture(scope="module")
def replays(processes: TwoProcesses, runs: Report) -> Report:
    return processes.run(replay, runs["one"])


@dataclass
class Agreement:
    """Of tokens that two layouts drew after the same ones."""

    num_tokens: int = 0
    """That the first layout drew, those after a difference too."""
    num_agreeing: int = 0
    """The same, with log-probabilities within the tolerance."""
    largest_difference: float = 0.0
    """Between log-probabilities of the same token."""

    def add(self, one: Rollout, other: Rollout) -> None:
        assert (one.id, one.prompt) == (other.id, other.prompt)
        self.num_tokens += len(one.response)
        for at, (token, peer) in enumerate(zip(one.response, other.response, strict=False)):
            difference = abs(one.log_probabilities[at] - other.log_probabilities[at])
            if difference <= TOLERANCE:
                assert token == peer, f"token {at} of {one.id}: as likely in both layouts, and not the same"
                self.num_agreeing += 1
            if token != peer:
                return  # what follows has another history
            self.largest_difference = max(self.largest_difference, difference)


@pytest.mark.parametrize("layout", OTHERS)
def test_the_same_tokens_are_drawn_wherever_log_probabilities_agree(runs: Report, layout: str) -> None:
    agreement = Agreement()
    for one, other in zip(runs["one"], runs[layout], strict=True):
        for pair in zip(one.rollouts, other.rollouts, strict=True):
            agreement.add(*pair)
    share = agreement.num_agreeing / agreement.num_tokens
    print(
        f"{layout}: {agreement.num_agreeing} of {agreement.num_tokens} tokens ({share:.2%}) agree over {NUM_STEPS} "
        f"steps; log-probabilities differ by {agreement.largest_difference:.1e} at most"
    )
    assert agreement.num_tokens > 1000
    assert share >= MIN_AGREEMENT


@pytest.mark.parametrize("layout", OTHERS)
def test_a_replay_of_recorded_rollouts_gives_equal_losses_and_gradient_norms(replays: Report, layout: str) -> None:
    one, other = ([update for step in replays[name] for update in step.updates] for name in ("one", layout))
    assert len(one) == len(other) == NUM_STEPS * NUM_MINIBATCHES
    # a loss is a mean of terms of about 1 that may cancel to nearly 0: what is left has no 1e-5 of itself
    for field, floor in (("loss", 1e-6), ("gradient_norm", 0.0)):
        wanted = [getattr(update, field) for update in one]
        got = [getattr(update, field) for update in other]
        differences = [abs(a - b) for a, b in zip(wanted, got, strict=True)]
        parts = [difference / abs(a) for a, difference in zip(wanted, differences, strict=True)]
        print(
            f"{layout}: {field} differs by {max(differences):.1e}, or {max(parts):.1e} of itself, at most over "
            f"{len(wanted)} optimizer steps; its size is {min(map(abs, wanted)):.1e} to {max(map(abs, wanted)):.1e}"
        )
        assert got == pytest.approx(wanted, rel=TOLERANCE, abs=floor), field


def test_a_replay_repeats_the_run_that_was_recorded(runs: Report, replays: Report) -> None:
    assert replays["one"] == runs["one"], "to the bit: tokens and log-probabilities lose nothing on the way"


def test_shards_that_are_offloaded_between_steps_train_as_if_they_were_not(
    processes: TwoProcesses, runs: Report, replays: Report
) -> None:
    assert processes.run(replay, runs["one"], True) == replays


def test_what_is_compared_says_something(runs: Report) -> None:
    updates = [update for step in runs["one"] for update in step.updates]
    assert all(math.isfinite(update.loss) and update.gradient_norm > 0.1 for update in updates)
    assert max(abs(update.drift) for update in updates) > 1e-3, "second minibatches are off the sampling policy"
    assert all(abs(update.drift) < TOLERANCE for update in updates[::NUM_MINIBATCHES]), "and first ones are on it"
    lengths = {len(rollout.response) for step in runs["one"] for rollout in step.rollouts}
    assert len(lengths) > 5
    assert len({rollout.response for rollout in runs["one"][0].rollouts}) > 20, "draws vary"


# -- one shard by itself ----------------------------------------------------------------------------------------------


def tensors(shard: ModelShard) -> dict[str, Tensor]:
    """Copies of its weights, on the CPU."""
    named = {**dict(shard.stage.named_parameters()), **dict(shard.stage.named_buffers())}
    return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}


def disturb(shard: ModelShard, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shard.stage.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_every_worker_moves_its_own_shard_towards_the_source(eta: float) -> None:
    layout, names = Layout(dp=2, pp=2), []
    for rank in range(layout.num_workers):
        source, target = lone_shard(layout, rank), lone_shard(layout, rank, is_trained=False)
        assert (source.place.dp, source.place.pp) == divmod(rank, 2)
        disturb(source, seed=rank)
        source.version = 7
        given, before = tensors(source), tensors(target)
        target.move_towards(source, eta)
        assert target.version == 7
        after = tensors(target)
        for name, tensor in after.items():
            wanted = eta * given[name].double() + (1 - eta) * before[name].double()
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)
            assert eta < 1 or tensor.equal(given[name]), name
        assert all(tensor.equal(given[name]) for name, tensor in tensors(source).items())
        assert not any(parameter.equal(before[name]) for name, parameter in target.stage.named_parameters())
        names.append(set(after))
    assert names[0] == names[2]
    assert names[1] == names[3]
    assert names[0] != names[1], "stages have parameters of their own"


def microbatch(device: torch.device) -> Microbatch:
    tokens = torch.tensor([[3, 9, 4, 11, 7, 5, 12]])
    return Microbatch(
        tokens=tokens.to(device),
        packed=PackedBatch((4, 3), device),
        keys={"loss_mask": torch.tensor([False, True, True, True, False, True, True], device=device)},
    )


def train(shard: ModelShard) -> float:
    loss = shard.train(SupervisedFineTuning(), [microbatch(shard.device)])["loss"]
    return loss.total / loss.weight


def test_train_offload_train_is_train_train() -> None:
    plain, offloaded = lone_shard(Layout(), 0), lone_shard(Layout(), 0)
    losses = []
    for _ in range(3):
        losses.append(train(plain))
        assert train(offloaded) == losses[-1]
        offloaded.offload()
    assert losses[-1] < losses[0] - 0.01
    wanted = tensors(plain)
    assert all(tensor.equal(wanted[name]) for name, tensor in tensors(offloaded).items())


@pytest.mark.parametrize("use", ["train", "infer", "generate", "target", "source"])
def test_whatever_uses_a_shard_brings_it_back(use: str) -> None:
    shard, other = lone_shard(Layout(), 0, is_trained=use != "target"), lone_shard(Layout(), 0, is_trained=False)
    shard.offload()
    assert shard.is_offloaded
    match use:
        case "train":
            train(shard)
        case "infer":
            shard.infer(SupervisedFineTuning(), [microbatch(shard.device)])
        case "generate":
            shard.generate([[Prompt("d/0/0/0", torch.tensor([3, 4]))]], SAMPLING, STOP_IDS)
        case "target":
            shard.move_towards(other, 0.5)
        case "source":
            other.move_towards(shard, 0.5)
    assert not shard.is_offloaded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloading_gives_the_devices_memory_back_until_the_shard_is_used() -> None:
    device = torch.device("cuda")
    plain, shard = lone_shard(Layout(), 0, device=device), lone_shard(Layout(), 0, device=device)
    for each in (plain, shard):
        train(each)
    full, weights = torch.cuda.memory_allocated(device), tensors(shard)
    kept = 4 * sum(parameter.nbytes for parameter in shard.stage.parameters())  # gradients and two moments besides
    shard.offload()
    assert torch.cuda.memory_allocated(device) <= full - kept
    assert {parameter.device.type for parameter in shard.stage.parameters()} == {"cpu"}
    assert all(tensor.equal(weights[name]) for name, tensor in tensors(shard).items())
    shard.restore()
    assert abs(torch.cuda.memory_allocated(device) - full) < kept / 100
    shard.offload()
    assert train(shard) == pytest.approx(train(plain), rel=1e-5)
    wanted = tensors(plain)
    for name, tensor in tensors(shard).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)
