from trainmaster.api.functions import RewardFunction
from trainmaster.api.graph import FunctionCall
from trainmaster.api.remap import input_keys, output_keys
from trainmaster.api.rewards import Reward


def call(inputs: str, outputs: str, input_remap: dict[str, str], output_remap: dict[str, str]) -> FunctionCall:
    return FunctionCall(
        name="score",
        function=RewardFunction(reward=Reward(function="own")),
        inputs=tuple(inputs.split()),
        outputs=tuple(outputs.split()),
        input_remap=input_remap,
        output_remap=output_remap,
        batch_size=1,
    )


def test_names_that_are_not_mapped_stay():
    made = call("tokens mask", "reward", {}, {})
    assert input_keys(made) == {"tokens": "tokens", "mask": "mask"}
    assert output_keys(made) == {"reward": "reward"}


def test_inputs_and_outputs_are_found_by_the_algorithms_names():
    made = call("chosen mask", "score advantage", {"chosen": "tokens"}, {"reward": "score"})
    assert list(input_keys(made).items()) == [("tokens", "chosen"), ("mask", "mask")]
    assert list(output_keys(made).items()) == [("reward", "score"), ("advantage", "advantage")]


def test_two_keys_may_swap_names():
    made = call("a b", "x y", {"a": "b", "b": "a"}, {"x": "y", "y": "x"})
    assert input_keys(made) == {"b": "a", "a": "b"}
    assert output_keys(made) == {"y": "x", "x": "y"}


def test_an_output_may_have_the_name_of_one_that_is_not_kept():
    made = call("tokens", "advantage", {}, {"reward": "advantage"})
    assert output_keys(made) == {"reward": "advantage"}, "and nothing of the algorithm's own `advantage`"
