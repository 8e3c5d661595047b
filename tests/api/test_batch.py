from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.api.batch import MAX_LENGTH, KeyColumn, Samples
from trainmaster.api.errors import ConfigError

LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=40)


def samples(lengths: list[int], prefix: str = "s") -> Samples:
    keys = {
        "tokens": KeyColumn(dtype="int64", lengths=tuple(lengths)),
        "values": KeyColumn(dtype="float32", lengths=tuple(2 * length for length in lengths), trailing=(3,)),
    }
    return Samples(ids=tuple(f"{prefix}{at}" for at in range(len(lengths))), keys=keys)


@st.composite
def rich(draw: st.DrawFn, ids: Sequence[str] | None = None, prefix: str = "k") -> Samples:
    """Up to three keys; some of them with any number of sequences a sample."""
    if ids is None:
        ids = [f"s{at}" for at in range(draw(st.integers(0, 6)))]
    keys = {}
    for at in range(draw(st.integers(0, 3))):
        counts = draw(st.none() | st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids)))
        number = len(ids) if counts is None else sum(counts)
        keys[f"{prefix}{at}"] = KeyColumn(
            dtype=draw(st.sampled_from(["bool", "int64", "bfloat16"])),
            lengths=draw(st.lists(st.integers(0, 9), min_size=number, max_size=number)),
            trailing=draw(st.sampled_from([(), (2,), (0, 3)])),
            counts=counts,
        )
    return Samples(ids=tuple(ids), keys=keys)


def plain(whole: Samples) -> list[tuple[str, dict[str, list[int]]]]:
    """Of each sample: its id, and the lengths of its sequences by key."""
    found: list[tuple[str, dict[str, list[int]]]] = [(identity, {}) for identity in whole.ids]
    for key, column in whole.keys.items():
        left = column.lengths.tolist()
        for at, (_, lengths) in enumerate(found):
            count = 1 if column.counts is None else int(column.counts[at])
            lengths[key], left = left[:count], left[count:]
        assert not left
    return found


@given(rich(), st.data())
def test_select_takes_samples_whole(whole: Samples, data: st.DataObject):
    positions = data.draw(st.lists(st.integers(0, len(whole) - 1), unique=True)) if len(whole) else []
    part = whole.select(positions)
    assert plain(part) == [plain(whole)[at] for at in positions]
    assert all(part.keys[key].has_type_of(column) for key, column in whole.keys.items())
    for key in whole.keys:
        assert part.sizes(key) == tuple(sum(lengths[key]) for _, lengths in plain(part))


@given(rich(), st.data())
def test_a_split_can_be_undone(whole: Samples, data: st.DataObject):
    order = data.draw(st.permutations(range(len(whole))))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))) | {0, len(whole)})
    groups = [order[start:stop] for start, stop in pairwise(cuts)] or [order]
    assert Samples.unsplit(whole.split(groups), groups) == whole
    assert Samples.gather(
        whole.select(order).split([range(start, stop) for start, stop in pairwise(cuts)]) or [whole]
    ) == (whole.select(order))


@given(rich(), st.data())
def test_cuts_are_parts_one_after_the_other(whole: Samples, data: st.DataObject):
    ends = [*sorted(data.draw(st.lists(st.integers(0, len(whole))))), len(whole)]
    pairs = list(pairwise([0, *ends]))
    parts = whole.cut([end - start for start, end in pairs])
    assert parts == [whole.select(range(start, end)) for start, end in pairs]


def test_equal_ids_can_be_those_of_others():
    ours, theirs, others = samples([1, 2]), samples([3, 4]), samples([3, 4], prefix="t")
    assert theirs.named_as(ours) == theirs
    assert theirs.named_as(ours).ids is ours.ids
    assert theirs.named_as(others) is theirs


@given(rich())
def test_samples_by_themselves_come_together_again(whole: Samples):
    parts = whole.unpack()
    assert [part.ids for part in parts] == [(identity,) for identity in whole.ids]
    assert not parts or Samples.gather(parts) == whole


@given(rich(), st.data())
def test_an_update_adds_keys_whatever_the_order(whole: Samples, data: st.DataObject):
    more = data.draw(rich(data.draw(st.permutations(whole.ids)), prefix=data.draw(st.sampled_from("kn"))))
    both = whole.update(more)
    assert both.ids == whole.ids
    assert both.only(more.keys) == more.select([more.ids.index(identity) for identity in whole.ids])
    kept = [key for key in whole.keys if key not in more.keys]
    assert both.only(kept) == whole.only(kept)


@given(rich(), st.data())
def test_keys_are_renamed_all_at_once(whole: Samples, data: st.DataObject):
    names = dict(zip(whole.keys, data.draw(st.permutations(list(whole.keys))), strict=True))
    renamed = whole.remap(names)
    assert renamed.keys == {names[key]: column for key, column in whole.keys.items()}
    assert renamed.remap({new: old for old, new in names.items()}).keys == whole.keys
    assert whole.remap({"nothing": "else"}) == whole


def test_a_swap_of_two_keys_loses_none():
    swapped = samples([3, 4]).remap({"tokens": "values", "values": "tokens"})
    assert swapped.keys["values"].dtype == "int64"
    assert swapped.keys["tokens"].trailing == (3,)


def test_two_keys_of_one_name_are_refused():
    with pytest.raises(AssertionError, match="two keys would have one name"):
        samples([1]).remap({"tokens": "values"})


def test_an_update_of_other_samples_is_refused():
    with pytest.raises(AssertionError, match="the same samples"):
        samples([1, 2]).update(samples([1, 2], prefix="other"))


def test_gather_refuses_keys_of_different_types():
    other = (
        samples([1], "x")
        .only(["values"])
        .update(Samples(ids=("x0",), keys={"tokens": KeyColumn(dtype="int32", lengths=(1,))}))
    )
    with pytest.raises(AssertionError, match="key tokens differs in type"):
        Samples.gather([samples([1]), other])


@pytest.mark.parametrize("lengths", [[-1], [1.5], ["a"], [[1]], [MAX_LENGTH + 1]])
def test_lengths_are_whole_numbers(lengths: list[object]):
    with pytest.raises(ConfigError, match=r"KeyColumn\.lengths.*(must be a list of whole numbers|must lie between 0)"):
        KeyColumn(dtype="int64", lengths=lengths)


def test_counts_add_up():
    with pytest.raises(ConfigError, match="counts add up to 3, but there are 2 lengths"):
        KeyColumn(dtype="int64", lengths=[1, 2], counts=[3])


def test_every_key_has_every_sample():
    with pytest.raises(ConfigError, match="key tokens has 2 samples, but there are 1 ids"):
        Samples(ids=("a",), keys={"tokens": KeyColumn(dtype="int64", lengths=[1, 2])})


def test_lengths_take_little_room():
    column = KeyColumn(dtype="int64", lengths=np.arange(10))
    assert column.lengths.dtype == np.int32
    assert column.sizes.dtype == np.int64
    assert KeyColumn(dtype="int64", lengths=[MAX_LENGTH] * 4, counts=[4]).sizes.tolist() == [4 * MAX_LENGTH]
