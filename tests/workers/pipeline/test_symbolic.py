"""Programs run symbolically, by an interpreter that shares nothing with the verifier but the instruction set.

What an instruction computes is the tuple of what it was computed from. A program is right if, in any order in which
ranks take their turns and with either kind of channel, it ends, leaves nothing over, and has made for every stage what
the graph of stages means. The verifier must take what is right, and must refuse what is not.
"""

import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.errors import ProgramError
from trainmaster.workers.pipeline.dependencies import Channels
from trainmaster.workers.pipeline.instructions import EdgeKind, Instruction, Op, Program, Topology, chained
from trainmaster.workers.pipeline.lowering import lowered
from trainmaster.workers.pipeline.schedules import Kind, schedule
from trainmaster.workers.pipeline.verify import verify

Result = tuple[dict[tuple[int, int], object], Counter[object]]
"""Forwards by (stage, microbatch); gradients of weights, a multiset."""


class Wrong(Exception):
    """The program does something else than it should."""


class Interpreter:
    def __init__(self, program: Program, channels: Channels, draws: random.Random) -> None:
        self.program, self.channels, self.draws = program, channels, draws
        self.topology = program.topology
        self.at = [0] * len(program.ranks)
        self.queues: dict[tuple[int, int, EdgeKind], deque[tuple[object, object]]] = defaultdict(deque)
        self.there: list[dict[object, object]] = [{} for _ in program.ranks]
        """By rank: (edge, microbatch) -> value, of what was received or handed over, and of what is to be sent."""
        self.held: dict[tuple[str, int, int], object] = {}
        """Inputs, activations and gradients of outputs that a stage keeps."""
        self.forwards: dict[tuple[int, int], object] = {}
        self.weights: Counter[object] = Counter()
        self.reduced: Counter[int] = Counter()
        self.recomputed = {(e.stage, e.microbatch) for rank in program.ranks for e in rank if e.op is Op.RECOMPUTE}

    def run(self) -> Result:
        while any(at < len(rank) for at, rank in zip(self.at, self.program.ranks, strict=True)):
            ranks = list(range(len(self.at)))
            self.draws.shuffle(ranks)
            if not sum(map(self.turn, ranks)):
                raise Wrong("nobody can go on")
        if self.held or any(self.there) or any(self.queues.values()):
            raise Wrong("something is left")
        return self.forwards, self.weights

    def turn(self, rank: int) -> bool:
        if self.at[rank] == len(self.program.ranks[rank]):
            return False
        each = self.program.ranks[rank][self.at[rank]]
        if each.op is Op.SEND:
            return self.send(rank, each)
        if each.op is Op.RECEIVE:
            return self.receive(rank, each)
        if each.op is Op.REDUCE:
            self.reduced[each.stage] += 1
        elif each.op is not Op.STEP:
            self.compute(rank, each)
        self.at[rank] += 1
        return True

    def send(self, rank: int, each: Instruction) -> bool:
        source, target = self.topology.ends(each.edge)
        if source != rank or ("out", each.edge, each.microbatch) not in self.there[rank]:
            raise Wrong(f"{each}: nothing to send")
        queue, key = self.queues[source, target, each.edge.kind], (each.edge, each.microbatch)
        if self.channels is Channels.RENDEZVOUS:
            at = self.at[target]
            if at == len(self.program.ranks[target]):
                return False
            other = self.program.ranks[target][at]
            if other.op is not Op.RECEIVE or self.topology.ends(other.edge) != (source, target):
                return False
            if other.edge.kind is not each.edge.kind:
                return False
        queue.append((key, self.there[rank].pop(("out", *key))))
        self.at[rank] += 1
        if self.channels is Channels.RENDEZVOUS:
            self.receive(target, self.program.ranks[target][self.at[target]])
        return True

    def receive(self, rank: int, each: Instruction) -> bool:
        source, target = self.topology.ends(each.edge)
        if target != rank:
            raise Wrong(f"{each}: not here")
        queue = self.queues[source, target, each.edge.kind]
        if not queue:
            return False
        key, value = queue.popleft()
        if key != (each.edge, each.microbatch) or ("in", *key) in self.there[rank]:
            raise Wrong(f"{each}: found {key}")
        self.there[rank]["in", *key] = value
        self.at[rank] += 1
        return True

    def take(self, rank: int, stage: int, kind: EdgeKind, microbatch: int) -> tuple[object, ...]:
        keys = [("in", edge, microbatch) for edge in self.topology.into(stage, kind)]
        if any(key not in self.there[rank] for key in keys):
            raise Wrong(f"{kind} of stage {stage}, microbatch {microbatch} is not there")
        return tuple(self.there[rank].pop(key) for key in keys)

    def give(self, rank: int, stage: int, kind: EdgeKind, microbatch: int, value: object) -> None:
        for edge in self.topology.out_of(stage, kind):
            target = self.topology.ends(edge)[1]
            self.there[rank]["in" if target == rank else "out", edge, microbatch] = value

    def pop(self, name: str, stage: int, microbatch: int) -> object:
        if (name, stage, microbatch) not in self.held:
            raise Wrong(f"{name} of stage {stage}, microbatch {microbatch} is not there")
        return self.held.pop((name, stage, microbatch))

    def compute(self, rank: int, each: Instruction) -> None:
        stage, microbatch = each.stage, each.microbatch
        if (
            stage not in {each.id for each in self.topology.stages_of(rank)}
            or not 0 <= microbatch < self.program.num_microbatches
        ):
            raise Wrong(f"{each}: not here")
        if self.reduced[stage] and each.op is not Op.FORWARD and each.op is not Op.RECOMPUTE:
            raise Wrong(f"{each}: after the reduction")
        match each.op:
            case Op.FORWARD:
                if (stage, microbatch) in self.forwards:
                    raise Wrong(f"{each}: again")
                given = self.take(rank, stage, EdgeKind.ACTIVATION, microbatch)
                self.forwards[stage, microbatch] = value = ("F", stage, microbatch, given)
                if self.program.name != Kind.FORWARD:
                    name = "input" if (stage, microbatch) in self.recomputed else "activation"
                    self.held[name, stage, microbatch] = value
                self.give(rank, stage, EdgeKind.ACTIVATION, microbatch, value)
            case Op.RECOMPUTE:
                self.held["activation", stage, microbatch] = self.pop("input", stage, microbatch)
            case Op.BACKWARD | Op.INPUT_GRADIENT:
                value = (
                    "G",
                    self.pop("activation", stage, microbatch),
                    self.take(rank, stage, EdgeKind.GRADIENT, microbatch),
                )
                self.give(rank, stage, EdgeKind.GRADIENT, microbatch, value)
                if each.op is Op.BACKWARD:
                    self.weights[value] += 1
                else:
                    self.held["gradient", stage, microbatch] = value
            case Op.WEIGHT_GRADIENT:
                self.weights[self.pop("gradient", stage, microbatch)] += 1


def meaning(topology: Topology, m: int, is_training: bool) -> Result:
    """Of the graph of stages, without ranks."""
    forwards: dict[tuple[int, int], object] = {}
    gradients: dict[tuple[int, int], object] = {}

    def forward(s: int, i: int) -> object:
        if (s, i) not in forwards:
            before = tuple(forward(edge.source, i) for edge in topology.into(s, EdgeKind.ACTIVATION))
            forwards[s, i] = ("F", s, i, before)
        return forwards[s, i]

    def gradient(s: int, i: int) -> object:
        if (s, i) not in gradients:
            after = tuple(gradient(edge.source, i) for edge in topology.into(s, EdgeKind.GRADIENT))
            gradients[s, i] = ("G", forward(s, i), after)
        return gradients[s, i]

    pairs = [(stage.id, i) for stage in topology.stages for i in range(m)]
    return {pair: forward(*pair) for pair in pairs}, Counter(gradient(*pair) for pair in pairs if is_training)


def is_right(program: Program, topology: Topology, m: int, is_training: bool) -> bool:
    wanted = meaning(topology, m, is_training)
    for channels in Channels:
        for seed in range(2):
            try:
                if Interpreter(program, channels, random.Random(seed)).run() != wanted:
                    return False
            except Wrong:
                return False
    return True


def is_taken(program: Program) -> bool:
    try:
        verify(program)
    except ProgramError:
        return False
    return True


@given(
    st.sampled_from(Kind), st.integers(1, 4), st.integers(1, 7), st.integers(2, 3), st.booleans(), st.integers(0, 2**32)
)
@settings(max_examples=100, deadline=None)
def test_a_program_does_what_the_stages_mean(kind: Kind, p: int, m: int, v: int, recompute: bool, seed: int):
    program = lowered(schedule(kind, p, m, v), recompute and kind is not Kind.FORWARD)
    wanted = meaning(program.topology, m, kind is not Kind.FORWARD)
    for channels in Channels:
        assert Interpreter(program, channels, random.Random(seed)).run() == wanted


def changes(program: Program) -> Iterator[tuple[str, Program]]:
    """Programs with one thing wrong, or merely elsewhere: dropped, doubled, moved, of another microbatch or stage."""
    for rank, instructions in enumerate(program.ranks):

        def changed(name: str, new: list[Instruction], rank: int = rank) -> tuple[str, Program]:
            ranks = (*program.ranks[:rank], tuple(new), *program.ranks[rank + 1 :])
            return f"rank {rank}: {name}", replace(program, ranks=ranks)

        for at, each in enumerate(instructions):
            before, after = list(instructions[:at]), list(instructions[at + 1 :])
            yield changed(f"{each} dropped", before + after)
            yield changed(f"{each} doubled", [*before, each, each, *after])
            yield changed(f"{each} done again later", [*before, each, *after[:3], each, *after[3:]])
            if each.microbatch is not None:
                for microbatch in (each.microbatch + 1, each.microbatch - 1):
                    other = replace(each, microbatch=microbatch)
                    yield changed(f"{each} of microbatch {microbatch}", [*before, other, *after])
            if each.stage is not None:
                for stage in (each.stage + 1, each.stage - 1):
                    yield changed(f"{each} of stage {stage}", [*before, replace(each, stage=stage), *after])
            if each.edge is not None:
                for edge in program.topology.edges:
                    if edge != each.edge:
                        yield changed(f"{each} on {edge}", [*before, replace(each, edge=edge), *after])
            rest = before + after
            for target in {*range(at - 4, at + 5), 0, len(rest)} & {*range(len(rest) + 1)} - {at}:
                yield changed(f"{each} moved to {target}", [*rest[:target], each, *rest[target:]])
            for other_at in range(at + 1, len(instructions)):
                swapped = list(instructions)
                swapped[at], swapped[other_at] = swapped[other_at], swapped[at]
                yield changed(f"{each} swapped with {instructions[other_at]}", swapped)


def rules(program: Program) -> bool:
    """What the verifier asks beyond what the interpreter sees: a step at the end of each rank, after reductions."""
    for rank, instructions in enumerate(program.ranks):
        wanted = [] if program.name == Kind.FORWARD else [Instruction(Op.STEP)]
        if [each for each in instructions if each.op is Op.STEP] != wanted:
            return False
        if wanted and instructions[-1:] != (Instruction(Op.STEP),):
            return False
        for stage in program.topology.stages_of(rank):
            if instructions.count(Instruction(Op.REDUCE, stage.id)) != len(wanted):
                return False
    stages = {stage.id: stage.rank for stage in program.topology.stages}
    return all(
        stages.get(each.stage) == rank
        for rank, instructions in enumerate(program.ranks)
        for each in instructions
        if each.op is Op.REDUCE
    )


SMALL = [
    pytest.param(kind, p, m, v, recompute, id=f"{kind}-{p}-{m}-{v}{'-recompute' * recompute}")
    for kind, p, m, v, recompute in [
        (Kind.FORWARD, 1, 2, 1, False),
        (Kind.FORWARD, 3, 2, 1, False),
        (Kind.GPIPE, 2, 2, 1, False),
        (Kind.ONE_F_ONE_B, 1, 2, 1, False),
        (Kind.ONE_F_ONE_B, 3, 3, 1, False),
        (Kind.ONE_F_ONE_B, 2, 2, 1, True),
        (Kind.INTERLEAVED, 1, 2, 2, False),
        (Kind.INTERLEAVED, 2, 3, 2, False),
        (Kind.INTERLEAVED, 2, 2, 2, True),
        (Kind.ZB_H1, 2, 3, 1, False),
        (Kind.ZB_H1, 3, 2, 1, True),
    ]
]


@pytest.mark.parametrize(("kind", "p", "m", "v", "recompute"), SMALL)
def test_the_verifier_takes_what_is_right_and_nothing_else(kind: Kind, p: int, m: int, v: int, recompute: bool):
    good = lowered(schedule(kind, p, m, v), recompute)
    is_training = kind is not Kind.FORWARD
    assert is_right(good, good.topology, m, is_training)
    num_right = num_wrong = 0
    for name, candidate in changes(good):
        right = rules(candidate) and is_right(candidate, good.topology, m, is_training)
        assert is_taken(candidate) == right, f"{name}: right {right}"
        num_right, num_wrong = num_right + right, num_wrong + (not right)
    assert num_wrong > 10
    if p > 1 and is_training:
        assert num_right > 0, "some moves do no harm"


@given(st.sampled_from(Kind), st.integers(1, 5), st.integers(1, 8), st.integers(2, 3), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_changes_to_larger_programs_are_judged_rightly(
    kind: Kind, p: int, m: int, v: int, recompute: bool, data: st.DataObject
):
    good = lowered(schedule(kind, p, m, v), recompute and kind is not Kind.FORWARD)
    draws = data.draw(st.randoms(use_true_random=False))
    ranks = [list(rank) for rank in good.ranks]
    rank = draws.choice(ranks)
    at, to = draws.randrange(len(rank)), draws.randrange(len(rank))
    match draws.choice(["drop", "double", "swap", "move"]):
        case "drop":
            rank.pop(at)
        case "double":
            rank.insert(to, rank[at])
        case "swap":
            rank[at], rank[to] = rank[to], rank[at]
        case "move":
            rank.insert(to, rank.pop(at))
    candidate = replace(good, ranks=tuple(map(tuple, ranks)))
    right = rules(candidate) and is_right(candidate, good.topology, m, kind is not Kind.FORWARD)
    assert is_taken(candidate) == right


def test_the_interpreter_knows_a_wrong_program():
    good = lowered(schedule(Kind.ONE_F_ONE_B, 2, 2))
    assert not is_right(replace(good, ranks=good.ranks[::-1]), good.topology, 2, True)
    assert not is_right(good, chained([0, 1]), 3, True)
    assert not is_right(good, good.topology, 2, False)
