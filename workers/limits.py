"""What all models of a graph can read: how long a sequence may be, and which tokens it may have.

Every call reads whole sequences, prompts with their responses, so the narrowest model of a graph bounds all of it.
Asked where a dataset is opened, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from ..api.algorithms import Generation
from ..api.errors import ConfigError
from ..api.experiments.base import PlacedModel
from ..api.graph import Graph
from ..api.hub import directory_of
from .data.source import Limits
from .data.tokenization import check_same_tokens, check_vocabulary, load_tokenizer
from .models.configs import model_limits

Models = Mapping[str, PlacedModel]
"""By role."""


def limits_of(graph: Graph, models: Models) -> Limits:
    """Of what the graph's dataset gives: a sequence, or a prompt that is yet to grow by its response."""
    generations = [call.settings for call in graph.model_calls if isinstance(call.settings, Generation)]
    growth = max((settings.sampling.max_new_tokens for settings in generations), default=0)
    bounds, vocabulary = [], []
    for call in graph.model_calls:
        context, num_words = _limits(models[call.model])
        bounds.append((context, f"the context of {models[call.model].field}"))
        bounds.append((call.microbatching.max_tokens, "microbatch_tokens"))
        vocabulary.append(num_words)
    longest, whose = min(bounds, key=lambda bound: bound[0])
    return Limits(tokens=longest - growth, vocabulary=min(vocabulary), bound=f"{longest} is {whose}")


def check_tokens(graph: Graph, models: Models, role: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """All models of the graph mean the same by the tokens that `tokenizer`, that of the model `role`, makes.

    Raises ConfigError for a model whose vocabulary is too small for it, or for what another one samples; and for one
    that comes with a tokenizer of other tokens.
    """
    generations = {call.model: call.settings for call in graph.model_calls if isinstance(call.settings, Generation)}
    stop_tokens = {token for settings in generations.values() for token in settings.sampling.stop_tokens}
    directory = directory_of(models[role].model.tokenizer_path)
    for placed in {call.model: models[call.model] for call in graph.model_calls}.values():
        other = directory_of(placed.model.tokenizer_path)
        if other != directory:
            field = f"{placed.field}.tokenizer"
            check_same_tokens(load_tokenizer(other, field), tokenizer, field, models[role].field)
        _, num_words = _limits(placed)
        check_vocabulary(tokenizer, num_words, models[role].field, placed.field, stop_tokens)
        for sampled in (models[each] for each in generations):
            if num_words < (num_sampled := _limits(sampled)[1]):
                raise ConfigError(
                    f"{placed.field}.config.vocab_size" if placed.model.path is None else f"{placed.field}.path",
                    num_words if placed.model.path is None else str(placed.model.path),
                    f"its vocab_size is {num_words}, and {sampled.field} samples from {num_sampled} tokens",
                    f"take one whose vocab_size is at least that of {sampled.field}",
                )


def _limits(placed: PlacedModel) -> tuple[int, int]:
    """Of one model: see `model_limits`."""
    return model_limits(placed.model, placed.field)
