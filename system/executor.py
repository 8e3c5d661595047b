"""Traverses a graph: each call runs as soon as its inputs are in the buffer, on the workers of its model.

One asyncio task a call. A model function call is cut into requests (minibatches) and each of these into microbatches; a
function call goes to the data worker whole. For each request the executor plans the redistribution that puts inputs
where they are read, and sends each worker its own part; replies amend the buffer and the records of who holds what.
Sequences that every call has read, or that a function call dropped, are released in the workers' stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..api.algorithms import Generation
from ..api.balance import plan_microbatches
from ..api.batch import Samples
from ..api.experiments.base import CompiledExperiment
from ..api.graph import Call, FunctionCall, Graph, ModelFunctionCall
from .buffer import SequenceBuffer
from .dispatch import settle
from .redistribution import keys_of_stage, plan_redistribution
from .rpc.commands import (
    CallDone,
    CallFunction,
    CallModel,
    Example,
    FunctionDone,
    Mean,
    Redistribute,
    Release,
    Save,
    ShardFile,
    Transfer,
)
from .rpc.messages import Lane
from .rpc.peer import Answer
from .rpc.server import Server
from .storage import Storage

DATA_RANK = 0
"""The worker that reads the datasets and runs function calls."""
CALL_MODEL = "call_model"
"""Under which name a worker reports the time of a `CallModel` command."""
CALL_FUNCTION = "call_function"


@dataclass(slots=True)
class Traversal:
    """What one traversal came to."""

    num_tokens: int = 0
    """Of all sequences, prompts and responses."""
    statistics: dict[str, dict[str, Mean]] = field(default_factory=dict)
    """By call."""
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """By call, then by command or hook: the time of the worker that took longest."""
    busy_s: dict[int, float] = field(default_factory=dict)
    """By rank: seconds in which it computed."""
    files: tuple[ShardFile, ...] = ()
    """What `Save` hooks wrote."""
    skipped: list[str] = field(default_factory=list)
    """Calls that had nothing to work on."""
    failures: tuple[str, ...] = ()
    """What function calls could not do, by sample, in words."""
    examples: tuple[Example, ...] = ()

    def add_statistics(self, call: str, statistics: Mapping[str, Mean]) -> None:
        merge(self.statistics.setdefault(call, {}), statistics)


def merge(totals: dict[str, Mean], more: Mapping[str, Mean]) -> None:
    """Adds means to totals, in place."""
    for name, mean in more.items():
        before = totals.get(name, Mean(total=0.0, weight=0.0))
        totals[name] = Mean(total=before.total + mean.total, weight=before.weight + mean.weight)


class Executor:
    """Runs one graph, one traversal at a time."""

    def __init__(self, graph: Graph, compiled: CompiledExperiment, server: Server, storage: Storage) -> None:
        self._graph, self._compiled, self._server, self._storage = graph, compiled, server, storage
        self._buffer = SequenceBuffer(graph)
        self._changed = asyncio.Condition()
        self._num_redistributions = 0
        self._releases: list[asyncio.Future[Answer]] = []
        self._deadline_s = compiled.run.deadlines.call_s

    async def traverse(self, samples: Samples, save: Mapping[str, Save] | None = None) -> Traversal:
        """Runs every call on these sequences. `save` names hooks to attach to the last request of a call."""
        traversal = Traversal()
        if "tokens" in samples.keys:
            traversal.num_tokens = sum(samples.lengths("tokens"))
        self._buffer.admit(samples)
        async with asyncio.TaskGroup() as group:
            for call in self._graph.calls:
                hook = save[call.name] if save is not None and call.name in save else None
                group.create_task(self._run(call, hook, traversal), name=call.name)
        return traversal

    async def _run(self, call: Call, save: Save | None, traversal: Traversal) -> None:
        samples = await self._take(call)
        if isinstance(call, FunctionCall):
            dropped = await self._run_function(call, samples, traversal)
        else:
            dropped = ()
            await self._run_model(call, samples, save, traversal)
        retired = self._buffer.finish(call, samples.ids)
        retired += self._buffer.drop([sequence for sequence in dropped if sequence not in retired])
        await self._release(retired)
        async with self._changed:
            self._changed.notify_all()

    async def _take(self, call: Call) -> Samples:
        """Waits until every sequence in flight has the call's inputs; those that were dropped are not waited for."""
        async with self._changed:
            while (samples := self._buffer.take(call, self._buffer.num_open(call))) is None:
                await self._changed.wait()
            return samples

    # -- model function calls -------------------------------------------------------------------------------------

    async def _run_model(
        self, call: ModelFunctionCall, samples: Samples, save: Save | None, traversal: Traversal
    ) -> None:
        minibatches = self._minibatches(call, samples)
        if not minibatches:
            traversal.skipped.append(call.name)
            await self._save_only(call, save, traversal)
            return
        futures: list[asyncio.Future[Answer]] = []
        needs: list[dict[int, Samples]] = []
        all_shares = [self._shares(call, minibatch) for minibatch in minibatches]
        for shares in all_shares:
            whole = {id(share): Samples.gather(share) for share in shares.values()}  # once for all ranks of a replica
            needs.append({rank: whole[id(share)] for rank, share in shares.items()})
        for turn in range(call.passes):
            for at, shares in enumerate(all_shares):
                moves = (
                    self._plan_moves(needs[at], call) if turn == 0 else {}
                )  # a later pass finds what the first brought
                is_last = (turn + 1, at + 1) == (call.passes, len(all_shares))
                futures += self._submit(call, shares, moves, save if is_last else None)
        answers = await settle(self._server, futures)
        for needed in needs:
            self._arrived(needed, call)
        self._record(call, answers, traversal)

    async def save(self, saves: Mapping[str, Save]) -> tuple[ShardFile, ...]:
        """Writes models as they are, between two traversals. `saves` are by the calls that train them."""
        traversal = Traversal()
        for call in self._graph.model_calls:
            await self._save_only(call, saves.get(call.name), traversal)
        return traversal.files

    async def _save_only(self, call: ModelFunctionCall, save: Save | None, traversal: Traversal) -> None:
        """A checkpoint that is due is written even if there was nothing to train on."""
        if save is None:
            return
        futures = [
            self._server.submit(
                rank, Release(ids=()), name=f"save of {call.name}", deadline_s=self._deadline_s, post_hooks=(save,)
            )
            for rank in self._compiled.models[call.model].ranks
        ]
        self._record(call, await settle(self._server, futures), traversal)

    def _minibatches(self, call: ModelFunctionCall, samples: Samples) -> list[Samples]:
        """Of nearly equal numbers of sequences, each with enough for every replica; none if there are too few."""
        replicas = self._compiled.models[call.model].model.layout.dp
        count = min(-(-len(samples) // call.minibatch_size), len(samples) // replicas)
        if count == 0:
            return []
        bounds = [len(samples) * at // count for at in range(count + 1)]
        return [samples.select(range(*bounds[at : at + 2])) for at in range(count)]

    def _shares(self, call: ModelFunctionCall, minibatch: Samples) -> dict[int, list[Samples]]:
        """The microbatches of each worker of the call's model, by rank."""
        placed = self._compiled.models[call.model]
        layout, spec = placed.model.layout, call.microbatching
        lengths = minibatch.sizes(call.inputs[0])
        if isinstance(call.settings, Generation):
            lengths = tuple(length + call.settings.sampling.max_new_tokens for length in lengths)
        plan = plan_microbatches(lengths, layout.dp, spec.max_tokens, spec.min_count, minibatch.ids)
        shares = [minibatch.split(microbatches) for microbatches in plan]
        return {rank: shares[place // layout.pp] for place, rank in enumerate(placed.ranks)}

    def _submit(
        self,
        call: ModelFunctionCall,
        shares: Mapping[int, list[Samples]],
        moves: Mapping[int, Redistribute],
        save: Save | None,
    ) -> list[asyncio.Future[Answer]]:
        """One request to each worker of the model, with its own share of the minibatch."""
        futures = self._transfers(call, moves, shares)
        for rank, share in shares.items():
            futures.append(
                self._server.submit(
                    rank,
                    CallModel(graph=self._graph.name, call=call.name, microbatches=tuple(share)),
                    name=f"call {call.name}",
                    deadline_s=self._deadline_s,
                    pre_hooks=(moves[rank],) if rank in moves else (),
                    post_hooks=(save,) if save is not None else (),
                )
            )
        return futures

    # -- function calls -------------------------------------------------------------------------------------------

    async def _run_function(self, call: FunctionCall, samples: Samples, traversal: Traversal) -> tuple[str, ...]:
        """Returns the sequences that it dropped."""
        if not samples.ids:
            return ()
        moves = self._plan_moves({DATA_RANK: samples}, call)
        futures = self._transfers(call, moves, (DATA_RANK,))
        futures.append(
            self._server.submit(
                DATA_RANK,
                CallFunction(graph=self._graph.name, call=call.name, samples=samples),
                name=f"call {call.name}",
                deadline_s=self._deadline_s,
                lane=Lane.FUNCTION,
                pre_hooks=(moves[DATA_RANK],) if DATA_RANK in moves else (),
            )
        )
        answer = (await settle(self._server, futures))[-1]
        self._arrived({DATA_RANK: samples}, call)
        done = answer.success.result
        assert isinstance(done, FunctionDone), "CallFunction is answered by FunctionDone"
        self._storage.add(DATA_RANK, done.outputs)
        self._buffer.amend(done.outputs)
        traversal.add_statistics(call.name, done.statistics)
        traversal.seconds[call.name] = answer.seconds
        traversal.failures += done.failures
        traversal.examples += done.examples
        return done.dropped

    # -- data -----------------------------------------------------------------------------------------------------

    def _plan_moves(self, needs: Mapping[int, Samples], call: Call) -> dict[int, Redistribute]:
        """What has to go where so that each worker finds the call's inputs."""
        self._num_redistributions += 1
        wanted = {rank: (samples, self._keys(call, rank)) for rank, samples in needs.items()}
        hosts = [peer.register.host for peer in self._server.roster.by_rank]
        return plan_redistribution(wanted, self._storage, tag=self._num_redistributions % 2**30, hosts=hosts)

    def _keys(self, call: Call, rank: int) -> tuple[str, ...]:
        if isinstance(call, FunctionCall):
            return call.inputs
        placed = self._compiled.models[call.model]
        stage = (rank - placed.first_rank) % placed.model.layout.pp
        return keys_of_stage(call.inputs, is_last=stage + 1 == placed.model.layout.pp)

    def _transfers(
        self, call: Call, moves: Mapping[int, Redistribute], participants: Mapping[int, object] | Sequence[int]
    ) -> list[asyncio.Future[Answer]]:
        """Requests to those who only give data to the call."""
        return [
            self._server.submit(
                rank,
                Transfer(redistribute=move),
                name=f"data for {call.name}",
                deadline_s=self._deadline_s,
                lane=Lane.TRANSFER,
            )
            for rank, move in moves.items()
            if rank not in participants
        ]

    def _arrived(self, needs: Mapping[int, Samples], call: Call) -> None:
        """Only now: a worker that still waits for its data cannot pass it on."""
        for rank, samples in needs.items():
            self._storage.add(rank, samples.only(self._keys(call, rank)))

    def _record(self, call: ModelFunctionCall, answers: list[Answer], traversal: Traversal) -> None:
        slowest: dict[str, float] = traversal.seconds.setdefault(call.name, {})
        ranks = self._compiled.models[call.model].ranks
        computed = [answer for answer in answers if isinstance(answer.success.result, CallDone)]
        for at, answer in enumerate(computed):
            result, rank = answer.success.result, ranks[at % len(ranks)]
            assert isinstance(result, CallDone), "filtered above"
            traversal.add_statistics(call.name, result.statistics)
            traversal.busy_s[rank] = traversal.busy_s.get(rank, 0.0) + answer.seconds[CALL_MODEL]
            if result.outputs is not None:
                self._storage.add(rank, result.outputs)
                self._buffer.amend(result.outputs)
                if "tokens" in result.outputs.keys:
                    traversal.num_tokens += sum(result.outputs.lengths("tokens"))
        for start in range(0, len(computed), len(ranks)):
            request = computed[start : start + len(ranks)]
            for name in {name for answer in request for name in answer.seconds}:
                longest = max(answer.seconds[name] for answer in request if name in answer.seconds)
                slowest[name] = slowest.get(name, 0.0) + longest
        traversal.files += tuple(file for answer in answers for file in answer.success.files)

    async def _release(self, sequences: tuple[str, ...]) -> None:
        """Sends releases, and waits for those of the call before: nothing hangs on them."""
        before, self._releases = self._releases, []
        if before:
            await settle(self._server, before)
        for rank, ids in self._storage.release(sequences).items():
            release = Release(ids=ids)
            self._releases.append(
                self._server.submit(rank, release, name="release", deadline_s=self._deadline_s, lane=Lane.TRANSFER)
            )
