import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.algorithms import SupervisedLoss
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.errors import RunError
from trainmaster.api.graph import CallKind, Microbatching, ModelFunctionCall
from trainmaster.system.redistribution import keys_of_stage, plan_redistribution
from trainmaster.system.rpc.codec import encode_body
from trainmaster.system.rpc.messages import Lane, Request
from trainmaster.system.rpc.parcels import Parcel, Redistribute, StepKind
from trainmaster.system.storage import Storage

NUM_RANKS, NUM_SAMPLES, NUM_WAVES = 9, 5, 4
WIDTHS = {"tokens": 8, "mask": 1, "values": 4, "choices": 2}
KEYS = tuple(WIDTHS)
EVERYTHING = Samples(
    ids=tuple(f"s{at}" for at in range(NUM_SAMPLES)),
    keys={
        "tokens": KeyColumn(dtype="int64", lengths=(10, 20, 0, 30, 5)),
        "mask": KeyColumn(dtype="bool", lengths=(1, 2, 3, 4, 5), trailing=(3,)),
        "values": KeyColumn(dtype="float32", lengths=(7, 7, 7, 7, 7), trailing=(0,)),
        "choices": KeyColumn(dtype="bfloat16", lengths=(2, 3, 4, 1, 1, 6), counts=(2, 1, 0, 1, 2)),
    },
)
Cell = tuple[str, str]
Needs = dict[int, tuple[Samples, tuple[str, ...]]]
Plan = dict[int, Redistribute]


@dataclass(frozen=True, kw_only=True)
class Situation:
    holdings: tuple[tuple[int, int, str], ...]
    """Rank, position of a sample in `EVERYTHING`, key."""
    needs: Needs
    hosts: tuple[str, ...]

    @property
    def storage(self) -> Storage:
        storage = Storage()
        for rank, position, key in self.holdings:
            storage.add(rank, EVERYTHING.select([position]).only([key]))
        return storage

    @property
    def held(self) -> dict[int, set[Cell]]:
        held: dict[int, set[Cell]] = {rank: set() for rank in range(NUM_RANKS)}
        for rank, position, key in self.holdings:
            held[rank].add((f"s{position}", key))
        return held

    def wanted(self, rank: int) -> set[Cell]:
        samples, keys = self.needs.get(rank, (EVERYTHING.select([]), ()))
        return {(sequence, key) for sequence in samples.ids for key in keys}

    def plan(self) -> Plan:
        return plan_redistribution(self.needs, self.storage, tag=7, hosts=self.hosts)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """Holders of every key of every sample, some workers' needs, some of them alike, and where the workers are."""
    ranks = st.integers(0, NUM_RANKS - 1)
    holdings = [
        (rank, position, key)
        for position in range(NUM_SAMPLES)
        for key in KEYS
        for rank in draw(st.lists(ranks, min_size=1, max_size=4, unique=True))
    ]
    some = st.lists(st.integers(0, NUM_SAMPLES - 1), unique=True)
    shares = [(EVERYTHING.select(draw(some)), tuple(draw(st.permutations(KEYS)))) for _ in range(3)]
    needs = {}
    for rank in draw(st.sets(ranks)):
        samples, keys = draw(st.sampled_from(shares))
        needs[rank] = (samples, keys[: draw(st.integers(0, len(keys)))])
    hosts = draw(st.lists(st.sampled_from("abc"), min_size=NUM_RANKS - 1, max_size=NUM_RANKS))
    return Situation(holdings=tuple(holdings), needs=needs, hosts=tuple(hosts))


def cells_of(parcel: Parcel) -> list[Cell]:
    return [(sequence, key) for block in parcel.blocks for sequence in block.ids for key in block.keys]


def sent(plan: Plan) -> Iterator[tuple[int, int, Parcel]]:
    """Each parcel once for each receiver."""
    for source, part in plan.items():
        yield from ((source, target, parcel) for parcel in part.sends for target in parcel.peers)


@settings(max_examples=50)
@given(situations())
def test_wave_by_wave_what_is_needed_arrives_once_and_nothing_else(situation: Situation):
    plan, held = situation.plan(), situation.held
    arrived: dict[int, Counter[Cell]] = {rank: Counter() for rank in range(NUM_RANKS)}
    for wave in range(NUM_WAVES):
        moves = [(source, target, cells_of(parcel)) for source, target, parcel in sent(plan) if parcel.wave == wave]
        for source, target, cells in moves:
            assert cells
            assert held[source].issuperset(cells)
            arrived[target].update(cells)
        for _, target, cells in moves:
            held[target].update(cells)
    for rank in range(NUM_RANKS):
        assert arrived[rank] == Counter(situation.wanted(rank) - situation.held[rank])


@settings(max_examples=30)
@given(situations())
def test_sends_and_receives_mirror_each_other_in_order(situation: Situation):
    """Messages of one pair have one tag: their order is all that tells them apart."""
    plan = situation.plan()
    for rank, part in plan.items():
        assert part.tag == 7
        assert part.sends or part.receives
        for parcels in (part.sends, part.receives):
            waves = [parcel.wave for parcel in parcels]
            assert waves == sorted(waves)
            assert set(waves) <= set(range(NUM_WAVES))
        for other in plan:
            going = [(each.wave, each.kind, each.blocks) for each in part.sends if other in each.peers]
            coming = [(each.wave, each.kind, each.blocks) for each in plan[other].receives if each.peers == (rank,)]
            assert going == coming
            assert rank != other or not going
        assert {peer for parcel in (*part.sends, *part.receives) for peer in parcel.peers} <= plan.keys()


@settings(max_examples=30)
@given(situations())
def test_metadata_is_true_and_wider_types_come_first(situation: Situation):
    for part in situation.plan().values():
        for parcel in (*part.sends, *part.receives):
            for block in parcel.blocks:
                assert block == EVERYTHING.select([int(sequence[1:]) for sequence in block.ids]).only(block.keys)
            widths = [WIDTHS[key] for block in parcel.blocks for key in block.keys]
            assert widths == sorted(widths, reverse=True)
            assert len(widths) == len(parcel.blocks)


@settings(max_examples=30)
@given(situations())
def test_a_cell_enters_each_host_once_and_only_one_that_lacks_it(situation: Situation):
    hosts = (*situation.hosts, "")  # one rank may have no host
    entered = Counter(
        (hosts[target], cell)
        for source, target, parcel in sent(situation.plan())
        for cell in cells_of(parcel)
        if hosts[source] != hosts[target]
    )
    there = {(hosts[rank], cell) for rank, cells in situation.held.items() for cell in cells}
    wanted = {(hosts[rank], cell) for rank in range(NUM_RANKS) for cell in situation.wanted(rank)}
    assert entered == Counter(wanted - there)


@settings(max_examples=30)
@given(situations())
def test_kinds_are_what_they_are_called(situation: Situation):
    plan = situation.plan()
    single = [(source, parcel) for source, _, parcel in sent(plan) if len(parcel.peers) == 1]
    by_source = Counter((source, parcel.wave) for source, parcel in single)
    by_target = Counter((parcel.peers, parcel.wave) for _, parcel in single)
    for source, target, parcel in sent(plan):
        num_sent, num_received = by_source[source, parcel.wave], by_target[(target,), parcel.wave]
        match parcel.kind:
            case StepKind.BROADCAST:
                assert len(parcel.peers) > 1
            case StepKind.SCATTER:
                assert len(parcel.peers) == 1 < num_sent
            case StepKind.GATHER:
                assert len(parcel.peers) == num_sent == 1 < num_received
            case StepKind.DIRECT:
                assert len(parcel.peers) == num_sent == num_received == 1


@settings(max_examples=30)
@given(situations(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_any_order(situation: Situation, draw: random.Random):
    holdings, needs = list(situation.holdings), list(situation.needs.items())
    draw.shuffle(holdings)
    draw.shuffle(needs)
    other = Situation(holdings=tuple(holdings), needs=dict(needs), hosts=situation.hosts)
    assert list(other.plan().items()) == list(situation.plan().items())


@settings(max_examples=30)
@given(situations())
def test_workers_need_not_share_their_samples_objects(situation: Situation):
    needs = {rank: (samples.select(range(len(samples))), keys) for rank, (samples, keys) in situation.needs.items()}
    assert Situation(holdings=situation.holdings, needs=needs, hosts=situation.hosts).plan() == situation.plan()


# -- balance ----------------------------------------------------------------------------------------------------------

MANY = Samples(
    ids=tuple(f"s{at}" for at in range(96)),
    keys={
        "tokens": KeyColumn(dtype="int64", lengths=np.arange(96) % 37 + 40),
        "scores": KeyColumn(dtype="float32", lengths=np.arange(96) % 23 + 30),
    },
)


def bytes_sent(plan: Plan, num_ranks: int) -> list[int]:
    return [
        sum(
            int(column.sizes.sum()) * {"int64": 8, "float32": 4}[column.dtype] * len(parcel.peers)
            for parcel in plan[rank].sends
            for block in parcel.blocks
            for column in block.keys.values()
        )
        if rank in plan
        else 0
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_one_that_holds_everything_is_relayed(num_hosts: int):
    """It sends each cell once; nobody sends more."""
    storage = Storage()
    storage.add(0, MANY)
    hosts = [f"host{rank * num_hosts // 16}" for rank in range(16)]
    plan = plan_redistribution(dict.fromkeys(range(16), (MANY, ("tokens", "scores"))), storage, 0, hosts)
    loads = bytes_sent(plan, 16)
    assert max(loads) <= 1.2 * sum(loads) / 16


def test_replicas_share_the_sending():
    """Four hold everything on one host; four on another get it."""
    storage = Storage()
    for rank in range(4):
        storage.add(rank, MANY)
    plan = plan_redistribution(dict.fromkeys(range(4, 8), (MANY, ("tokens",))), storage, 0, ["a"] * 4 + ["b"] * 4)
    loads = bytes_sent(plan, 8)
    assert max(loads[:4]) <= 1.1 * sum(loads[:4]) / 4
    assert max(loads[4:]) <= 1.1 * sum(loads[4:]) / 4


def test_holders_of_one_host_share_the_sending():
    storage = Storage()
    for rank in (0, 1):
        storage.add(rank, MANY)
    plan = plan_redistribution({2: (MANY, ("tokens",))}, storage, 0, ["a"] * 3)
    first, second, third = bytes_sent(plan, 3)
    assert abs(first - second) <= 0.05 * first
    assert third == 0
    assert {parcel.wave for part in plan.values() for parcel in part.sends} == {0}


def test_the_bars_at_a_small_size():
    """The benchmark's, at a sixteenth of its size: 4 hosts of 4, groups of 8."""
    draw = random.Random(5)
    storage = Storage()
    for position in range(96):
        for key in MANY.keys:
            for rank in draw.sample(range(16), draw.randint(1, 3)):
                storage.add(rank, MANY.select([position]).only([key]))
    hosts = [f"host{rank // 4}" for rank in range(16)]
    shares = [MANY.select(range(group, 96, 2)) for group in range(2)]
    plan = plan_redistribution({rank: (shares[rank // 8], tuple(MANY.keys)) for rank in range(16)}, storage, 0, hosts)
    loads = bytes_sent(plan, 16)
    assert max(loads) <= 1.2 * sum(loads) / 16
    for part in plan.values():
        request = Request(run="r", epoch=1, id=1, lane=Lane.TRANSFER, deadline_s=1, submitted_s=0, command=part)
        assert sum(map(len, encode_body(request))) < 8192


def test_a_host_of_more_than_sixty_four():
    storage = Storage()
    storage.add(99, MANY)
    needs = dict.fromkeys(range(70), (MANY, ("tokens",)))
    plan = plan_redistribution(needs, storage, 0)
    for rank in range(70):
        assert sorted(cell for parcel in plan[rank].receives for cell in cells_of(parcel)) == sorted(
            (identity, "tokens") for identity in MANY.ids
        )


# -- the ends ---------------------------------------------------------------------------------------------------------


def test_a_worker_with_no_part_is_left_out():
    storage = Storage()
    storage.add(0, EVERYTHING)
    assert plan_redistribution({0: (EVERYTHING.select([0]), KEYS)}, storage, tag=0) == {}
    assert plan_redistribution({1: (EVERYTHING.select([]), KEYS), 2: (EVERYTHING, ())}, storage, tag=0) == {}
    assert plan_redistribution({}, Storage(), tag=0) == {}


def test_a_message_has_only_its_workers_part():
    storage = Storage()
    storage.add(0, EVERYTHING)
    needs = {1: (EVERYTHING.select([3]), ("mask",)), 2: (EVERYTHING.select([1, 0]), ("tokens", "mask"))}
    plan = plan_redistribution(needs, storage, tag=0)
    assert plan[1].ids == ("s3",)
    assert [key.name for key in plan[1].keys] == ["mask"]
    assert plan[2].ids == ("s1", "s0")


@pytest.mark.parametrize(
    ("held", "keys", "missing"),
    [
        ([1], ("tokens", "mask"), "key mask of sequence s1"),
        ([], ("tokens",), "key tokens of sequence s1"),
        ([1], ("tokens", "unheard"), "key unheard of sequence s0"),
    ],
)
def test_what_nobody_holds_is_named(held: list[int], keys: tuple[str, ...], missing: str):
    storage = Storage()
    storage.add(0, EVERYTHING.select(held).only(["tokens"]))
    storage.add(0, EVERYTHING.select([0]))
    needs = {2: (EVERYTHING.select([0, 1]), keys), 3: (EVERYTHING.select([4]), KEYS)}
    with pytest.raises(RunError, match=f"no worker holds {missing}, which worker 2 needs"):
        plan_redistribution(dict(reversed(needs.items())), storage, tag=0)


def call_that_reads(*keys: str, **input_remap: str) -> ModelFunctionCall:
    return ModelFunctionCall(
        name="score",
        model="actor",
        kind=CallKind.INFERENCE,
        settings=SupervisedLoss(),
        inputs=keys,
        input_remap=input_remap,
        batch_size=1,
        minibatch_size=1,
        microbatching=Microbatching(max_tokens=8),
    )


@pytest.mark.parametrize(
    ("call", "every_stage"),
    [
        (call_that_reads("tokens", "loss_mask"), ("tokens",)),
        (call_that_reads("prompt", "loss_mask"), ("prompt",)),
        (call_that_reads("loss_mask", "chosen", chosen="tokens"), ("chosen",)),
        (call_that_reads("tokens", "prompt", tokens="prompt", prompt="tokens"), ("tokens", "prompt")),
        (call_that_reads("chosen", "tokens", chosen="tokens", tokens="rejected"), ("chosen",)),
    ],
)
def test_only_the_last_stage_receives_what_the_algorithm_does_not_know_as_tokens(call, every_stage):
    assert keys_of_stage(call, is_last=False, reads_tokens=True) == every_stage
    assert keys_of_stage(call, is_last=True, reads_tokens=True) == call.inputs


def test_a_stage_that_has_no_use_for_tokens_receives_nothing():
    assert keys_of_stage(call_that_reads("tokens", "loss_mask"), is_last=False, reads_tokens=False) == ()
