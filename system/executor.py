"""Does what `dataflow` says: the asyncio shell around it.

    Dataflow --Move-----> redistribution, on the transfer lanes of who gives and who receives ----moved----> Dataflow
             --Start----> requests to the call's workers, with hooks --produced, produced, finished-------->
             --Release--> their stores
             --Complete-> whoever waits for the step

One task a move, and one a running call. It decides nothing: it knows who holds what, how calls become requests, and
what answers mean. The first failure ends all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Container, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType, TracebackType
from typing import Self, assert_never

from ..api.batch import Samples
from ..api.experiments.base import CompiledExperiment
from ..api.graph import Call, CallKind, FunctionCall, Graph, ModelFunctionCall
from .dataflow import Action, Complete, Dataflow, Firing, Move, Release, Site, Start
from .dispatch import located, settle
from .redistribution import keys_of_stage, plan_redistribution
from .requests import Shares, cut, read_by
from .rpc.commands import CallDone, CallFunction, CallModel, Command, FunctionDone, Hook, Save, ShardFile
from .rpc.commands import Release as ReleaseCommand
from .rpc.messages import Lane
from .rpc.peer import Answer, Asked
from .rpc.server import Server
from .storage import Storage
from .traversal import Traversal, longest

DATA_RANK = 0
"""The worker that reads the datasets and runs function calls."""


@dataclass(slots=True)
class _Step:
    """One that is in flight."""

    saves: Mapping[str, Save]
    """By call: hooks for its last request."""
    complete: asyncio.Future[Traversal]
    traversal: Traversal = field(default_factory=Traversal)


class Executor:
    """Runs one graph on its workers. An async context manager: who leaves it waits for all that was begun."""

    def __init__(
        self,
        graph: Graph,
        compiled: CompiledExperiment,
        server: Server,
        storage: Storage,
        max_steps_ahead: int = 0,
        where: Callable[[int], str] = "step {}".format,
        token_readers: Mapping[str, Container[int]] = MappingProxyType({}),
    ) -> None:
        """`where` says in errors where in the run a step is; `token_readers` by model which ranks read tokens: all,
        where it does not say."""
        self._graph, self._compiled, self._server, self._storage = graph, compiled, server, storage
        self._where, self._token_readers = where, token_readers
        sites = {call.name: Site(_lane(call), self._ranks(call)) for call in graph.calls}
        self._flow = Dataflow(graph, sites, max_steps_ahead)
        self._steps: dict[int, _Step] = {}
        self._cuts: dict[Firing, list[Shares]] = {}
        """Of firings of models' calls that have not started."""
        self._actions: deque[Action] = deque()
        self._num_redistributions = 0
        self._deadline_s = compiled.run.deadlines.call_s

    async def __aenter__(self) -> Self:
        self._group = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._group.__aexit__(kind, error, trace)

    @property
    def has_room(self) -> bool:
        """Whether another step may be admitted."""
        return self._flow.has_room

    def admit(self, step: int, samples: Samples, saves: Mapping[str, Save] | None = None) -> asyncio.Future[Traversal]:
        """Begins a step on these sequences, which the data worker holds; the future says what it came to.

        `saves` are hooks for the last request of calls.
        """
        begun = _Step(saves or {}, asyncio.get_running_loop().create_future())
        begun.traversal.add_dataset(samples)
        self._steps[step] = begun
        self._obey(self._flow.admit(step, samples))
        return begun.complete

    async def save(self, step: int, saves: Mapping[str, Save]) -> tuple[ShardFile, ...]:
        """Writes models as they are, between two steps. `saves` are by the calls that train them."""
        traversal = Traversal()
        for call in self._graph.model_calls:
            if call.name in saves:
                await self._save(step, call, saves[call.name], traversal)
        return traversal.files

    # -- actions --------------------------------------------------------------------------------------------------

    def _obey(self, actions: Iterable[Action]) -> None:
        """In order, with what follows at once."""
        is_first = not self._actions
        self._actions += actions
        while is_first and self._actions:
            action = self._actions[0]
            match action:
                case Move(firing):
                    self._move(firing)
                case Start(firing, lag):
                    self._start(firing, lag)
                case Release(sequences):
                    self._release(sequences)
                case Complete():
                    self._complete(action)
                case _:
                    assert_never(action)
            self._actions.popleft()

    def _move(self, firing: Firing) -> None:
        call = firing.call
        if isinstance(call, FunctionCall):
            reads = {DATA_RANK: firing.samples} if firing.samples.ids else {}
        else:
            self._cuts[firing] = cut(call, firing.samples, self._compiled.models[call.model])
            reads = read_by(self._cuts[firing])
        self._num_redistributions += 1
        needs = self._needs(call, reads)
        hosts = [peer.register.host for peer in self._server.roster.by_rank]
        moves = plan_redistribution(needs, self._storage, tag=self._num_redistributions % 2**30, hosts=hosts)
        if not moves:
            self._obey(self._flow.moved(firing))
            return
        name = f"data for {call.name}"
        asked = self._ask(moves, firing.step, name, Lane.TRANSFER)
        self._begin(firing, self._wait_for_move(firing, asked, [(r, s.only(keys)) for r, (s, keys) in needs.items()]))

    def _start(self, firing: Firing, lag: int) -> None:
        call, step = firing.call, self._steps[firing.step]
        if isinstance(call, FunctionCall):
            self._begin(firing, self._run_function(firing, call))
            return
        if call.kind is CallKind.GENERATE:
            step.traversal.lags.update(dict.fromkeys(firing.samples.ids, lag))
        save = step.saves.get(call.name) if firing.is_last else None
        self._begin(firing, self._run_model(firing, call, self._cuts.pop(firing), save))

    def _release(self, sequences: tuple[str, ...]) -> None:
        released = self._storage.release(sequences)
        commands = {ids: ReleaseCommand(ids=ids) for ids in set(released.values())}  # of a replica's stages the same
        by_rank = {rank: commands[ids] for rank, ids in released.items()}
        self._server.tell(by_rank, self._deadline_s, Lane.TRANSFER)

    def _complete(self, complete: Complete) -> None:
        step = self._steps.pop(complete.step)
        step.traversal.num_sequences, step.traversal.num_read = complete.num_sequences, complete.num_read
        step.complete.set_result(step.traversal)

    def _begin(self, firing: Firing, work: Coroutine[None, None, None]) -> None:
        async def run() -> None:
            with located(self._server, lambda: self._where(firing.step)):
                await work

        self._group.create_task(run(), name=f"{firing.call.name} of step {firing.step}")

    # -- calls ----------------------------------------------------------------------------------------------------

    async def _wait_for_move(self, firing: Firing, asked: Asked, arrived: list[tuple[int, Samples]]) -> None:
        (answers,) = await settle(self._server, asked)
        for rank, samples in arrived:
            self._storage.add(rank, samples)
        self._steps[firing.step].traversal.add_seconds(firing.call.name, longest(answers.values()))
        self._obey(self._flow.moved(firing))

    async def _run_model(
        self, firing: Firing, call: ModelFunctionCall, minibatches: list[Shares], save: Save | None
    ) -> None:
        traversal, turns = self._steps[firing.step].traversal, minibatches * call.passes
        if not turns:
            traversal.skipped.append(call.name)
            if save is not None:  # a checkpoint that is due is written even if there was nothing to train on
                await self._save(firing.step, call, save, traversal)
            self._obey(self._flow.finished(firing, dropped=firing.samples.ids))  # for who would read its outputs
            return
        requests = [
            self._request(firing, call, shares, save, is_first=at == 0, is_last=at + 1 == len(turns))
            for at, shares in enumerate(turns)
        ]
        try:
            for shares, request in zip(turns, requests, strict=True):
                (answers,) = await settle(self._server, request)
                traversal.add_request(call, answers)
                self._take_outputs(firing, shares, answers)
        finally:
            for request in requests:
                request.cancel()
        self._obey(self._flow.finished(firing))

    def _request(
        self,
        firing: Firing,
        call: ModelFunctionCall,
        shares: Shares,
        save: Save | None,
        is_first: bool,
        is_last: bool,
    ) -> Asked:
        """One minibatch, to each worker of the model its own share."""
        before = call.pre_hooks if is_first else ()
        after: tuple[Hook, ...] = call.post_hooks if is_last else ()
        after += (save,) if save is not None and is_last else ()
        distinct = {id(share): share for share in shares.values()}  # the stages of a replica are sent the same
        commands = {
            each: CallModel(graph=self._graph.name, call=call.name, samples=share.samples, sizes=share.sizes)
            for each, share in distinct.items()
        }
        by_rank = {rank: commands[id(share)] for rank, share in shares.items()}
        return self._ask(by_rank, firing.step, f"call {call.name}", Lane.COMPUTE, before, after)

    def _take_outputs(self, firing: Firing, shares: Shares, answers: Mapping[int, Answer]) -> None:
        outputs = []
        for rank, answer in answers.items():
            result = answer.success.result
            if isinstance(result, CallDone) and result.outputs is not None:
                written = result.outputs.named_as(shares[rank].samples)
                self._storage.add(rank, written)
                outputs.append(written)
        if outputs:
            self._obey(self._flow.produced(firing, *outputs))

    async def _run_function(self, firing: Firing, call: FunctionCall) -> None:
        if not firing.samples.ids:
            self._obey(self._flow.finished(firing))
            return
        command = CallFunction(graph=self._graph.name, call=call.name, samples=firing.samples)
        asked = self._ask({DATA_RANK: command}, firing.step, f"call {call.name}", Lane.FUNCTION)
        (answers,) = await settle(self._server, asked)
        answer = answers[DATA_RANK]
        done = answer.success.result
        assert isinstance(done, FunctionDone), "CallFunction is answered by FunctionDone"
        self._storage.add(DATA_RANK, done.outputs)
        self._steps[firing.step].traversal.add_function(call.name, answer, done)
        self._obey(self._flow.finished(firing, done.outputs, done.dropped))

    async def _save(self, step: int, call: ModelFunctionCall, save: Save, traversal: Traversal) -> None:
        nothing = dict.fromkeys(self._ranks(call), ReleaseCommand(ids=()))
        asked = self._ask(nothing, step, f"save of {call.name}", Lane.COMPUTE, after=(save,))
        (answers,) = await settle(self._server, asked)
        traversal.add_request(call, answers)

    # -- workers --------------------------------------------------------------------------------------------------

    def _ask(
        self,
        commands: Mapping[int, Command],
        step: int,
        name: str,
        lane: Lane,
        before: tuple[Hook, ...] = (),
        after: tuple[Hook, ...] = (),
    ) -> Asked:
        return self._server.ask(
            commands,
            name=name,
            deadline_s=self._deadline_s,
            lane=lane,
            step=step,
            pre_hooks=before,
            post_hooks=after,
        )

    def _ranks(self, call: Call) -> range:
        if isinstance(call, FunctionCall):
            return range(DATA_RANK, DATA_RANK + 1)
        return self._compiled.models[call.model].ranks

    def _needs(self, call: Call, reads: Mapping[int, Samples]) -> dict[int, tuple[Samples, tuple[str, ...]]]:
        """By rank what it reads, and which keys of that."""
        if isinstance(call, FunctionCall):
            return {rank: (samples, call.inputs) for rank, samples in reads.items()}
        placed = self._compiled.models[call.model]
        num_stages, readers = placed.model.layout.pp, self._token_readers.get(call.model, placed.ranks)
        keys = {kind: keys_of_stage(call, *kind) for kind in product((False, True), repeat=2)}
        needs = {}
        for rank, samples in reads.items():
            is_last = (rank - placed.first_rank + 1) % num_stages == 0
            if wanted := keys[is_last, rank in readers]:
                needs[rank] = samples, wanted
        return needs


def _lane(call: Call) -> Lane:
    return Lane.FUNCTION if isinstance(call, FunctionCall) else Lane.COMPUTE
