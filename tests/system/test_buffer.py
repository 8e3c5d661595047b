import numpy as np
import pytest
from flows import function_call, model_call, samples
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.graph import Graph
from trainmaster.system.buffer import SequenceBuffer

SCORE, TRAIN = function_call("score", "tokens", "score"), model_call("train", "tokens score")
GRAPH = Graph("g", (SCORE, TRAIN), ("tokens",))


def test_inputs_are_seen_once_all_are_there():
    buffer = SequenceBuffer(GRAPH, samples("a", "bb", "ccc"))
    assert buffer.look(SCORE, 0, 2) == samples("a", "bb")
    assert buffer.look(TRAIN, 0, 2) is None
    buffer.amend(samples("bb", key="score"))
    assert buffer.look(TRAIN, 0, 2) is None
    assert buffer.look(TRAIN, 1, 2) == samples("bb").update(samples("bb", key="score"))
    buffer.amend(samples("ccc", "a", key="score"))
    assert buffer.look(TRAIN, 0, 9) == samples("a", "bb", "ccc").update(samples("a", "bb", "ccc", key="score"))


def test_a_call_sees_its_own_inputs_only():
    buffer = SequenceBuffer(GRAPH, samples("a"))
    buffer.amend(samples("a", key="score"))
    seen = buffer.look(SCORE, 0, 1)
    assert seen is not None
    assert set(seen.keys) == {"tokens"}


def test_a_sequence_retires_after_its_last_reader():
    buffer = SequenceBuffer(GRAPH, samples("a", "b"))
    assert buffer.finish(SCORE, ["a", "b"]) == ()
    assert buffer.finish(TRAIN, ["b"]) == ("b",)
    assert len(buffer) == 1
    assert buffer.finish(TRAIN, ["a"]) == ("a",)
    assert len(buffer) == 0


def test_what_was_dropped_is_not_seen_and_retires_with_its_last_reader():
    buffer = SequenceBuffer(GRAPH, samples("a", "b", "c"))
    buffer.amend(samples("a", "c", key="score"))
    assert buffer.finish(SCORE, ["a", "b", "c"], dropped=["b"]) == ("b",)
    assert buffer.num_gone(TRAIN) == 1
    seen = buffer.look(TRAIN, 0, 3)
    assert seen is not None
    assert seen.ids == ("a", "c")


def test_a_window_that_was_dropped_whole_is_seen_as_nothing():
    buffer = SequenceBuffer(GRAPH, samples("a"))
    buffer.finish(SCORE, ["a"], dropped=["a"])
    assert buffer.look(TRAIN, 0, 1) == Samples(ids=(), keys={})


def test_a_missing_output_is_named():
    buffer = SequenceBuffer(GRAPH, samples("a", "b"))
    assert buffer.lacks(SCORE, ["a"]) == ("a", "score")
    buffer.amend(samples("a", key="score"))
    assert buffer.lacks(SCORE, ["a"]) is None
    assert buffer.lacks(SCORE, ["a", "b"]) == ("b", "score")


def test_admitting_a_sequence_twice_is_our_own_mistake():
    with pytest.raises(AssertionError, match="sequences have unique ids"):
        SequenceBuffer(GRAPH, samples("a", "a"))


@given(st.data())
def test_columns_come_back_as_they_came_whatever_the_parts(data: st.DataObject):
    counts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=10))
    ids = [f"s{at}" for at in range(len(counts))]
    lengths = {
        each: data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
        for each, n in zip(ids, counts, strict=True)
    }
    buffer = SequenceBuffer(GRAPH, samples(*ids))
    order = data.draw(st.permutations(ids))
    while order:
        part, order = order[: (cut := data.draw(st.integers(1, len(order))))], order[cut:]
        column = KeyColumn(
            dtype="int64",
            lengths=np.asarray([n for each in part for n in lengths[each]], np.int32),
            counts=[len(lengths[each]) for each in part],
        )
        buffer.amend(Samples(ids=tuple(part), keys={"score": column}))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids)))))
    seen = buffer.look(TRAIN, start, stop)
    assert seen is not None
    assert seen.ids == tuple(ids[start:stop])
    if seen.ids:
        assert list(seen.lengths("score")) == [n for each in ids[start:stop] for n in lengths[each]]
