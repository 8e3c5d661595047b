import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from exchange import KEYS, packed, raw, samples, store_with, value
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.workers.data.packed import PackedSamples
from trainmaster.workers.data.store import Store, describe

ALL = tuple(KEYS)


def filled() -> tuple[Store, Samples]:
    values = {
        "tokens": [torch.tensor([1, 2, 3]), torch.tensor([4])],
        "values": [torch.ones(3, 2, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.bfloat16)],
    }
    store = Store()
    for key, tensors in values.items():
        for sequence, tensor in zip("ab", tensors, strict=True):
            store.put(sequence, key, tensor)
    return store, describe(values, "ab")


def parcel(num_samples: int, prefix: str = "s", size: int = 8) -> PackedSamples:
    """Samples with the same number of values each, in one piece of memory."""
    column = KeyColumn(dtype="int64", lengths=np.full(num_samples, size))
    ids = tuple(f"{prefix}{at}" for at in range(num_samples))
    values = torch.arange(num_samples * size)
    return PackedSamples(samples=Samples(ids=ids, keys={"tokens": column}), values={"tokens": values})


def memory_of(part: PackedSamples) -> "weakref.ref[torch.UntypedStorage]":
    return weakref.ref(part["tokens"].untyped_storage())


def test_values_are_described_without_their_content():
    _, samples = filled()
    assert samples == Samples(
        ids=("a", "b"),
        keys={
            "tokens": KeyColumn(dtype="int64", lengths=(3, 1)),
            "values": KeyColumn(dtype="bfloat16", lengths=(3, 1), trailing=(2,)),
        },
    )


def test_packed_values_follow_the_order_of_the_samples():
    store, samples = filled()
    assert store.packed(samples)["tokens"].tolist() == [1, 2, 3, 4]
    assert store.packed(samples.select([1, 0]))["tokens"].tolist() == [4, 1, 2, 3]
    assert store.packed(samples.only(["values"]))["values"].shape == (4, 2)
    assert store.packed(samples.select([]))["values"].shape == (0, 2)


def test_packed_values_can_be_written_where_there_is_memory():
    store, samples = filled()
    memory = store.packed(samples.select([1, 0]))
    written = store.packed(samples, into=memory)
    assert written["tokens"].data_ptr() == memory["tokens"].data_ptr()
    assert memory["tokens"].tolist() == [1, 2, 3, 4]


@given(st.lists(st.text("abc", max_size=2), min_size=1, max_size=5, unique=True), st.data())
def test_what_is_added_can_be_had_sample_by_sample_and_packed(ids: list[str], data: st.DataObject):
    keys = data.draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=4, unique=True))
    store = Store()
    store.add([packed(ids, keys)])
    for sequence in ids:
        for key in keys:
            assert raw(store.get(sequence, key)) == raw(value(sequence, key))
    order = data.draw(st.permutations(ids))
    again = store.packed(samples(order, keys))
    assert [raw(again[key]) for key in keys] == [raw(packed(order, keys)[key]) for key in keys]


def test_absent_data_is_not_added():
    store, part = Store(), packed(["a"], ("tokens", "mask"))
    store.add([PackedSamples(samples=part.samples, values={"tokens": part["tokens"], "mask": None})])
    assert len(store) == 1
    assert ("a", "tokens") in store
    assert ("a", "mask") not in store


def test_values_of_another_type_or_length_than_the_metadata_says_are_our_own_mistake():
    store, samples = filled()
    longer = Samples(ids=("a",), keys={"tokens": KeyColumn(dtype="int64", lengths=(4,))})
    with pytest.raises(AssertionError, match=r"tokens of a is torch.int64 \[3\], but the plan says torch.int64 \[4\]"):
        store.packed(longer)
    narrower = Samples(ids=("a",), keys={"tokens": KeyColumn(dtype="int32", lengths=(3,))})
    with pytest.raises(AssertionError, match=r"tokens of a is torch.int64 \[3\], but the plan says torch.int32 \[3\]"):
        store.packed(narrower)
    assert store.packed(samples)["tokens"].tolist() == [1, 2, 3, 4]


def test_a_microbatch_has_tokens_and_the_keys_that_were_asked_for():
    store, samples = filled()
    microbatch = store.microbatch(samples, ["tokens", "values"], torch.device("cpu"))
    assert microbatch.tokens.tolist() == [[1, 2, 3, 4]]
    assert microbatch.num_tokens == 4
    assert set(microbatch.keys) == {"values"}
    assert microbatch.keys["values"].shape == (4, 2)


def test_tokens_that_a_stage_has_no_use_for_are_zeros_and_need_not_be_there():
    _, samples = filled()
    microbatch = Store().microbatch(samples, [], torch.device("cpu"))
    assert microbatch.tokens.tolist() == [[0, 0, 0, 0]]
    assert microbatch.packed.seqlens == samples.lengths("tokens")


def test_a_microbatch_knows_keys_by_other_names():
    store, samples = filled()
    swapped = Samples(ids=samples.ids, keys={"values": samples.keys["tokens"], "tokens": samples.keys["values"]})
    other = Store()
    for sequence in samples.ids:
        other.put(sequence, "values", store.get(sequence, "tokens"))
        other.put(sequence, "tokens", store.get(sequence, "values"))
    keys = {"tokens": "values", "values": "tokens"}
    got = other.microbatch(swapped, ["tokens", "values"], torch.device("cpu"), keys)
    wanted = store.microbatch(samples, ["tokens", "values"], torch.device("cpu"))
    assert got.tokens.equal(wanted.tokens)
    assert got.packed.seqlens == wanted.packed.seqlens
    assert got.keys["values"].equal(wanted.keys["values"])


def test_many_are_put_at_once_and_described():
    store = Store()
    made = store.put_all([("a", {"tokens": torch.tensor([1, 2])}), ("b", {"tokens": torch.tensor([3])})])
    assert made == Samples(ids=("a", "b"), keys={"tokens": KeyColumn(dtype="int64", lengths=(2, 1))})
    assert store.get("a", "tokens").tolist() == [1, 2]


# -- release ----------------------------------------------------------------------------------------------------------


def test_release_forgets_every_key_of_a_sequence():
    store, _ = filled()
    assert len(store) == 4
    store.release(["a", "unknown"])
    assert len(store) == 2
    assert [(sequence, "tokens") in store for sequence in ("a", "b", "unknown")] == [False, True, False]
    assert store.get("b", "tokens").tolist() == [4]
    with pytest.raises(AssertionError, match="the plan says that this worker holds tokens of a"):
        store.get("a", "tokens")


def test_a_value_of_its_own_is_freed_as_it_is_released():
    store, _ = filled()
    memory = weakref.ref(store.get("a", "tokens").untyped_storage())
    store.release(["b"])
    assert memory() is not None
    store.release(["a"])
    assert memory() is None


def test_shared_memory_is_kept_while_half_of_it_is_in_use_and_freed_then():
    store, part = Store(), parcel(4)
    memory = memory_of(part)
    store.add([part])
    del part
    store.release(["s0", "s1"])
    assert memory() is not None
    assert store.get("s2", "tokens").untyped_storage().nbytes() == 4 * 8 * 8
    store.release(["s2"])
    assert memory() is None, "s3 has moved out"
    assert store.get("s3", "tokens").tolist() == list(range(24, 32))
    assert store.get("s3", "tokens").untyped_storage().nbytes() == 8 * 8
    store.release(["s3"])
    assert len(store) == 0


def test_what_is_released_together_is_not_moved_before(monkeypatch: pytest.MonkeyPatch):
    store, left, move_out = Store(), [], Store._move_out

    def watched(self, shared):
        left.append(set(shared.used))
        move_out(self, shared)

    monkeypatch.setattr(Store, "_move_out", watched)
    store.add([parcel(4)])
    store.release(["s0", "s1", "s2", "s3"])
    assert left == [set()]


def test_parts_that_were_added_together_share_memory_and_are_freed_together():
    """A sample's keys may lie in several parts of a parcel."""
    buffer = torch.arange(6)
    columns = [KeyColumn(dtype="int64", lengths=[1, 2]) for _ in range(2)]
    parts = [
        PackedSamples(samples=Samples(ids=("a", "b"), keys={key: column}), values={key: buffer[3 * at : 3 * at + 3]})
        for at, (key, column) in enumerate(zip(("x", "y"), columns, strict=True))
    ]
    memory = weakref.ref(buffer.untyped_storage())
    store = Store()
    store.add(parts)
    del buffer, parts
    gc.collect()
    store.release(["b"])
    assert memory() is None
    assert [store.get("a", key).tolist() for key in ("x", "y")] == [[0], [3]]


def test_what_was_taken_from_the_store_lives_on():
    store, part = Store(), parcel(2)
    store.add([part])
    taken = store.get("s1", "tokens")
    store.release(part.samples.ids)
    assert taken.tolist() == list(range(8, 16))


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(st.lists(sizes, min_size=1, max_size=4), st.data())
def test_the_store_keeps_at_most_twice_of_what_was_not_released_and_in_the_end_nothing(
    lengths: list[list[int]], data: st.DataObject
):
    store, memory, left = Store(), [], {}
    for at, each in enumerate(lengths):
        column = KeyColumn(dtype="int64", lengths=np.asarray(each))
        ids = tuple(f"{at}/{place}" for place in range(len(each)))
        buffer = torch.full((sum(each),), at)
        memory.append((weakref.ref(buffer.untyped_storage()), buffer.nbytes))
        store.add([PackedSamples(samples=Samples(ids=ids, keys={"x": column}), values={"x": buffer})])
        left |= dict(zip(ids, each, strict=True))
        del buffer
    while left:
        gone = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        store.release(gone)
        for sequence in gone:
            del left[sequence]
        used = {at: 8 * sum(size for name, size in left.items() if name.startswith(f"{at}/")) for at in range(4)}
        for at, (buffer, num_bytes) in enumerate(memory):
            assert (buffer() is not None) <= (num_bytes <= 2 * used[at])
        for sequence, size in left.items():
            assert store.get(sequence, "x").tolist() == [int(sequence.split("/")[0])] * size
    assert len(store) == 0
    assert all(buffer() is None for buffer, num_bytes in memory if num_bytes)


def test_two_lanes_use_the_store_at_once_and_leave_nothing():
    store, memory = Store(), []

    def lane(name: str) -> None:
        for at in range(100):
            part = parcel(8, f"{name}/{at}/")
            memory.append(memory_of(part))
            ids, metadata = part.samples.ids, part.samples
            store.add([part])
            store.put(ids[0], "more", torch.tensor([at]))
            del part
            store.release(ids[:5])
            assert store.packed(metadata.select([5, 6, 7]))["tokens"].tolist() == list(range(40, 64))
            store.release(ids[5:])

    with ThreadPoolExecutor(2) as lanes:
        for done in [lanes.submit(lane, name) for name in ("compute", "transfer")]:
            done.result()
    gc.collect()
    assert len(store) == 0
    assert not [each for each in memory if each() is not None]


def test_a_store_of_many_samples_releases_a_few_at_their_own_cost():
    """By count of what is looked at: all that was ever put must not be."""
    store = store_with([(f"s{at}", "tokens") for at in range(100)])
    seen: list[str] = []

    class Watched(dict[str, dict[str, torch.Tensor]]):
        def __iter__(self):
            seen.append("all")
            return super().__iter__()

        def pop(self, sequence: str, *default: object):
            seen.append(sequence)
            return super().pop(sequence, *default)

    store._values = Watched(store._values)
    store.release(["s3", "s4"])
    assert seen == ["s3", "s4"]
