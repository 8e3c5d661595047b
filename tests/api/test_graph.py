import pytest
from trainmaster.api.algorithms import SupervisedLoss
from trainmaster.api.errors import ConfigError
from trainmaster.api.graph import CallKind, Graph, Microbatching, ModelFunctionCall


def call(name: str, inputs: str = "", outputs: str = "", batch_size: int = 4) -> ModelFunctionCall:
    return ModelFunctionCall(
        name=name,
        model="actor",
        kind=CallKind.INFERENCE,
        settings=SupervisedLoss(),
        inputs=tuple(inputs.split()),
        outputs=tuple(outputs.split()),
        batch_size=batch_size,
        minibatch_size=batch_size,
        microbatching=Microbatching(max_tokens=8),
    )


def test_calls_are_in_dependency_order_whatever_order_they_are_given_in():
    calls = [call("a", "score"), call("z", "tokens", "score"), call("m", "tokens score", "value")]
    for given in (calls, calls[::-1], [calls[1], calls[0], calls[2]]):
        assert [each.name for each in Graph("g", tuple(given), ("tokens",)).calls] == ["z", "a", "m"]


def test_edges_carry_their_keys():
    graph = Graph("g", (call("use", "mask tokens score"), call("score", "tokens", "score other")), ("tokens", "mask"))
    assert graph.edges.edges["dataset", "use"]["keys"] == ("mask", "tokens")
    assert graph.edges.edges["score", "use"]["keys"] == ("score",)
    assert set(graph.edges.edges) == {("dataset", "use"), ("dataset", "score"), ("score", "use")}


def test_the_batch_size_is_the_largest_calls():
    assert Graph("g", (call("a", batch_size=3), call("b", batch_size=5)), ("tokens",)).batch_size == 5


def test_call_names_are_unique():
    with pytest.raises(ConfigError, match=r"graph g = \['a', 'a'\]: call names must be unique\. Rename one\."):
        Graph("g", (call("a"), call("a")), ("tokens",))


def test_a_call_cannot_take_the_name_of_the_graphs_source():
    with pytest.raises(ConfigError, match="dataset"):
        Graph("g", (call("dataset", outputs="score"),), ("tokens",))


def test_a_key_has_one_producer():
    with pytest.raises(ConfigError, match=r"graph g, call b, outputs = 'score': a produces this key already\. Rename"):
        Graph("g", (call("a", "tokens", "score"), call("b", "tokens", "score")), ("tokens",))


def test_a_call_cannot_produce_what_the_dataset_has():
    with pytest.raises(ConfigError, match="call a, outputs = 'tokens': dataset produces this key already"):
        Graph("g", (call("a", "tokens", "tokens"),), ("tokens",))


def test_an_input_that_nobody_produces_is_named():
    with pytest.raises(
        ConfigError, match=r"call a, inputs = 'scroe': no call produces .* has only tokens, mask\. Add a call"
    ):
        Graph("g", (call("a", "scroe"),), ("tokens", "mask"))


def test_a_cycle_is_named():
    with pytest.raises(ConfigError, match=r"graph g = '(a -> b|b -> a)': calls must not form a cycle\. Break it"):
        Graph("g", (call("a", "y", "x"), call("b", "x", "y")), ("tokens",))


def test_a_call_that_reads_its_own_output_is_a_cycle():
    with pytest.raises(ConfigError, match="graph g = 'a': calls must not form a cycle"):
        Graph("g", (call("a", "x", "x"),), ("tokens",))
