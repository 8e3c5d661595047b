from dataclasses import replace

import pytest
from trainmaster.api.algorithms import SupervisedLoss
from trainmaster.api.errors import ConfigError
from trainmaster.api.graph import Call, CallKind, Graph, Microbatching, ModelFunctionCall
from trainmaster.api.hooks import Reshard


def call(name: str, inputs: str = "", outputs: str = "", batch_size: int = 4, **fields) -> ModelFunctionCall:
    return ModelFunctionCall(
        **{
            "name": name,
            "model": "actor",
            "kind": CallKind.INFERENCE,
            "settings": SupervisedLoss(),
            "inputs": tuple(inputs.split()),
            "outputs": tuple(outputs.split()),
            "batch_size": batch_size,
            "minibatch_size": batch_size,
            "microbatching": Microbatching(max_tokens=8),
            **fields,
        }
    )


def train(name: str, inputs: str, outputs: str = "", model: str = "actor") -> ModelFunctionCall:
    return call(name, inputs, outputs, model=model, kind=CallKind.TRAIN_STEP)


def names(calls: tuple[Call, ...]) -> list[str]:
    return [each.name for each in calls]


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


# -- kinship ----------------------------------------------------------------------------------------------------------

#   dataset --tokens--> a --x--> b --y--> d          e
#                       |---x--> c --z--> d
DIAMOND = Graph(
    "g",
    (call("d", "y z"), call("c", "x tokens", "z"), call("b", "x", "y"), call("a", "tokens", "x"), call("e", "tokens")),
    ("tokens",),
)


def test_parents_and_children_are_one_step_away():
    kin = {each: (names(DIAMOND.parents(each)), names(DIAMOND.children(each))) for each in "abcde"}
    assert kin == {
        "a": ([], ["b", "c"]),
        "b": (["a"], ["d"]),
        "c": (["a"], ["d"]),
        "d": (["b", "c"], []),
        "e": ([], []),
    }


def test_descendants_are_all_that_follow():
    assert {each: DIAMOND.descendants(each) for each in "abcde"} == {
        "a": {"b", "c", "d"},
        "b": {"d"},
        "c": {"d"},
        "d": set(),
        "e": set(),
    }


def test_sources_read_the_dataset_alone_and_nobody_reads_sinks():
    assert names(DIAMOND.sources) == ["a", "e"]
    assert names(DIAMOND.sinks) == ["d", "e"]


# -- who waits for whom -----------------------------------------------------------------------------------------------


def test_training_waits_for_other_calls_of_its_model_unless_they_depend_on_it():
    calls = (
        train("train", "tokens", "loss"),
        call("look", "tokens", "score"),
        call("report", "loss"),
        call("far", "tokens", "other", model="reference"),
    )
    graph = Graph("g", calls, ("tokens",))
    assert {each.name: graph.waits_for(each.name) for each in calls} == {
        "train": {"look"},
        "look": set(),
        "report": set(),
        "far": set(),
    }
    order = names(graph.calls)
    assert order.index("look") < order.index("train") < order.index("report")


def test_training_of_other_models_is_not_waited_for():
    graph = Graph("g", (train("a", "tokens"), train("b", "tokens", model="critic")), ("tokens",))
    assert graph.waits_for("a") == graph.waits_for("b") == set()


def test_two_trainings_of_a_model_are_in_the_order_in_which_they_are_declared():
    for declared in (["y", "x"], ["x", "y"]):
        graph = Graph("g", tuple(train(each, "tokens") for each in declared), ("tokens",))
        assert names(graph.calls) == declared
        assert (graph.waits_for(declared[0]), graph.waits_for(declared[1])) == (set(), {declared[0]})


def test_two_trainings_of_a_model_are_in_the_order_of_their_keys_before_that():
    graph = Graph("g", (train("late", "loss"), train("early", "tokens", "loss")), ("tokens",))
    assert names(graph.calls) == ["early", "late"]
    assert (graph.waits_for("early"), graph.waits_for("late")) == (set(), {"early"})


def test_a_wait_that_could_not_end_is_refused():
    #  actor is trained for what the critic is told, and the critic is trained for what the actor is told
    calls = (
        train("train_actor", "tokens", "loss"),
        call("tell_critic", "loss", model="critic"),
        train("train_critic", "tokens", "value", model="critic"),
        call("tell_actor", "value"),
    )
    with pytest.raises(
        ConfigError,
        match=r"graph g = '.*train_actor.*': a call that changes a model waits for the other calls of that model\.",
    ):
        Graph("g", calls, ("tokens",))


# -- remaps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"input_remap": {"chosne": "tokens"}},
            r"call a, input_remap = 'chosne': renames a key that is not among the call's keys \(chosen, mask\)\. Corr",
        ),
        (
            {"output_remap": {"reward": "scroe"}},
            r"call a, output_remap = 'scroe': renames a key that is not among the call's keys \(score, other\)\. Corr",
        ),
        (
            {"input_remap": {"chosen": "mask"}},
            r"call a, input_remap = 'mask': two keys would have this name for the algorithm\. Rename one",
        ),
        (
            {"input_remap": {"chosen": "tokens", "mask": "tokens"}},
            r"call a, input_remap = 'tokens': two keys would have this name for the algorithm",
        ),
        (
            {"output_remap": {"other": "score"}},
            r"call a, output_remap = 'other': two keys would have this name for the algorithm",
        ),
    ],
)
def test_remaps_name_keys_of_the_call_and_none_twice(fields, message):
    with pytest.raises(ConfigError, match=message):
        call("a", "chosen mask", "score other", **fields)


def test_what_remaps_allow():
    swapped = {"chosen": "mask", "mask": "chosen"}
    assert call("a", "chosen mask", input_remap=swapped).input_remap == swapped
    assert call("a", "", "score other", output_remap={"score": "other", "other": "score"}).outputs == ("score", "other")


def test_a_hook_that_changes_a_model_waits_for_those_that_call_it():
    follow = replace(train("train", "tokens"), post_hooks=(Reshard(source="actor", target="reference"),))
    graph = Graph("g", (follow, replace(call("score", "tokens"), model="reference")), ("tokens",))
    assert graph.waits_for("train") == {"score"}
