import pytest
from trainmaster.api import errors
from trainmaster.api.errors import ConfigError, DataError, ModelError, RemoteError, RunError, TrainmasterError


def test_a_config_error_says_field_value_rule_and_cure():
    error = ConfigError("model.layout.pp", 3, "must be at most the model's 2 layers", "lower it")
    assert str(error) == "model.layout.pp = 3: must be at most the model's 2 layers. Lower it."
    assert (error.field, error.value) == ("model.layout.pp", 3)


def test_a_cure_may_start_with_a_name_in_ticks():
    assert str(ConfigError("a", None, "is wrong", "`b` is right")).endswith("is wrong. `b` is right.")


@pytest.mark.parametrize(
    ("kind", "exit_code"), [(ConfigError, 2), (DataError, 2), (ModelError, 2), (RunError, 1), (RemoteError, 1)]
)
def test_exit_codes(kind: type[TrainmasterError], exit_code: int):
    assert kind.exit_code == exit_code


def test_every_error_is_in_the_tree_and_drawn_in_the_docstring():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) == 13
    for kind in kinds:
        assert issubclass(kind, TrainmasterError)
        assert kind.__name__ in errors.__doc__


def test_a_remote_error_keeps_the_traceback():
    error = RemoteError("call train on worker 1", "KeyError", "'x'", "Traceback ...")
    assert str(error) == "call train on worker 1 failed with KeyError: 'x'"
    assert error.remote_traceback == "Traceback ..."
