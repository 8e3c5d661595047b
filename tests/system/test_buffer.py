import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.api.algorithms import SupervisedLoss
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.graph import CallKind, Graph, Microbatching, ModelFunctionCall
from trainmaster.system.buffer import SequenceBuffer


def call(name: str, inputs: str, outputs: str = "") -> ModelFunctionCall:
    return ModelFunctionCall(
        name=name,
        model="actor",
        kind=CallKind.INFERENCE,
        settings=SupervisedLoss(),
        inputs=tuple(inputs.split()),
        outputs=tuple(outputs.split()),
        batch_size=4,
        minibatch_size=4,
        microbatching=Microbatching(max_tokens=8),
    )


def samples(*ids: str, key: str = "tokens") -> Samples:
    return Samples(ids=ids, keys={key: KeyColumn(dtype="int64", lengths=tuple(range(1, len(ids) + 1)))})


SCORE, TRAIN = call("score", "tokens", "score"), call("train", "tokens score")
GRAPH = Graph("g", (SCORE, TRAIN), ("tokens",))


def test_a_call_takes_the_oldest_and_each_once():
    buffer = SequenceBuffer(GRAPH)
    buffer.admit(samples("a", "b", "c"))
    assert buffer.take(SCORE, 2) == samples("a", "b")
    assert buffer.take(SCORE, 2) is None
    assert buffer.take(SCORE, 1) == samples("a", "b", "c").select([2])
    assert buffer.take(SCORE, 1) is None


def test_a_take_that_finds_too_few_takes_none():
    buffer = SequenceBuffer(GRAPH)
    buffer.admit(samples("a"))
    assert buffer.take(SCORE, 2) is None
    assert buffer.take(SCORE, 1) == samples("a")


def test_a_call_waits_until_all_its_inputs_are_there():
    buffer = SequenceBuffer(GRAPH)
    buffer.admit(samples("a", "b"))
    assert buffer.take(TRAIN, 1) is None
    buffer.amend(samples("b", key="score"))
    taken = buffer.take(TRAIN, 1)
    assert taken is not None
    assert taken.ids == ("b",)
    assert (taken.lengths("tokens"), taken.lengths("score")) == ((2,), (1,))


def test_a_call_sees_its_own_inputs_only():
    buffer = SequenceBuffer(GRAPH)
    buffer.admit(samples("a"))
    buffer.amend(samples("a", key="score"))
    taken = buffer.take(SCORE, 1)
    assert taken is not None
    assert set(taken.keys) == {"tokens"}


def test_a_sequence_retires_after_its_last_reader():
    buffer = SequenceBuffer(GRAPH)
    buffer.admit(samples("a", "b"))
    assert buffer.finish(SCORE, ["a", "b"]) == ()
    assert buffer.finish(TRAIN, ["b"]) == ("b",)
    assert len(buffer) == 1
    assert buffer.finish(TRAIN, ["a"]) == ("a",)
    assert len(buffer) == 0


def test_admitting_a_sequence_twice_is_our_own_mistake():
    buffer = SequenceBuffer(GRAPH)
    buffer.admit(samples("a"))
    with pytest.raises(AssertionError, match="sequence a is admitted twice"):
        buffer.admit(samples("a"))


@given(st.permutations(range(8)), st.lists(st.integers(1, 4), max_size=8))
def test_every_call_reads_every_sequence_once_in_order_of_admission(finishing: list[int], counts: list[int]):
    buffer = SequenceBuffer(GRAPH)
    ids = [f"s{at}" for at in range(8)]
    buffer.admit(samples(*ids))
    buffer.amend(samples(*ids, key="score"))
    for each in (SCORE, TRAIN):
        seen: list[str] = []
        for count in [*counts, *[1] * 8]:
            taken = buffer.take(each, count)
            seen += taken.ids if taken is not None else ()
        assert seen == ids
    buffer.finish(SCORE, ids)
    assert [buffer.finish(TRAIN, [ids[at]]) for at in finishing] == [(ids[at],) for at in finishing]
    assert len(buffer) == 0


def test_a_dropped_sequence_is_not_waited_for_and_retires_with_its_last_reader():
    buffer = SequenceBuffer(GRAPH)
    buffer.admit(samples("a", "b", "c"))
    assert buffer.take(SCORE, buffer.num_open(SCORE)) == samples("a", "b", "c")
    buffer.amend(samples("a", "c", key="score"))
    assert buffer.drop(["b"]) == (), "the score is still being computed"
    assert buffer.num_open(TRAIN) == 2
    taken = buffer.take(TRAIN, 2)
    assert taken is not None
    assert taken.ids == ("a", "c")
    assert buffer.finish(SCORE, ["a", "b", "c"]) == ("b",)
    assert buffer.finish(TRAIN, ["a", "c"]) == ("a", "c")
    assert len(buffer) == 0


def test_a_batch_that_was_dropped_whole_is_taken_as_nothing():
    buffer = SequenceBuffer(GRAPH)
    buffer.admit(samples("a"))
    buffer.take(SCORE, 1)
    buffer.drop(["a"])
    assert buffer.take(TRAIN, buffer.num_open(TRAIN)) == Samples(ids=(), keys={})
