"""The turns of all ranks, walked by an executor without tensors, in any order in which messages may arrive."""

import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.workers.pipeline.instructions import EdgeKind, Op
from trainmaster.workers.pipeline.rounds import ring, turns
from trainmaster.workers.pipeline.schedules import generation
from trainmaster.workers.pipeline.slots import ENDED, PAUSED, Claim, Slots


@dataclass
class Case:
    num_ranks: int
    microbatches: list[list[int]]
    lengths: list[int]
    """Of responses."""
    claims: list[Claim]
    max_tokens: int | None
    pause_after: int | None = None
    """Trips of all microbatches together."""
    num_chunks: int = 1

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks


@st.composite
def cases(draw, may_pause=False):
    sizes = draw(st.lists(st.integers(1, 5), min_size=0, max_size=7))
    rows = iter(range(sum(sizes)))
    lengths = [draw(st.integers(1, 7)) for _ in range(sum(sizes))]
    prompts = [draw(st.integers(1, 4)) for _ in lengths]
    claims = [Claim(prompt, prompt + 6) for prompt in prompts]
    room = max((claim.most_tokens for claim in claims), default=1)
    return Case(
        num_ranks=draw(st.integers(1, 5)),
        num_chunks=draw(st.integers(1, 3)),
        microbatches=[[next(rows) for _ in range(size)] for size in sizes],
        lengths=lengths,
        claims=claims,
        max_tokens=draw(st.none() | st.integers(room, 5 * room)),
        pause_after=draw(st.none() | st.integers(1, 8)) if may_pause else None,
    )


@dataclass
class Walker:
    """One rank: its generator, and where it stands."""

    rank: int
    walk: object
    answer: object = None
    turn: object = None
    is_done: bool = False
    begun: dict = field(default_factory=dict)
    """By microbatch: the message that is arriving."""
    made: dict = field(default_factory=dict)
    """By microbatch: the trip and rows of its last pass."""
    log: list = field(default_factory=list)


class Ring:
    """Walks all ranks, one instruction of one rank at a time, whichever the dice say, until none can move."""

    def __init__(self, case, source):
        self.case, self.source, self.topology = case, source, ring(case.num_ranks, case.num_chunks)
        self.walkers = []
        for rank in range(case.num_ranks):
            slots = Slots(case.claims, case.microbatches, case.num_ranks, case.max_tokens)
            self.walkers.append(Walker(rank, turns(self.topology, rank, slots)))
        self.sent = defaultdict(deque)  # by edge and microbatch
        self.order = defaultdict(list)  # of sends and receives, by the ranks that they join
        self.passes = [[] for _ in range(case.num_stages)]  # sequences of each, by stage
        self.drawn, self.num_sampled = Counter(), 0
        self.open = defaultdict(set)  # microbatches, by stage
        self.closed = set()  # by stage and microbatch

    def run(self):
        for walker in self.walkers:
            self.step(walker)
        while ready := [each for each in self.walkers if not each.is_done and self.can(each)]:
            walker = self.source.choice(ready)
            self.execute(walker)
            self.step(walker)
        assert all(walker.is_done for walker in self.walkers), "a deadlock"
        assert not any(self.sent.values()), "a message that nobody took"
        assert len(self.closed) == self.case.num_stages * len({microbatch for _, microbatch in self.closed})
        assert not any(self.open.values())

    def step(self, walker):
        try:
            walker.turn, walker.answer = walker.walk.send(walker.answer), None
        except StopIteration:
            walker.is_done = True

    def receives(self, stage):
        """Whether hidden states come to it from another rank."""
        return stage > 0 and self.case.num_ranks > 1

    def can(self, walker):
        turn, at = walker.turn, walker.turn.instruction
        waits = (turn.is_answered and at.op is Op.RECEIVE) or (at.op is Op.FORWARD and self.receives(at.stage))
        return not waits or len(self.sent[walker.begun[at.microbatch]]) > 0

    def execute(self, walker):
        turn, pool, at = walker.turn, walker.turn.pool, walker.turn.instruction
        walker.log.append(at)
        key = None if at.edge is None else (at.edge.id, at.microbatch)
        if at.stage is not None:
            assert self.topology.stages[at.stage].rank == walker.rank
        match at.op:
            case Op.RECEIVE if turn.is_answered:
                trip, marks = self.sent[walker.begun.pop(at.microbatch)].popleft()
                assert trip == at.trip
                walker.answer = walker.marks = marks
            case Op.RECEIVE:
                assert at.microbatch not in walker.begun, "one message is taken after the other"
                walker.begun[at.microbatch] = key
                source, target = self.topology.ends(at.edge)
                assert target == walker.rank
                self.order["receive", source, target].append((at.edge.id, at.microbatch, at.trip))
            case Op.SEND:
                made, rows = walker.made[at.microbatch]
                is_hidden = at.edge.kind is EdgeKind.ACTIVATION
                assert not is_hidden or made == (at.edge.source, at.trip)
                self.sent[key].append((at.trip, rows if is_hidden else walker.marks))
                source, target = self.topology.ends(at.edge)
                assert source == walker.rank
                self.order["send", source, target].append((at.edge.id, at.microbatch, at.trip))
            case Op.FORWARD:
                self.forward(walker, pool, at)
            case Op.SAMPLE:
                walker.answer = walker.marks = self.sample(pool)
            case Op.CLOSE:
                self.closed.add((at.stage, at.microbatch))
                self.open[at.stage].remove(at.microbatch)

    def forward(self, walker, pool, at):
        if self.receives(at.stage):
            trip, rows = self.sent[walker.begun.pop(at.microbatch)].popleft()
            assert (trip, rows) == (at.trip, pool.rows), "both ends know who is in a message"
        elif at.stage > 0:
            assert walker.made[at.microbatch] == ((at.stage - 1, at.trip), pool.rows), "handed on within the rank"
        assert pool.rows, "a pass of nobody"
        assert (at.stage, at.microbatch) not in self.closed, "a pass of a closed microbatch"
        assert len(pool.rows) <= pool.num_slots
        assert all(self.case.claims[row].most_tokens <= pool.slot_tokens for row in pool.rows)
        if self.case.max_tokens is not None:
            assert pool.num_slots * pool.slot_tokens <= self.case.max_tokens
        assert len(pool.order) + len(pool.joining) == len(pool.rows)
        self.passes[at.stage] += pool.rows
        self.open[at.stage].add(at.microbatch)
        assert len(self.open[at.stage]) <= self.case.num_ranks, "so many caches are held"
        walker.made[at.microbatch] = (at.stage, at.trip), list(pool.rows)

    def sample(self, pool):
        self.num_sampled += 1
        self.drawn.update(pool.rows)
        if self.case.pause_after is not None and self.num_sampled >= self.case.pause_after:
            return [PAUSED] * len(pool.rows)
        return [ENDED if self.drawn[row] == self.case.lengths[row] else 7 for row in pool.rows]


@settings(deadline=None, max_examples=300)
@given(cases(), st.randoms(use_true_random=False))
def test_every_prompt_is_answered_once_and_nothing_is_computed_in_vain(case, source):
    walked = Ring(case, source)
    walked.run()
    wanted = Counter(dict(enumerate(case.lengths)))
    assert walked.drawn == wanted
    for stage, passes in enumerate(walked.passes):
        assert Counter(passes) == wanted, f"stage {stage} computes as many passes of a sequence as it has tokens"


@settings(deadline=None, max_examples=200)
@given(cases(may_pause=True), st.randoms(use_true_random=False))
def test_a_pause_stops_all_ranks_at_once(case, source):
    walked = Ring(case, source)
    walked.run()
    assert all(walked.drawn[row] <= length for row, length in enumerate(case.lengths))
    assert {tuple(sorted(passes)) for passes in walked.passes} == {tuple(sorted(walked.drawn.elements()))}
    if case.pause_after is not None:
        assert walked.num_sampled < case.pause_after + case.num_ranks


@settings(deadline=None, max_examples=200)
@given(cases(may_pause=True), st.randoms(use_true_random=False))
def test_messages_are_received_in_the_order_in_which_they_are_sent(case, source):
    """Tags apart, which NCCL does not know; the way home is a channel of its own."""
    walked = Ring(case, source)
    walked.run()
    pairs = {key[1:] for key in walked.order}
    for pair in pairs:
        assert walked.order["send", *pair] == walked.order["receive", *pair]


@settings(deadline=None, max_examples=100)
@given(cases(), st.randoms(use_true_random=False))
def test_what_is_decided_does_not_depend_on_when_messages_arrive(case, source):
    logs = []
    for each in (source, random.Random(0)):
        walked = Ring(case, each)
        walked.run()
        logs.append([walker.log for walker in walked.walkers])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("trips", [(3,), (3, 5, 9, 20), (2, 1, 4, 1, 6, 2, 3), (1, 1)])
def test_compute_is_that_of_the_program_made_with_hindsight(num_ranks, num_chunks, trips):
    """Which is verified, whatever ends when (test_lowering.py). But a rank closes all its stages as it learns of it."""
    claims = [Claim(1, 20) for _ in trips]
    case = Case(num_ranks, [[row] for row in range(len(trips))], list(trips), claims, None, num_chunks=num_chunks)
    walked = Ring(case, random.Random(0))
    walked.run()
    program = generation(num_ranks, trips, num_chunks)
    for walker, wanted in zip(walked.walkers, program.ranks, strict=True):
        done = [each for each in walker.log if each.op in (Op.FORWARD, Op.SAMPLE, Op.CLOSE)]
        assert Counter(done) == Counter(wanted)
        orders = ([each for each in order if each.op is not Op.CLOSE] for order in (done, wanted))
        assert next(orders) == next(orders)


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_open", [1, 2, 3, 4])
@pytest.mark.parametrize("repeats", [1, 2])
def test_ranks_are_as_busy_as_can_be(num_ranks, num_chunks, num_open, repeats):
    """m / max(m, p), if every pass takes as long and fill and drain are left out."""
    num_microbatches = num_open if num_open < num_ranks else num_ranks * repeats
    num_trips, sequences = 60, [[row] for row in range(num_microbatches)]
    lengths, claims = [num_trips] * num_microbatches, [Claim(1, 1)] * num_microbatches
    case = Case(num_ranks, sequences, lengths, claims, None, num_chunks=num_chunks)
    walked = Ring(case, random.Random(1))
    walked.run()
    orders = [deque(at for at in walker.log if at.op is Op.FORWARD) for walker in walked.walkers]
    free, ends = [0] * num_ranks, {}
    while any(orders):
        for rank, order in enumerate(orders):
            while order:
                stage, microbatch, trip = order[0].stage, order[0].microbatch, order[0].trip
                before = (stage - 1, microbatch, trip) if stage else (case.num_stages - 1, microbatch, trip - 1)
                if (stage or trip) and before not in ends:
                    break
                order.popleft()
                free[rank] = ends[stage, microbatch, trip] = max(free[rank], ends.get(before, 0)) + 1
    utilisation = len(ends) / (num_ranks * max(free))
    assert utilisation == pytest.approx(num_microbatches / max(num_microbatches, num_ranks), rel=0.1)
