from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.errors import RunError
from trainmaster.system.redistribution import keys_of_stage, plan_redistribution
from trainmaster.system.rpc.commands import Parcel
from trainmaster.system.storage import Storage

KEYS = ("tokens", "loss_mask", "values")
NUM_RANKS, NUM_SEQUENCES = 5, 6
EVERYTHING = Samples(
    ids=tuple(f"s{at}" for at in range(NUM_SEQUENCES)),
    keys={
        key: KeyColumn(dtype="float32", lengths=tuple(10 * (at + 1) for at in range(NUM_SEQUENCES)), trailing=(place,))
        for place, key in enumerate(KEYS)
    },
)


def chosen(positions: list[int], keys: tuple[str, ...]) -> Samples:
    part = EVERYTHING.select(positions)
    return Samples(ids=part.ids, keys={key: part.keys[key] for key in keys})


def cells(samples: Samples) -> list[tuple[str, str]]:
    return [(sequence, key) for sequence in samples.ids for key in samples.keys]


Held = dict[tuple[int, str], set[int]]
Needs = dict[int, tuple[Samples, tuple[str, ...]]]


@st.composite
def situations(draw: st.DrawFn) -> tuple[Storage, Held, Needs]:
    """Holders of every key of every sequence, and what each rank needs."""
    storage, held = Storage(), {}
    for position in range(NUM_SEQUENCES):
        for key in KEYS:
            ranks = draw(st.lists(st.integers(0, NUM_RANKS - 1), min_size=1, max_size=3, unique=True))
            held[position, key] = set(ranks)
            for rank in ranks:
                storage.add(rank, chosen([position], (key,)))
    needs = {}
    for rank in draw(st.sets(st.integers(0, NUM_RANKS - 1))):
        positions = draw(st.lists(st.integers(0, NUM_SEQUENCES - 1), unique=True))
        keys = tuple(draw(st.lists(st.sampled_from(KEYS), unique=True)))
        needs[rank] = (EVERYTHING.select(positions), keys)
    return storage, held, needs


@settings(max_examples=40)
@given(situations())
def test_what_is_needed_arrives_once_and_nothing_that_is_held_is_sent(drawn: tuple[Storage, Held, Needs]):
    storage, held, needs = drawn
    plan = plan_redistribution(needs, storage, tag=7)
    for rank in range(NUM_RANKS):
        arrives: Counter[tuple[str, str]] = Counter()
        if rank in plan:
            for parcel in plan[rank].receives:
                for block in parcel.blocks:
                    arrives.update(cells(block))
        samples, keys = needs.get(rank, (chosen([], ()), ()))
        wanted = {
            (sequence, key) for sequence in samples.ids for key in keys if rank not in held[int(sequence[1:]), key]
        }
        assert arrives == Counter(wanted)


@settings(max_examples=40)
@given(situations())
def test_sends_and_receives_mirror_each_other_in_order(drawn: tuple[Storage, Held, Needs]):
    """Messages of one pair have one tag: their order is all that tells them apart."""
    storage, _, needs = drawn
    plan = plan_redistribution(needs, storage, tag=7)

    def between(source: int, target: int) -> tuple[list[Samples], list[Samples]]:
        sends = plan[source].sends if source in plan else ()
        receives = plan[target].receives if target in plan else ()
        return (
            [block for parcel in sends if target in parcel.peers for block in parcel.blocks],
            [block for parcel in receives if parcel.peers == (source,) for block in parcel.blocks],
        )

    for source in range(NUM_RANKS):
        for target in range(NUM_RANKS):
            sent, received = between(source, target)
            assert sent == received
            assert source != target or not sent
    assert all(part.tag == 7 for part in plan.values())


@settings(max_examples=40)
@given(situations())
def test_only_holders_send_and_metadata_stays_true(drawn: tuple[Storage, Held, Needs]):
    storage, held, needs = drawn
    for rank, part in plan_redistribution(needs, storage, tag=0).items():
        assert part.sends or part.receives
        for block in (block for parcel in part.sends for block in parcel.blocks):
            positions = [int(sequence[1:]) for sequence in block.ids]
            assert block == chosen(positions, tuple(block.keys))
            assert all(rank in held[position, key] for position in positions for key in block.keys)


def test_receivers_are_spread_over_holders():
    storage = Storage()
    for rank in (0, 1):
        storage.add(rank, chosen([0], ("tokens",)))
    plan = plan_redistribution({rank: (EVERYTHING.select([0]), ("tokens",)) for rank in (2, 3)}, storage, tag=0)
    parcel = chosen([0], ("tokens",))
    assert plan[0].sends == (Parcel(peers=(2,), blocks=(parcel,)),)
    assert plan[1].sends == (Parcel(peers=(3,), blocks=(parcel,)),)


def test_a_worker_with_no_part_is_left_out():
    storage = Storage()
    storage.add(0, chosen([0], KEYS))
    assert plan_redistribution({0: (EVERYTHING.select([0]), KEYS)}, storage, tag=0) == {}


def test_what_nobody_holds_is_named():
    storage = Storage()
    storage.add(0, chosen([1], ("tokens",)))
    with pytest.raises(RunError, match="no worker holds key loss_mask of sequence s1, which worker 2 needs"):
        plan_redistribution({2: (EVERYTHING.select([1]), ("tokens", "loss_mask"))}, storage, tag=0)


def test_only_the_last_stage_receives_keys_besides_tokens():
    assert keys_of_stage(("tokens", "loss_mask"), is_last=False) == ("tokens",)
    assert keys_of_stage(("tokens", "loss_mask"), is_last=True) == ("tokens", "loss_mask")
