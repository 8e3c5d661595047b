import pytest
from trainmaster.api.errors import ConfigError
from trainmaster.api.sampling import Sampling


def test_the_default_is_the_models_own_distribution():
    sampling = Sampling(max_new_tokens=4)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, None, 1.0)
    assert (sampling.min_new_tokens, sampling.stop_tokens) == (0, ())


def test_the_most_tokens_must_be_given():
    with pytest.raises(ConfigError, match=r"Sampling\.max_new_tokens = None: this field must be given"):
        Sampling()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("min_new_tokens", -1), ("temperature", -0.5), ("top_k", 0), ("top_p", 0.0)],
)
def test_ranges(name: str, value: float):
    with pytest.raises(ConfigError, match=rf"Sampling\.{name} = {value}: input should be greater"):
        Sampling(**{"max_new_tokens": 4, name: value})


def test_a_probability_is_at_most_one():
    with pytest.raises(ConfigError, match=r"Sampling\.top_p = 1\.5: is a probability, so at most 1\. Use 1\.0"):
        Sampling(max_new_tokens=4, top_p=1.5)


def test_the_fewest_tokens_are_at_most_the_most():
    assert Sampling(max_new_tokens=4, min_new_tokens=4).min_new_tokens == 4
    with pytest.raises(ConfigError, match=r"Sampling\.min_new_tokens = 5: must be at most `max_new_tokens` \(4\)\. L"):
        Sampling(max_new_tokens=4, min_new_tokens=5)


def test_a_stop_token_has_a_text():
    with pytest.raises(ConfigError, match=r"Sampling\.stop_tokens = \('\\n', ''\): an empty text names no token"):
        Sampling(max_new_tokens=4, stop_tokens=("\n", ""))
