"""How responses are drawn from a model: the record that experiments and workers share."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .errors import ConfigError
from .record import record


@record
class Sampling:
    """How each token of a response is chosen, and when a response ends.

    In this order: no token that ends a response before `min_new_tokens`, then `temperature`, `top_k`, `top_p`. Draws
    depend on the run's seed, the sequence and the token's place in it, on nothing else.

        Sampling(max_new_tokens=256)                        # from the model's own distribution
        Sampling(max_new_tokens=256, temperature=0.0)       # the likeliest token, always
    """

    max_new_tokens: PositiveInt
    """The most tokens of a response, the one that ends it included; a response that reaches it is cut there."""
    min_new_tokens: NonNegativeInt = 0
    """The number of tokens before which no response ends."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: PositiveInt | None = None
    """Draw among this many likeliest tokens, and those as likely as the last of them; None draws among all."""
    top_p: PositiveFloat = 1.0
    """Draw among the fewest likeliest tokens that together have this probability, and those as likely as the
    last; at most 1."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens besides end-of-sequence that end a response, as the tokenizer writes them."""

    def __post_init__(self) -> None:
        if self.top_p > 1:
            raise ConfigError(
                "Sampling.top_p", self.top_p, "is a probability, so at most 1", "use 1.0 to draw among all tokens"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                "Sampling.min_new_tokens",
                self.min_new_tokens,
                f"must be at most `max_new_tokens` ({self.max_new_tokens})",
                "lower it, or raise `max_new_tokens`",
            )
        if "" in self.stop_tokens:
            raise ConfigError("Sampling.stop_tokens", self.stop_tokens, "an empty text names no token", "remove it")
