"""What goes wrong in the middle of a program, in real processes: it is named, nobody hangs, and what follows works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
from pipelines import ADDRESS, Case, Pool, make_context, make_shard, microbatch, outcome, processes
from torch import Tensor
from trainmaster.api.config import Layout, NaNPolicy, Schedule
from trainmaster.api.errors import PeerLost, ProgramError, RunError, TrainmasterError
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.algorithms.statistics import Statistics
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models.stage import Stage
from trainmaster.workers.parallel.groups import host_store
from trainmaster.workers.shard import ModelShard

PIPELINE = Case(layout=Layout(pp=2))


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with processes() as pool:
        yield pool


@dataclass(frozen=True)
class Faulty(SupervisedFineTuning):
    """Makes a loss of this factor where a sequence of this id is."""

    sequence: str
    factor: float

    def loss(self, stage: Stage, hidden: Tensor, microbatch: Microbatch, statistics: Statistics) -> Tensor:
        loss = super().loss(stage, hidden, microbatch, statistics)
        return loss * self.factor if self.sequence in microbatch.ids else loss


def tried(shard: ModelShard, algorithm: SupervisedFineTuning, case: Case) -> tuple[str, str, str]:
    """Class, message and notes of the error."""
    try:
        shard.train(algorithm, case.share(shard.place.dp, 0))
    except TrainmasterError as error:
        return type(error).__name__, str(error), " ".join(getattr(error, "__notes__", ()))
    return "", "", ""


# -- a rank that raises ----------------------------------------------------------------------------------------------


def break_in_the_third_forward(stage: Stage) -> None:
    forward, called = stage.forward, []

    def fails(*arguments: Any) -> Tensor:
        called.append(arguments)
        if len(called) == 3:
            raise ValueError("the third one is bad")
        return forward(*arguments)

    stage.forward = fails


def break_and_go_on(rank: int, port: int, second_port: int, case: Case) -> tuple[Any, float, float]:
    """Of rank 1's break: what this rank raised, how long that took, and the loss of a training in new groups."""
    context = make_context(case, rank)
    context.join_groups(ADDRESS, port)
    shard = ModelShard(context.compiled.models["model"], context, context.groups["model"])
    if rank == 1:
        break_in_the_third_forward(shard.stage)
    start_s = time.monotonic()
    failure = tried(shard, SupervisedFineTuning(), replace(case, num_microbatches=5))
    taken_s = time.monotonic() - start_s
    context.leave_groups()  # as a worker does when its run has failed
    again = outcome(make_shard(case, rank, second_port), case)
    return failure, taken_s, sum(again.losses)


@pytest.mark.parametrize(("schedule", "pp"), [("1f1b", 2), ("zb-h1", 3)])
def test_a_rank_that_raises_is_named_frees_the_others_and_the_next_call_works(pool: Pool, schedule: str, pp: int):
    """The last of two ranks, and the middle one of three. (Under a master: tests/integration/test_faults.py.)"""
    store, port = host_store(ADDRESS)
    done = pool.run(break_and_go_on, pp, port, Case(layout=Layout(pp=pp, schedule=Schedule(schedule))))
    del store
    for rank, ((kind, message, notes), taken_s, _) in enumerate(done):
        assert taken_s < 30, "groups wait for a minute"
        if rank == 1:
            where = f"forward(1, microbatch 2) of {schedule}, pipeline rank 1 of {pp},"
            assert (kind, message) == (RunError.__name__, f"{where} failed with ValueError: the third one is bad")
        else:
            assert kind == PeerLost.__name__, "a symptom: the master reports the cause"
            assert "microbatch" in notes
    assert done[-1][2] > 0, "a loss of the training after it"


# -- ranks that differ -------------------------------------------------------------------------------------------------


def differ(rank: int, port: int, cases: list[Case]) -> tuple[str, str, str]:
    return tried(make_shard(cases[rank], rank, port), SupervisedFineTuning(), cases[rank])


def test_ranks_with_other_programs_refuse_to_run(pool: Pool) -> None:
    other = replace(PIPELINE, layout=Layout(pp=2, schedule=Schedule.GPIPE))
    failures = pool.run(differ, 2, [PIPELINE, other])
    for rank, (kind, message, _) in enumerate(failures):
        assert kind == ProgramError.__name__
        assert "rank 0 is about to run program" in message
        assert "and rank 1 program" in message
        assert f"this is rank {rank}, with {('1f1b', 'gpipe')[rank]}" in message


def test_ranks_with_other_microbatches_refuse_to_run(pool: Pool) -> None:
    for _, message, _ in pool.run(differ, 2, [PIPELINE, replace(PIPELINE, num_microbatches=4)]):
        assert "on 3 microbatches of 39 tokens" in message
        assert "on 4 microbatches of 61 tokens" in message


def test_no_microbatches_are_named() -> None:
    with pytest.raises(ProgramError, match="1f1b: 0 microbatches, where one is the least"):
        make_shard(Case(layout=Layout()), 0, None).train(SupervisedFineTuning(), [])


# -- losses that are no numbers ----------------------------------------------------------------------------------------


def meet_nan(rank: int, port: int | None, case: Case, factor: float) -> tuple[Any, ...]:
    """The error or statistics, whether weights and version stayed, and the norm of a good step after it."""
    shard = make_shard(case, rank, port)
    before = [each.detach().clone() for stage in shard.stages for each in stage.parameters()]
    algorithm, statistics = Faulty("data/0/1/0", factor), {}
    failure = ("", "", "")
    if case.optimizer.on_nan_loss is NaNPolicy.SKIP:
        done = shard.train(algorithm, case.share(shard.place.dp, 0))
        statistics = {name: mean.total / mean.weight for name, mean in done.items()}
    else:
        failure = tried(shard, algorithm, case)
    after = [each for stage in shard.stages for each in stage.parameters()]
    stayed = shard.version == 0 and all(map(torch.equal, before, after))
    good = outcome(shard, replace(case, num_steps=1))
    return failure, statistics, stayed, good.norms[0]


LAYOUTS = [Layout(pp=2), Layout(dp=2), Layout(pp=2, dp=2), Layout(pp=2, schedule=Schedule.INTERLEAVED, chunks=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"dp{layout.dp}-pp{layout.pp}-{layout.chunks}")
def test_a_bad_loss_stops_all_workers_and_is_named_where_it_is(pool: Pool, layout: Layout) -> None:
    done = pool.run(meet_nan, layout.num_workers, Case(layout=layout), float("nan"))
    causes = [message for (kind, message, _), *_ in done if kind == RunError.__name__]
    symptoms = [message for (kind, message, _), *_ in done if kind == PeerLost.__name__]
    (cause,), _ = causes, symptoms
    assert "the loss of microbatch 1 is nan at optimizer step 1; the weights are as before it" in cause
    assert "Its sequences: data/0/1/0. " in cause
    assert len(symptoms) == layout.num_workers - 1
    assert all(stayed for _, _, stayed, _ in done)
    assert all(numpy.isfinite(norm) for *_, norm in done), "the next call works"


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"dp{layout.dp}-pp{layout.pp}-{layout.chunks}")
def test_a_bad_loss_is_skipped_by_all_workers_and_counted(pool: Pool, layout: Layout, factor: float) -> None:
    case = Case(layout=layout)
    case = replace(case, optimizer=replace(case.optimizer, on_nan_loss=NaNPolicy.SKIP))
    wanted = outcome(make_shard(replace(case, layout=Layout(), num_microbatches=3 * layout.dp), 0, None), case)
    for _, statistics, stayed, norm in pool.run(meet_nan, layout.num_workers, case, factor):
        assert statistics == {"skipped_steps": 1.0}
        assert stayed
        if layout.dp == 1:
            assert norm == pytest.approx(wanted.norms[0], rel=1e-4), "as if the bad one had not been"


def test_a_good_step_counts_too() -> None:
    case = Case(layout=Layout())
    case = replace(case, optimizer=replace(case.optimizer, on_nan_loss=NaNPolicy.SKIP))
    done = make_shard(case, 0, None).train(SupervisedFineTuning(), [microbatch(0)])
    assert done["skipped_steps"].total == 0
    assert done["loss"].weight > 0
