import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.system.storage import NO_ROW, Storage


def samples(*ids: str, keys: tuple[str, ...] = ("tokens",)) -> Samples:
    return Samples(ids=ids, keys={key: KeyColumn(dtype="int64", lengths=(1,) * len(ids)) for key in keys})


def test_holders_ascend_whenever_they_came():
    storage = Storage()
    storage.add(3, samples("a"))
    storage.add(1, samples("a", "b"))
    storage.add(3, samples("a"))
    assert storage.holders("a", "tokens") == (1, 3)
    assert storage.holders("b", "tokens") == (1,)
    assert len(storage) == 2


def test_keys_are_held_each_for_itself():
    storage = Storage()
    storage.add(0, samples("a", keys=("tokens", "mask")))
    storage.add(1, samples("a"))
    assert storage.holders("a", "mask") == (0,)
    assert storage.holders("a", "score") == ()
    assert storage.holders("z", "tokens") == ()


def test_workers_of_a_replica_hold_the_same_sequences():
    storage, share = Storage(), samples("a", "b", keys=("tokens", "mask"))
    storage.add(0, share.only(["tokens"]))
    storage.add(1, share)
    assert storage.holders("b", "tokens") == (0, 1)
    assert storage.holders("b", "mask") == (1,)
    storage.release(["b", "a"])
    storage.add(2, samples("c"))
    storage.add(3, share)
    assert [storage.holders(sequence, "tokens") for sequence in "abc"] == [(3,), (3,), (2,)]


def test_release_says_who_has_to_forget_what():
    storage = Storage()
    storage.add(1, samples("a", "b", keys=("tokens", "mask")))
    storage.add(0, samples("b", "c"))
    assert storage.release(["b", "a"]) == {0: ("b",), 1: ("b", "a")}
    assert storage.holders("b", "tokens") == ()
    assert storage.holders("c", "tokens") == (0,)
    assert len(storage) == 1


def test_releasing_what_nobody_holds_is_our_own_mistake():
    with pytest.raises(KeyError, match="a"):
        Storage().release(["a"])


def test_what_is_released_can_be_held_again():
    storage = Storage()
    storage.add(0, samples("a", "b"))
    storage.release(["a"])
    storage.add(2, samples("c", "a", keys=("mask",)))
    assert storage.holders("a", "mask") == (2,)
    assert storage.holders("a", "tokens") == ()
    assert storage.holders("b", "tokens") == (0,)
    assert storage.holders("c", "mask") == (2,)


def test_holders_of_many_are_looked_up_at_once():
    storage = Storage()
    storage.add(1, samples("a", "b", keys=("tokens", "mask")))
    storage.add(0, samples("b"))
    rows = storage.rows(("b", "z", "a", "b"))
    counts, ranks = storage.look_up("tokens", rows)
    assert counts.tolist() == [2, 0, 1, 2]
    assert ranks.tolist() == [0, 1, 1, 0, 1]
    counts, ranks = storage.look_up("unheard", rows)
    assert (counts.tolist(), ranks.tolist()) == ([0] * 4, [])


def test_what_came_together_is_known_until_something_is_released():
    storage, share = Storage(), samples("a", "b", keys=("tokens", "mask"))
    storage.add(1, share.only(["tokens"]))
    storage.add(1, samples("b", keys=("mask",)))
    storage.add(2, share)
    assert storage.held_together(1, ("a", "b")) == {"tokens"}
    assert storage.held_together(1, ("b",)) == {"mask"}
    assert storage.held_together(2, ("a", "b")) == {"tokens", "mask"}
    assert storage.held_together(2, ("b", "a")) == storage.held_together(0, ("a", "b")) == set()
    storage.release(["a"])
    assert storage.held_together(2, ("a", "b")) == set()
    storage.add(3, samples("c"))  # in the row that was a's
    assert storage.rows(("a", "b")).tolist() == [NO_ROW, *storage.rows(("b",)).tolist()]
    assert [storage.holders(each, "tokens") for each in "abc"] == [(), (1, 2), (3,)]


RANKS, NAMES, KEYS = st.integers(0, 3), st.sampled_from("abcd"), st.sampled_from(("tokens", "mask"))
steps = st.one_of(
    st.tuples(RANKS, st.lists(NAMES, unique=True), st.lists(KEYS, unique=True)), st.lists(NAMES, unique=True)
)


@settings(max_examples=50)
@given(st.lists(steps, max_size=12))
def test_it_agrees_with_a_plain_dictionary(steps: list[tuple[int, list[str], list[str]] | list[str]]):
    storage, held = Storage(), {}
    for step in steps:
        if isinstance(step, tuple):
            rank, ids, keys = step
            storage.add(rank, samples(*ids, keys=tuple(keys)))
            for name in ids:
                holdings = held.setdefault(name, set())
                holdings.update((key, rank) for key in keys)
        else:
            gone = [name for name in step if name in held]
            expected: dict[int, list[str]] = {}
            for name in gone:
                for rank in {rank for _, rank in held.pop(name)}:
                    expected.setdefault(rank, []).append(name)
            assert storage.release(gone) == {rank: tuple(names) for rank, names in expected.items()}
        assert len(storage) == len(held)
        for name in "abcd":
            for key in ("tokens", "mask"):
                ranks = {rank for at, rank in held.get(name, set()) if at == key}
                assert storage.holders(name, key) == tuple(sorted(ranks))
