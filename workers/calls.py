"""Model function calls on this worker: inputs out of the store, through a shard, and outputs back into it.

    store, by the graph's keys --input_remap--> microbatches, by the algorithm's names --> shard
          ^-----------------------output_remap-----------------------------------------------v

Only outputs that the call declares are kept. Nothing here is kept between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, assert_never

import torch
from torch import Tensor

from ..api.algorithms import Generation
from ..api.batch import Samples
from ..api.errors import ConfigError
from ..api.graph import CallKind, ModelFunctionCall
from ..api.remap import input_keys, output_keys
from ..api.sampling import Sampling
from ..system.rpc.commands import CallDone, Mean
from .algorithms import inference_algorithm, training_algorithm
from .data.microbatch import Microbatch
from .data.store import Store
from .pipeline.generation import Prompt, Response, Round
from .recording import Record, with_made_up_advantages
from .shard import ModelShard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Tokenizer = Callable[[], "PreTrainedTokenizerBase"]
"""Loads it, if somebody asks."""
Outcome = tuple[dict[str, Mean], Samples | None]
"""Statistics, and which new keys the store has of which sequences."""


def call_model(
    call: ModelFunctionCall,
    share: Sequence[Samples],
    shard: ModelShard,
    store: Store,
    tokenizer: Tokenizer,
    timeline: Path | None = None,
    record: Record | None = None,
) -> CallDone:
    """Runs a call on this replica's share of a minibatch, its microbatches in the order in which they are run.

    `timeline`: a file that gets a line with the times of a training. `record`: takes down a training (see
    `recording` for what is then trained on) or an inference.
    Raises `ConfigError` for a stop token that the tokenizer has not.
    """
    outputs: Samples | None = None
    match call.kind:
        case CallKind.GENERATE:
            statistics, outputs = _generate(call, share, shard, store, tokenizer)
        case CallKind.TRAIN_STEP:
            microbatches = _microbatches(call, share, shard, store)
            if record is not None:
                microbatches = [with_made_up_advantages(each) for each in microbatches]
            statistics = shard.train(training_algorithm(call.settings), microbatches, timeline, record)
        case CallKind.INFERENCE:
            statistics, outputs = _infer(call, share, shard, store, record)
        case _:
            assert_never(call.kind)
    owns = shard.owns_outputs or (call.kind is CallKind.GENERATE and shard.stage.is_last)
    return CallDone(statistics=statistics if owns else {}, version=shard.version, outputs=outputs)


def _microbatches(
    call: ModelFunctionCall, share: Sequence[Samples], shard: ModelShard, store: Store
) -> list[Microbatch]:
    """With what the algorithm reads: all on the last stage, before it tokens at most."""
    names = call.settings.reads if shard.stage.is_last else ("tokens",) if shard.reads_tokens else ()
    return [store.microbatch(samples, names, shard.device, input_keys(call)) for samples in share]


def _infer(
    call: ModelFunctionCall, share: Sequence[Samples], shard: ModelShard, store: Store, record: Record | None
) -> Outcome:
    microbatches = _microbatches(call, share, shard, store)
    statistics, by_microbatch = shard.infer(inference_algorithm(call.settings), microbatches, record)
    sequences: list[tuple[str, dict[str, Tensor]]] = []
    for samples, microbatch, values in zip(share, microbatches, by_microbatch, strict=False):  # none but on the last
        lengths = list(microbatch.packed.seqlens)
        parts = {key: value.cpu().split(lengths) for key, value in _kept(call, values).items()}
        sequences += [
            (sequence, {key: each[at].clone() for key, each in parts.items()})
            for at, sequence in enumerate(samples.ids)
        ]
    return statistics, store.put_all(sequences) if sequences and call.outputs else None


def _generate(
    call: ModelFunctionCall, share: Sequence[Samples], shard: ModelShard, store: Store, tokenizer: Tokenizer
) -> Outcome:
    """Answers prompts; a sequence's tokens are its prompt and its response."""
    assert isinstance(call.settings, Generation), "a generation says how it samples"
    sampling, key = call.settings.sampling, input_keys(call)["prompt"]
    prompts = [_prompts(samples, key, shard, store) for samples in share]
    limits = Round(max_tokens=call.microbatching.max_tokens)
    responses = shard.generate(prompts, sampling, _stop_ids(tokenizer(), sampling), limits)
    if not responses:
        return {}, None
    flat = [prompt for microbatch in prompts for prompt in microbatch]
    sequences = [
        (response.id, _kept(call, _written(prompt, response, shard.version)))
        for prompt, response in zip(flat, responses, strict=True)
    ]
    lengths = sum(len(response.tokens) for response in responses)
    statistics = {
        "response_length": Mean(total=lengths, weight=len(responses)),
        "finished": Mean(total=sum(response.is_finished for response in responses), weight=len(responses)),
    }
    return statistics, store.put_all(sequences) if call.outputs else None


def _prompts(samples: Samples, key: str, shard: ModelShard, store: Store) -> list[Prompt]:
    """Zeros where the shard has no use for them: it needs their number."""
    if shard.reads_tokens:
        return [Prompt(sequence, store.get(sequence, key)) for sequence in samples.ids]
    lengths = samples.lengths(key)
    return [
        Prompt(sequence, torch.zeros(length, dtype=torch.int64))
        for sequence, length in zip(samples.ids, lengths, strict=True)
    ]


def _stop_ids(tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> list[int]:
    """Of end-of-sequence and of the stop tokens. Raises `ConfigError` for one that the tokenizer has not."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    vocabulary = tokenizer.get_vocab()
    for token in sampling.stop_tokens:
        if token not in vocabulary:
            raise ConfigError(
                "sampling.stop_tokens", token, "the tokenizer has no such token", "write it as the tokenizer does"
            )
        stops.append(vocabulary[token])
    return stops


def _kept(call: ModelFunctionCall, values: Mapping[str, T]) -> dict[str, T]:
    """What an algorithm wrote, as the graph's keys."""
    return {key: values[name] for name, key in output_keys(call).items()}


def _written(prompt: Prompt, response: Response, version: int) -> dict[str, Tensor]:
    """What a generation writes of a sequence, each `[T]`: 0 at the prompt's tokens, which nobody drew."""
    before, drawn = len(prompt.tokens), len(response.tokens)
    return {
        "tokens": torch.cat([prompt.tokens, response.tokens]),
        "loss_mask": torch.arange(before + drawn) >= before,
        "log_probabilities": torch.cat([torch.zeros(before), response.logprobs]),
        "versions": torch.full((before + drawn,), version, dtype=torch.int32),
    }
