"""Random graphs, and a world in virtual time that runs them by what `Dataflow` says, while it keeps its own books."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import strategies as st
from trainmaster.api.algorithms import SupervisedLoss
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.functions import RewardFunction
from trainmaster.api.graph import Call, CallKind, FunctionCall, Graph, Microbatching, ModelFunctionCall
from trainmaster.api.rewards import Reward
from trainmaster.system.dataflow import Action, Complete, Dataflow, Firing, Move, Release, Site, Start
from trainmaster.system.rpc.messages import Lane

MODELS = {"actor": range(0, 4), "critic": range(2, 6), "reference": range(4, 8)}
"""Where they are: neighbours share some workers."""


def model_call(
    name: str,
    inputs: str = "tokens",
    outputs: str = "",
    *,
    model: str = "actor",
    kind: CallKind = CallKind.INFERENCE,
    batch_size: int = 4,
) -> ModelFunctionCall:
    return ModelFunctionCall(
        name=name,
        model=model,
        kind=kind,
        settings=SupervisedLoss(),
        inputs=tuple(inputs.split()),
        outputs=tuple(outputs.split()),
        batch_size=batch_size,
        minibatch_size=batch_size,
        microbatching=Microbatching(max_tokens=8),
    )


def function_call(name: str, inputs: str = "tokens", outputs: str = "", *, batch_size: int = 4) -> FunctionCall:
    return FunctionCall(
        name=name,
        function=RewardFunction(reward=Reward(function="exact_match")),
        inputs=tuple(inputs.split()),
        outputs=tuple(outputs.split()),
        batch_size=batch_size,
    )


def samples(*ids: str, key: str = "tokens") -> Samples:
    return Samples(ids=ids, keys={key: KeyColumn(dtype="int64", lengths=[len(each) for each in ids])})


def sites(graph: Graph) -> dict[str, Site]:
    return {
        call.name: Site(Lane.COMPUTE, MODELS[call.model])
        if isinstance(call, ModelFunctionCall)
        else Site(Lane.FUNCTION, range(1))
        for call in graph.calls
    }


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Up to six calls with several sources and sinks, windows of different sizes, and trained models."""
    calls: list[Call] = []
    keys = ["tokens", "mask"]
    largest = draw(st.integers(1, 8))
    for at in range(draw(st.integers(1, 6))):
        inputs = " ".join(draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True)))
        size = largest if at == 0 else draw(st.integers(1, largest))
        outputs = " ".join(f"k{at}{part}" for part in range(draw(st.integers(0, 2))))
        if draw(st.booleans()) and at > 0:
            calls.append(function_call(f"c{at}", inputs, outputs, batch_size=size))
        else:
            kind, model = draw(st.sampled_from(CallKind)), draw(st.sampled_from(sorted(MODELS)))
            outputs = "" if kind is CallKind.TRAIN_STEP else outputs
            calls.append(model_call(f"c{at}", inputs, outputs, model=model, kind=kind, batch_size=size))
        keys += outputs.split()
    return Graph("g", tuple(draw(st.permutations(calls))), ("tokens", "mask"))


@dataclass
class World:
    """Runs steps of `sizes` sequences to their end; `luck` draws how long everything takes, `fate` what is dropped."""

    graph: Graph
    sizes: list[int]
    max_steps_ahead: int
    luck: random.Random
    fate: int
    now: float = 0.0
    fired: list[tuple[int, str, int, tuple[str, ...]]] = field(default_factory=list)
    """Step, call, window and sequences of each firing that was started."""
    read: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By call and sequence."""
    dropped: dict[str, str] = field(default_factory=dict)
    """By sequence: the calls that dropped it."""
    released: list[str] = field(default_factory=list)
    completed: list[Complete] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)
    most_buffered: int = 0

    def __post_init__(self) -> None:
        self.sites = sites(self.graph)
        self.flow = Dataflow(self.graph, self.sites, self.max_steps_ahead)
        self.batches = [tuple(f"s{step}/{at}" for at in range(size)) for step, size in enumerate(self.sizes)]
        self.gone: dict[str, set[str]] = {call.name: set() for call in self.graph.calls}
        """By call: sequences that it must not read."""
        self.has: set[tuple[str, str]] = set()
        """Sequences and keys that are there."""
        self.done: Counter[tuple[int, str]] = Counter()
        """Sequences that a call has finished or missed, by step and call."""
        self.moving: list[Firing] = []
        self.running: list[Firing] = []
        self.trained: Counter[str] = Counter()
        self._num_events = 0
        self._events: list[tuple[float, int, str, Firing, Samples | None]] = []

    def run(self, max_events: int | None = None) -> None:
        """All steps, or until so many events have happened."""
        step = num_events = 0
        while step < len(self.batches) or self._events:
            if max_events is not None and num_events >= max_events:
                return
            num_events += 1
            if step < len(self.batches) and self.flow.has_room:
                batch = self.batches[step]
                self.has |= {(each, key) for each in batch for key in self.graph.dataset_keys}
                first, *others = self.graph.dataset_keys
                admitted = samples(*batch, key=first)
                for key in others:
                    admitted = admitted.update(samples(*batch, key=key))
                self._obey(self.flow.admit(step, admitted))
                step += 1
            else:
                assert self._events, f"nothing happens any more, and {self.flow.num_in_flight} steps are in flight"
                self.now, _, what, firing, outputs = heapq.heappop(self._events)
                self._happen(what, firing, outputs)
            self._check_bounds()
            self._check_that_the_oldest_is_not_kept_waiting()

    def _happen(self, what: str, firing: Firing, outputs: Samples | None) -> None:
        call, ids = firing.call, firing.samples.ids
        if what == "moved":
            self.moving.remove(firing)
            self._obey(self.flow.moved(firing))
        elif what == "produced":
            assert outputs is not None
            self._put(outputs)
            self._obey(self.flow.produced(firing, outputs))
        else:
            self.running.remove(firing)
            dropped = self._fated(firing)
            for sequence in dropped:
                self.dropped[sequence] = f"{self.dropped.get(sequence, '')} {call.name}"
                for name in self.graph.descendants(call.name):
                    self.gone[name].add(sequence)
            if outputs is not None:
                self._put(outputs)
            self.done[firing.step, call.name] += len(ids)
            if firing.is_last and isinstance(call, ModelFunctionCall) and call.kind is CallKind.TRAIN_STEP:
                self.trained[call.name] += 1
            self._obey(self.flow.finished(firing, outputs, dropped))

    def _obey(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Move(firing):
                    self._check_move(firing)
                    self.moving.append(firing)
                    self._later("moved", firing)
                case Start(firing, lag):
                    self._check_start(firing)
                    self.lags.append(lag)
                    self._start(firing)
                case Release(sequences):
                    self._check_release(sequences)
                case Complete():
                    self.completed.append(action)

    def _start(self, firing: Firing) -> None:
        self.running.append(firing)
        self.fired.append((firing.step, firing.call.name, firing.window, firing.samples.ids))
        self.read.update((firing.call.name, sequence) for sequence in firing.samples.ids)
        kept = [each for each in firing.samples.ids if each not in self._fated(firing)]
        if isinstance(firing.call, FunctionCall) or not kept or not firing.call.outputs:
            outputs = [self._outputs(firing.call, kept)] if kept and firing.call.outputs else [None]
        else:
            self.luck.shuffle(kept)
            cut = self.luck.randrange(len(kept) + 1)
            outputs = [self._outputs(firing.call, part) for part in (kept[:cut], kept[cut:]) if part]
        end = self.now
        for part in outputs[:-1]:
            end = self._later("produced", firing, part)
        self._later("finished", firing, outputs[-1], after=end)

    def _fated(self, firing: Firing) -> tuple[str, ...]:
        """What the firing drops: of functions only, and whatever happens when."""
        if isinstance(firing.call, ModelFunctionCall):
            return ()
        fates = {each: random.Random(f"{self.fate}/{firing.call.name}/{each}").random() for each in firing.samples.ids}
        return tuple(sequence for sequence, fate in fates.items() if fate < 0.3)

    def _outputs(self, call: Call, ids: list[str]) -> Samples:
        return Samples(ids=tuple(ids), keys={key: samples(*ids, key=key).keys[key] for key in call.outputs})

    def _put(self, outputs: Samples) -> None:
        self.has |= {(sequence, key) for sequence in outputs.ids for key in outputs.keys}

    def _later(self, what: str, firing: Firing, outputs: Samples | None = None, after: float | None = None) -> float:
        at = (self.now if after is None else after) + self.luck.choice([0.0, 1.0, self.luck.expovariate(1)])
        self._num_events += 1  # of two at one time, what was put first comes first
        heapq.heappush(self._events, (at, self._num_events, what, firing, outputs))
        return at

    # -- what must hold at every moment ----------------------------------------------------------------------------

    def _check_move(self, firing: Firing) -> None:
        for sequence in firing.samples.ids:
            assert all((sequence, key) in self.has for key in firing.call.inputs), "it moves what is there"
        for other in self.moving:
            assert not self.sites[other.call.name].shares_workers_with(self.sites[firing.call.name])

    def _check_start(self, firing: Firing) -> None:
        site = self.sites[firing.call.name]
        for other in self.running:
            there = self.sites[other.call.name]
            assert there.lane is not site.lane or not there.shares_workers_with(site), "a lane runs one call at a time"
        assert firing not in self.moving, "its inputs have arrived"
        for older in self._older_that_could_run(firing):
            there = self.sites[older.name]
            assert there.lane is not site.lane or not there.shares_workers_with(site), f"{older.name} has a claim"
        assert not self.gone[firing.call.name] & set(firing.samples.ids), "nobody reads what was dropped before it"
        for name in self.graph.waits_for(firing.call.name):
            num_gone = len(self.gone[name] & set(self.batches[firing.step]))
            assert self.done[firing.step, name] + num_gone == len(self.batches[firing.step]), f"{name} comes first"

    def _check_release(self, sequences: tuple[str, ...]) -> None:
        for sequence in sequences:
            for call in self.graph.calls:
                assert self.read[call.name, sequence] == (sequence not in self.gone[call.name]), (
                    "its last reader is done"
                )
            assert not any(sequence in firing.samples.ids for firing in (*self.running, *self.moving))
        self.released += sequences

    def _check_bounds(self) -> None:
        assert self.flow.num_in_flight <= self.max_steps_ahead + 1
        self.most_buffered = max(self.most_buffered, self.flow.num_buffered)
        assert max(self.lags, default=0) <= self.max_steps_ahead, "no weights are staler than that"

    def _check_that_the_oldest_is_not_kept_waiting(self) -> None:
        """Of all windows whose inputs are there, the oldest that does not run is held up by its workers only."""
        for step in range(len(self.batches)):
            for call in self.graph.calls:
                window = self._next_window(step, call)
                if window is None:
                    continue
                site = self.sites[call.name]
                busy = [*self.moving, *self.running]
                assert any(self.sites[other.call.name].shares_workers_with(site) for other in busy), (
                    f"{call.name} of step {step} could run, and does not"
                )
                return

    def _older_that_could_run(self, firing: Firing) -> list[Call]:
        """Calls whose next window is older than this firing, and wants nothing but workers."""
        names = [call.name for call in self.graph.calls]
        younger = (firing.step, names.index(firing.call.name))
        return [
            call
            for step in range(firing.step + 1)
            for place, call in enumerate(self.graph.calls)
            if (step, place) < younger and self._next_window(step, call) is not None
        ]

    def _window_size(self, step: int, call: Call) -> int:
        return -(-len(self.batches[step]) * call.batch_size // self.graph.num_sequences)

    def _left(self, step: int, call: Call) -> tuple[int, tuple[str, ...]]:
        """How many windows of the step the call has begun, and the sequences of those to come."""
        num_fired = sum((at, name) == (step, call.name) for at, name, _, _ in self.fired)
        return num_fired, self.batches[step][num_fired * self._window_size(step, call) :]

    def _next_window(self, step: int, call: Call) -> int | None:
        """The call's next one in this step, if nothing but workers is wanting."""
        num_fired, left = self._left(step, call)
        if not left or any(self._left(older, call)[1] for older in range(step)):  # it goes through steps in order
            return None
        batch = self.batches[step]
        ids = set(left[: self._window_size(step, call)]) - self.gone[call.name]
        if not all((each, key) in self.has for each in ids for key in call.inputs):
            return None
        for name in self.graph.waits_for(call.name):
            if self.done[step, name] + len(self.gone[name] & set(batch)) < len(batch):
                return None
        return num_fired
