"""What runs when: a graph's traversals as a state machine. Pure: events in, actions out, no clock.

                  admit                                   moved                     finished
    batch of a step --> (inputs there) --Move--> on its way --> (workers free) --Start--> running --> Release, Complete

A call fires on a window of its step's sequences: `batch_size` of them, in order of admission, less those that were
dropped. Windows do not depend on when anything happens, so neither does what a call works on. A window fires

- once all its sequences have the call's inputs, and the windows before it have fired: oldest first;
- once the calls it waits for are done with the step (see `Graph.waits_for`);
- once its inputs are where they are read: that is moved while models compute, one move to a worker at a time, so that
  nothing is moved twice;
- once its workers are free, and no older firing whose inputs are there wants one of them: nobody starves.

Nothing else is waited for: calls of one step run side by side, and so do steps. **Back-pressure**: at most
`max_steps_ahead + 1` steps are in flight, and the next is admitted when one is complete. So a step's calls read weights
that lag behind by at most `max_steps_ahead` steps; buffers and stores hold that many batches, besides the one that is
fetched next.

Who drives it tells it each event once, and does what it answers. It does not know workers' messages, nor failures: a
call that fails ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..api.batch import Samples
from ..api.errors import RunError
from ..api.graph import Call, CallKind, Graph, ModelFunctionCall
from .buffer import SequenceBuffer
from .rpc.messages import Lane


@dataclass(frozen=True, slots=True)
class Site:
    """Where a call runs: it keeps this lane of these workers busy."""

    lane: Lane
    ranks: range

    def shares_workers_with(self, other: Site) -> bool:
        return max(self.ranks.start, other.ranks.start) < min(self.ranks.stop, other.ranks.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Firing:
    """A call on one window of a step's sequences."""

    step: int
    call: Call
    window: int
    samples: Samples
    """Its inputs; none if all were dropped."""
    is_last: bool
    """Of the call in this step."""


@dataclass(frozen=True, slots=True)
class Move:
    """Bring the inputs to where they are read; then tell `moved`."""

    firing: Firing


@dataclass(frozen=True, slots=True)
class Start:
    """Run the call; tell of outputs by `produced` as they come, and of the end by `finished`."""

    firing: Firing
    lag: int
    """How many steps, of those before this one, the model's weights have not seen; 0 if nothing trains it."""


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody reads these any more."""

    sequences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Complete:
    """Every call is done with the step."""

    step: int
    num_sequences: int
    num_read: Mapping[str, int]
    """By call. What is missing was dropped before it."""


Action = Move | Start | Release | Complete


@dataclass(slots=True)
class _Progress:
    """One call in one step."""

    window_size: int
    num_windows: int
    num_fired: int = 0
    """Whose inputs are there."""
    num_started: int = 0
    num_finished: int = 0
    num_read: int = 0

    @property
    def has_started(self) -> bool:
        """With all of its windows."""
        return self.num_started == self.num_windows

    @property
    def is_done(self) -> bool:
        return self.num_finished == self.num_windows


@dataclass(slots=True)
class _Traversal:
    step: int
    place: int
    """Among all steps."""
    buffer: SequenceBuffer
    calls: dict[str, _Progress]


class Dataflow:
    """All traversals of one graph. Each method takes one event, and returns what is to be done now, in order."""

    def __init__(self, graph: Graph, sites: Mapping[str, Site], max_steps_ahead: int = 0) -> None:
        """`sites` by call."""
        self._graph, self._max_in_flight = graph, max_steps_ahead + 1
        self._order = {call.name: place for place, call in enumerate(graph.calls)}
        self._waits_for = {call.name: graph.waits_for(call.name) for call in graph.calls}
        self._trainers = _trainers(graph)
        self._share_workers = _pairs(sites, Site.shares_workers_with)
        self._share_lanes = _pairs(sites, lambda one, other: one.lane is other.lane and one.shares_workers_with(other))
        self._traversals: dict[int, _Traversal] = {}
        self._num_admitted = 0
        self._num_trained = dict.fromkeys(self._trainers, 0)
        """By model: steps that it was trained on."""
        self._waiting: list[Firing] = []
        """Firings whose inputs are there, but not where they are read."""
        self._moving: list[Firing] = []
        self._moved: list[Firing] = []
        self._running: list[Firing] = []

    @property
    def num_in_flight(self) -> int:
        """Steps."""
        return len(self._traversals)

    @property
    def num_buffered(self) -> int:
        """Sequences."""
        return sum(len(traversal.buffer) for traversal in self._traversals.values())

    @property
    def has_room(self) -> bool:
        """Whether another step may be admitted."""
        return self.num_in_flight < self._max_in_flight

    # -- events ---------------------------------------------------------------------------------------------------

    def admit(self, step: int, samples: Samples) -> list[Action]:
        """A new step, with the keys of the dataset."""
        assert self.has_room, f"step {step} is admitted while {self.num_in_flight} are in flight"
        assert step not in self._traversals, f"step {step} is admitted twice"
        assert len(samples), "a step has sequences"
        calls = {}
        for call in self._graph.calls:
            size = -(-len(samples) * call.batch_size // self._graph.num_sequences)
            calls[call.name] = _Progress(size, -(-len(samples) // size))
        self._traversals[step] = _Traversal(step, self._num_admitted, SequenceBuffer(self._graph, samples), calls)
        self._num_admitted += 1
        return self._go_on()

    def moved(self, firing: Firing) -> list[Action]:
        """The firing's inputs are where they are read."""
        self._moving.remove(firing)
        self._moved.append(firing)
        return self._go_on()

    def produced(self, firing: Firing, *outputs: Samples) -> list[Action]:
        """Some of the firing's sequences have some of the call's outputs."""
        for each in outputs:
            self._traversals[firing.step].buffer.amend(each)
        return self._go_on()

    def finished(self, firing: Firing, outputs: Samples | None = None, dropped: Sequence[str] = ()) -> list[Action]:
        """These are the last outputs. Calls that depend on this one do not read what was dropped, which no earlier
        output was of.

        Raises `RunError` if an output is missing, for whoever reads it would wait for ever.
        """
        self._running.remove(firing)
        traversal, call = self._traversals[firing.step], firing.call
        if outputs is not None:
            traversal.buffer.amend(outputs)
        kept = firing.samples.ids if not dropped else tuple(sorted(set(firing.samples.ids) - set(dropped)))
        lacking = traversal.buffer.lacks(call, kept)
        if lacking is not None:
            raise RunError(f"call {call.name} has ended, but sequence {lacking[0]} got no {lacking[1]} from it")
        progress = traversal.calls[call.name]
        progress.num_finished += 1
        progress.num_read += len(firing.samples)
        self._note_training(traversal, call)
        retired = traversal.buffer.finish(call, firing.samples.ids, dropped)
        actions: list[Action] = [Release(retired)] if retired else []
        if all(each.is_done for each in traversal.calls.values()):
            actions.append(self._complete(traversal))
        return actions + self._go_on()

    # -- what follows ---------------------------------------------------------------------------------------------

    def _go_on(self) -> list[Action]:
        """Everything that nothing holds up any more."""
        actions: list[Action] = []
        while True:
            for call in self._graph.calls:
                self._fire(call)
            moves = self._next(self._waiting, self._moving, (), self._share_workers)
            on_their_way = (*self._waiting, *self._moving)
            starts = self._next(self._moved, self._running, on_their_way, self._share_lanes)
            if not moves and not starts:
                return actions
            for firing in starts:
                self._traversals[firing.step].calls[firing.call.name].num_started += 1
            actions += [*map(Move, moves), *(Start(firing, self._lag(firing)) for firing in starts)]

    def _fire(self, call: Call) -> None:
        """The call's next window, if all is there, and the one before has started."""
        under_way = (each for each in self._traversals.values() if not each.calls[call.name].has_started)
        traversal = next(under_way, None)  # the oldest: a call goes through steps in order
        if traversal is None:
            return
        progress = traversal.calls[call.name]
        if progress.num_fired > progress.num_started:
            return
        if not all(traversal.calls[name].is_done for name in self._waits_for[call.name]):
            return
        start = progress.num_fired * progress.window_size
        samples = traversal.buffer.look(call, start, start + progress.window_size)
        if samples is not None:
            is_last = progress.num_fired + 1 == progress.num_windows
            self._waiting.append(Firing(traversal.step, call, progress.num_fired, samples, is_last))
            progress.num_fired += 1

    def _next(
        self,
        waiting: list[Firing],
        having: list[Firing],
        claiming: Sequence[Firing],
        conflicts: Mapping[str, frozenset[str]],
    ) -> list[Firing]:
        """Passes on who of those that wait gets what it wants now: nobody that is older wants, or has, the same."""
        claimed = {firing.call.name for firing in having}
        given = []
        for firing in sorted([*waiting, *claiming], key=self._age):
            if firing in waiting and not claimed & conflicts[firing.call.name]:
                given.append(firing)
            claimed.add(firing.call.name)
        for firing in given:
            waiting.remove(firing)
            having.append(firing)
        return given

    def _age(self, firing: Firing) -> tuple[int, int, int]:
        return self._traversals[firing.step].place, self._order[firing.call.name], firing.window

    def _lag(self, firing: Firing) -> int:
        call = firing.call
        if not isinstance(call, ModelFunctionCall) or call.model not in self._trainers:
            return 0
        return max(0, self._traversals[firing.step].place - self._num_trained[call.model])

    def _note_training(self, traversal: _Traversal, call: Call) -> None:
        for model, trainers in self._trainers.items():
            if call.name in trainers and all(traversal.calls[name].is_done for name in trainers):
                self._num_trained[model] += 1

    def _complete(self, traversal: _Traversal) -> Complete:
        del self._traversals[traversal.step]
        num_sequences = len(traversal.buffer.ids)
        num_read = {name: progress.num_read for name, progress in traversal.calls.items()}
        for call in self._graph.calls:
            gone = traversal.buffer.num_gone(call)
            assert num_read[call.name] + gone == num_sequences, f"{call.name} read or missed every sequence once"
        assert not len(traversal.buffer), "whoever was read by all has retired"
        return Complete(traversal.step, num_sequences, num_read)


def _trainers(graph: Graph) -> dict[str, frozenset[str]]:
    """Calls that train a model, by model."""
    trainers: dict[str, frozenset[str]] = {}
    for call in graph.model_calls:
        if call.kind is CallKind.TRAIN_STEP:
            trainers[call.model] = trainers.get(call.model, frozenset()) | {call.name}
    return trainers


def _pairs(sites: Mapping[str, Site], conflict: Callable[[Site, Site], bool]) -> dict[str, frozenset[str]]:
    """Calls that cannot have what they want at once, themselves included."""
    return {
        name: frozenset(other for other, there in sites.items() if conflict(site, there))
        for name, site in sites.items()
    }
