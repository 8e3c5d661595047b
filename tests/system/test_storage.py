import pytest
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.system.storage import Storage


def samples(*ids: str, keys: tuple[str, ...] = ("tokens",)) -> Samples:
    return Samples(ids=ids, keys={key: KeyColumn(dtype="int64", lengths=(1,) * len(ids)) for key in keys})


def test_holders_are_in_the_order_in_which_they_came():
    storage = Storage()
    storage.add(3, samples("a"))
    storage.add(1, samples("a", "b"))
    storage.add(3, samples("a"))
    assert storage.holders("a", "tokens") == (3, 1)
    assert storage.holders("b", "tokens") == (1,)
    assert len(storage) == 2


def test_keys_are_held_each_for_itself():
    storage = Storage()
    storage.add(0, samples("a", keys=("tokens", "mask")))
    storage.add(1, samples("a"))
    assert storage.holders("a", "mask") == (0,)
    assert storage.holders("a", "score") == ()
    assert storage.holders("z", "tokens") == ()


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
