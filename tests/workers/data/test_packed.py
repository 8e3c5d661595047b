from dataclasses import replace

import pytest
import torch
from exchange import KEYS, SEVERAL, packed, raw
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.errors import ConfigError
from trainmaster.workers.data.packed import PackedSamples

Plain = list[tuple[str, dict[str, list[bytes] | None]]]
"""Samples as lists: an id, and by key the bytes of each sequence; None where the data is absent."""
ALL = tuple(KEYS)
names = st.lists(st.text("abc", max_size=2), min_size=1, max_size=6, unique=True)
some_keys = st.lists(st.sampled_from(ALL), min_size=1, max_size=5, unique=True)


def without(whole: PackedSamples, absent: set[str]) -> PackedSamples:
    """With only the metadata of these keys."""
    return replace(whole, values={key: None if key in absent else value for key, value in whole.values.items()})


@st.composite
def wholes(draw: st.DrawFn, ids: st.SearchStrategy[list[str]] = names) -> PackedSamples:
    """With any keys, some of them absent."""
    keys = draw(some_keys)
    return without(packed(draw(ids), keys), draw(st.sets(st.sampled_from(keys))))


def plain(whole: PackedSamples) -> Plain:
    """Read off sequence by sequence."""
    found: Plain = [(identity, {}) for identity in whole.samples.ids]
    for key, value in whole.values.items():
        lengths, column = iter(whole.samples.lengths(key)), whole.samples.keys[key]
        left = b"" if value is None else raw(value)
        for at, (_, keys) in enumerate(found):
            sequences = []
            for _ in range(1 if column.counts is None else int(column.counts[at])):
                shape = (next(lengths), *KEYS[key][1])
                num_bytes = torch.Size(shape).numel() * KEYS[key][0].itemsize
                sequences.append(left[:num_bytes])
                left = left[num_bytes:]
            keys[key] = None if value is None else sequences
        assert not left
        assert next(lengths, None) is None
    return found


def same(one: PackedSamples, other: PackedSamples) -> bool:
    return one.samples == other.samples and plain(one) == plain(other)


# -- operations, against their metadata and against lists -------------------------------------------------------------


@given(wholes(), st.data())
def test_select_takes_positions_in_their_order(whole: PackedSamples, data: st.DataObject):
    positions = data.draw(st.lists(st.integers(0, len(whole) - 1), unique=True))
    chosen, listed = whole.select(positions), plain(whole)
    assert chosen.samples == whole.samples.select(positions)
    assert plain(chosen) == [listed[at] for at in positions]


@given(wholes().flatmap(lambda whole: st.tuples(st.just(whole), st.permutations(range(len(whole))))))
def test_a_reordering_and_its_inverse_cancel(drawn: tuple[PackedSamples, list[int]]):
    whole, order = drawn
    assert same(whole.select(order).select([order.index(at) for at in range(len(order))]), whole)


@given(wholes(), st.data())
def test_only_takes_keys(whole: PackedSamples, data: st.DataObject):
    keys = data.draw(st.lists(st.sampled_from(sorted(whole.values)), unique=True))
    chosen = whole.only(keys)
    assert chosen.samples == whole.samples.only(keys)
    assert plain(chosen) == [(identity, {key: had[key] for key in keys}) for identity, had in plain(whole)]


@given(wholes(), st.data())
def test_a_split_is_what_select_makes_and_unsplit_undoes_it(whole: PackedSamples, data: st.DataObject):
    order = data.draw(st.permutations(range(len(whole))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=3)))
    groups = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    parts, listed = whole.split(groups), plain(whole)
    assert [part.samples for part in parts] == whole.samples.split(groups)
    assert [plain(part) for part in parts] == [[listed[at] for at in group] for group in groups]
    assert same(PackedSamples.unsplit(parts, groups), whole)


@given(wholes())
def test_unpack_and_gather_cancel(whole: PackedSamples):
    parts = whole.unpack()
    assert [part.samples for part in parts] == whole.samples.unpack()
    assert [plain(part) for part in parts] == [[sample] for sample in plain(whole)]
    assert same(PackedSamples.gather(parts), whole)


@given(names, names, some_keys, st.sets(st.sampled_from(ALL)))
def test_gather_lays_parts_one_after_the_other(first: list[str], second: list[str], keys: list[str], absent: set[str]):
    parts = [without(packed([f"{at}/{each}" for each in ids], keys), absent) for at, ids in enumerate((first, second))]
    gathered = PackedSamples.gather(parts)
    assert gathered.samples == Samples.gather([part.samples for part in parts])
    assert plain(gathered) == plain(parts[0]) + plain(parts[1])


@given(wholes(), some_keys, st.data())
def test_update_adds_and_replaces_keys_of_samples_in_any_order(
    whole: PackedSamples, keys: list[str], data: st.DataObject
):
    ids = data.draw(st.permutations(whole.samples.ids))
    other = packed([f"another {identity}" for identity in ids], keys)
    more = without(
        PackedSamples(samples=Samples(ids=tuple(ids), keys=other.samples.keys), values=other.values),
        data.draw(st.sets(st.sampled_from(keys))),
    )
    updated, added = whole.update(more), dict(plain(more))
    assert updated.samples == whole.samples.update(more.samples)
    assert plain(updated) == [(identity, had | added[identity]) for identity, had in plain(whole)]


@given(wholes().flatmap(lambda whole: st.tuples(st.just(whole), st.permutations(sorted(whole.values)))))
def test_remap_renames_all_at_once_and_back(drawn: tuple[PackedSamples, list[str]]):
    """Any permutation of the keys: swaps and cycles too."""
    whole, order = drawn
    forth = dict(zip(sorted(whole.values), order, strict=True))
    renamed = whole.remap(forth)
    assert renamed.samples == whole.samples.remap(forth)
    assert all(renamed.values[forth[key]] is value for key, value in whole.values.items())
    assert same(renamed.remap({new: old for old, new in forth.items()}), whole)


def test_remap_swaps_two_keys_and_leaves_the_others():
    whole = packed(["a", "b"], ("tokens", "mask", "half"))
    swapped = whole.remap({"tokens": "mask", "mask": "tokens"})
    assert swapped["mask"] is whole["tokens"]
    assert swapped["tokens"] is whole["mask"]
    assert swapped["half"] is whole["half"]


@given(wholes())
def test_values_by_sample_are_the_sequences_of_each_behind_one_another(whole: PackedSamples):
    listed = plain(whole)
    for key in whole.present:
        assert [raw(value) for value in whole.by_sample(key)] == [b"".join(keys[key]) for _, keys in listed]
    num_bytes = [sum(len(b"".join(each)) for each in keys.values() if each is not None) for _, keys in listed]
    assert whole.bytes_by_sample.tolist() == num_bytes


def test_the_values_drawn_here_are_of_every_kind():
    ids = [f"s{at}" for at in range(200)]
    whole = packed(ids, ALL)
    assert {whole[key].dtype for key in ALL} >= {torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    assert (whole["tokens"].abs() > 2**24).any()
    assert whole["hidden"].isnan().any()
    for key in SEVERAL:
        assert {0, 1, 3} <= set(whole.samples.keys[key].counts.tolist())
        assert 0 in whole.samples.lengths(key)


def test_integers_past_the_reach_of_floats_stay():
    tokens = torch.tensor([2**24 + 1, 2**53 + 1, -(2**63)])
    samples = Samples(ids=("a", "b"), keys={"tokens": KeyColumn(dtype="int64", lengths=[1, 2])})
    whole = PackedSamples(samples=samples, values={"tokens": tokens})
    assert PackedSamples.gather(whole.split([[1], [0]]))["tokens"].tolist() == [2**53 + 1, -(2**63), 2**24 + 1]


# -- checks -----------------------------------------------------------------------------------------------------------

METADATA = Samples(ids=("a", "b"), keys={"scores": KeyColumn(dtype="bfloat16", lengths=[1, 2], trailing=(4,))})


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(3, 4), r"float32 \[3, 4\]"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), r"bfloat16 \[2, 4\]"),
        (torch.zeros(3, 5, dtype=torch.bfloat16), r"bfloat16 \[3, 5\]"),
        (torch.zeros(12, dtype=torch.bfloat16), r"bfloat16 \[12\]"),
    ],
)
def test_values_that_are_not_as_the_metadata_says_are_refused(value: torch.Tensor, found: str):
    with pytest.raises(ConfigError, match=rf"values.scores = '{found}': must be bfloat16 \[3, 4\], as the metadata"):
        PackedSamples(samples=METADATA, values={"scores": value})


def test_keys_must_be_those_of_the_metadata():
    with pytest.raises(ConfigError, match=r"values = \['score'\]: must have the keys .* which are \['scores'\]"):
        PackedSamples(samples=METADATA, values={"score": None})


def test_a_type_that_torch_has_not_is_refused_once_there_are_values():
    samples = Samples(ids=("a",), keys={"x": KeyColumn(dtype="float7", lengths=[1])})
    assert PackedSamples(samples=samples, values={"x": None}).present == ()
    with pytest.raises(ConfigError, match=r"x.dtype = 'float7': must name a torch type"):
        PackedSamples(samples=samples, values={"x": torch.zeros(1)})


def test_parts_that_only_some_have_the_data_of_cannot_be_gathered():
    whole = packed(["a", "b"], ("tokens",))
    parts = whole.unpack()
    with pytest.raises(AssertionError, match="the data of key tokens is absent in some of the parts"):
        PackedSamples.gather([parts[0], without(parts[1], {"tokens"})])


def test_absent_data_cannot_be_read():
    with pytest.raises(AssertionError, match="the data of key scores is absent"):
        PackedSamples(samples=METADATA, values={"scores": None})["scores"]
