"""Traverses a graph: each call runs as soon as its inputs are in the buffer, on the workers of its model.

One asyncio task a call. For each minibatch of its sequences the executor cuts microbatches, plans the redistribution
that puts inputs where they are read, and sends each worker its own part; replies amend the buffer and the records of
who holds what. Sequences that every call has read are released in the workers' stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..api.batch import Samples, plan_microbatches
from ..api.experiments.base import CompiledExperiment
from ..api.graph import Graph, ModelFunctionCall
from .buffer import SequenceBuffer
from .dispatch import settle
from .redistribution import keys_of_stage, plan_redistribution
from .rpc.commands import CallDone, CallModel, Mean, Redistribute, Release, Save, ShardFile, Transfer
from .rpc.messages import Lane
from .rpc.server import Answer, Server
from .storage import Storage


@dataclass(slots=True)
class Traversal:
    """What one traversal came to."""

    num_tokens: int = 0
    statistics: dict[str, dict[str, Mean]] = field(default_factory=dict)
    """By call."""
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """By call, then by command or hook: the time of the worker that took longest."""
    busy_s: dict[int, float] = field(default_factory=dict)
    """By rank: seconds in which it computed."""
    files: tuple[ShardFile, ...] = ()
    """What `Save` hooks wrote."""


class Executor:
    """Runs one graph, one traversal at a time."""

    def __init__(self, graph: Graph, compiled: CompiledExperiment, server: Server, storage: Storage) -> None:
        self._graph, self._compiled, self._server, self._storage = graph, compiled, server, storage
        self._buffer = SequenceBuffer(graph)
        self._amended = asyncio.Condition()
        self._num_redistributions = 0
        self._releases: list[asyncio.Future[Answer]] = []

    async def traverse(self, samples: Samples, save: Mapping[str, Save] | None = None) -> Traversal:
        """Runs every call on these sequences. `save` names hooks to attach to the last request of a call."""
        traversal = Traversal(num_tokens=sum(samples.lengths("tokens")))
        self._buffer.admit(samples)
        async with asyncio.TaskGroup() as group:
            for call in self._graph.calls:
                count = min(call.batch_size, len(samples))
                hook = save[call.name] if save is not None and call.name in save else None
                group.create_task(self._run(call, count, hook, traversal), name=call.name)
        return traversal

    async def _run(self, call: ModelFunctionCall, count: int, save: Save | None, traversal: Traversal) -> None:
        async with self._amended:
            samples = self._buffer.take(call, count)
            while samples is None:
                await self._amended.wait()
                samples = self._buffer.take(call, count)
        futures: list[asyncio.Future[Answer]] = []
        moves: list[dict[int, Redistribute]] = []
        for start in range(0, count, call.minibatch_size):
            stop = min(start + call.minibatch_size, count)
            shares = self._shares(call, samples.select(range(start, stop)))
            moves.append(self._plan_moves(call, shares))
            futures += self._submit(call, shares, moves[-1], save if stop == count else None)
        answers = await settle(self._server, futures)
        for move in moves:  # only now: a worker that still waits for its data cannot pass it on
            for rank, part in move.items():
                for parcel in part.receives:
                    self._storage.add(rank, parcel.samples)
        self._record(call, answers, traversal)
        retired = self._buffer.finish(call, samples.ids)
        await self._release(retired)
        async with self._amended:
            self._amended.notify_all()

    def _shares(self, call: ModelFunctionCall, minibatch: Samples) -> dict[int, list[Samples]]:
        """The microbatches of each worker of the call's model, by rank."""
        placed = self._compiled.models[call.model]
        layout, spec = placed.model.layout, call.microbatching
        lengths = minibatch.lengths("tokens")
        plan = plan_microbatches(lengths, layout.dp, spec.max_tokens, spec.min_count, minibatch.ids)
        return {
            rank: [minibatch.select(positions) for positions in plan[place // layout.pp]]
            for place, rank in enumerate(placed.ranks)
        }

    def _submit(
        self,
        call: ModelFunctionCall,
        shares: Mapping[int, list[Samples]],
        moves: Mapping[int, Redistribute],
        save: Save | None,
    ) -> list[asyncio.Future[Answer]]:
        """One request to each worker of the model, with its own share of the minibatch."""
        deadline_s = self._compiled.run.deadlines.call_s
        futures = []
        for rank, move in moves.items():
            if rank not in shares:
                command = Transfer(redistribute=move)
                futures.append(
                    self._server.submit(
                        rank, command, name=f"data for {call.name}", deadline_s=deadline_s, lane=Lane.TRANSFER
                    )
                )
        for rank, share in shares.items():
            futures.append(
                self._server.submit(
                    rank,
                    CallModel(
                        call=call.name,
                        model=call.model,
                        kind=call.kind,
                        algorithm=call.algorithm,
                        microbatches=tuple(share),
                    ),
                    name=f"call {call.name}",
                    deadline_s=deadline_s,
                    pre_hooks=(moves[rank],) if rank in moves else (),
                    post_hooks=(save,) if save is not None else (),
                )
            )
        return futures

    def _plan_moves(self, call: ModelFunctionCall, shares: Mapping[int, list[Samples]]) -> dict[int, Redistribute]:
        placed = self._compiled.models[call.model]
        last = placed.model.layout.pp - 1
        needs = {
            rank: (Samples.gather(share), keys_of_stage(call.inputs, place % placed.model.layout.pp == last))
            for place, (rank, share) in enumerate(shares.items())
        }
        self._num_redistributions += 1
        return plan_redistribution(needs, self._storage, tag=self._num_redistributions % 2**30)

    def _record(self, call: ModelFunctionCall, answers: list[Answer], traversal: Traversal) -> None:
        statistics = traversal.statistics.setdefault(call.name, {})
        slowest: dict[str, float] = traversal.seconds.setdefault(call.name, {})
        placed = self._compiled.models[call.model]
        num_ranks = len(placed.ranks)
        computed = [answer for answer in answers if isinstance(answer.success.result, CallDone)]
        for at, answer in enumerate(computed):
            result = answer.success.result
            assert isinstance(result, CallDone), "filtered above"
            for name, mean in result.statistics.items():
                before = statistics[name] if name in statistics else Mean(total=0.0, weight=0.0)
                statistics[name] = Mean(total=before.total + mean.total, weight=before.weight + mean.weight)
            rank = placed.ranks[at % num_ranks]
            seconds = answer.seconds[CALL_MODEL]
            traversal.busy_s[rank] = traversal.busy_s.get(rank, 0.0) + seconds
        for start in range(0, len(computed), num_ranks):
            minibatch = computed[start : start + num_ranks]
            for name in {name for answer in minibatch for name in answer.seconds}:
                longest = max(answer.seconds[name] for answer in minibatch if name in answer.seconds)
                slowest[name] = slowest.get(name, 0.0) + longest
        traversal.files += tuple(file for answer in computed for file in answer.success.files)

    async def _release(self, sequences: tuple[str, ...]) -> None:
        """Sends releases, and waits for those of the call before: nothing hangs on them."""
        before, self._releases = self._releases, []
        if before:
            await settle(self._server, before)
        for rank, ids in self._storage.release(sequences).items():
            deadline_s = self._compiled.run.deadlines.call_s
            self._releases.append(
                self._server.submit(rank, Release(ids=ids), name="release", deadline_s=deadline_s, lane=Lane.TRANSFER)
            )


CALL_MODEL = "call_model"
"""Under which name a worker reports the time of a `CallModel` command."""
