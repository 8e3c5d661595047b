"""How a firing of a model's call becomes requests. Pure.

    firing --minibatches--> one request each to every worker --microbatches--> pipeline slots

Minibatches are as even in sequences as can be; what each replica gets of one is balanced by tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt

from ..api.algorithms import Generation
from ..api.balance import plan_microbatches
from ..api.batch import Samples
from ..api.experiments.base import PlacedModel
from ..api.graph import ModelFunctionCall


@dataclass(frozen=True, slots=True)
class Share:
    """What a replica gets of a minibatch."""

    samples: Samples
    """In the order of its microbatches."""
    sizes: tuple[int, ...]
    """Samples of each microbatch."""


Shares = Mapping[int, Share]
"""A minibatch by rank. Stages of one replica have the same object."""


def cut(call: ModelFunctionCall, samples: Samples, placed: PlacedModel) -> list[Shares]:
    """By minibatch. None if there are too few sequences for every replica to have one."""
    replicas = placed.model.layout.dp
    count = min(-(-len(samples) // call.minibatch_size), len(samples) // replicas)
    bounds = [len(samples) * at // count for at in range(count + 1)] if count else []
    return [
        _shares(call, samples.select(range(*bounds[at : at + 2])), placed)
        if count > 1
        else _shares(call, samples, placed)
        for at in range(count)
    ]


def _shares(call: ModelFunctionCall, minibatch: Samples, placed: PlacedModel) -> Shares:
    layout, spec = placed.model.layout, call.microbatching
    lengths = minibatch.sizes(call.inputs[0])
    if isinstance(call.settings, Generation):
        lengths = tuple(length + call.settings.sampling.max_new_tokens for length in lengths)
    order, sizes = _planned(lengths, layout.dp, spec.max_tokens, spec.min_count, minibatch.ids)
    parts = minibatch.select(order).cut([sum(each) for each in sizes])
    shares = [Share(*each) for each in zip(parts, sizes, strict=True)]
    return {rank: shares[place // layout.pp] for place, rank in enumerate(placed.ranks)}


@lru_cache(maxsize=4)
def _planned(
    lengths: tuple[int, ...], num_ranks: int, max_tokens: int, min_count: int, names: tuple[str, ...]
) -> tuple[npt.NDArray[np.int64], list[tuple[int, ...]]]:
    """Positions, replica by replica and microbatch by microbatch, and by replica the sizes of its microbatches.

    Calls of a step that read the same sequences are cut alike, and once. Leave it as it is.
    """
    plan = plan_microbatches(lengths, num_ranks, max_tokens, min_count, names)
    order = chain.from_iterable(chain.from_iterable(plan))
    return np.fromiter(order, np.int64), [tuple(map(len, microbatches)) for microbatches in plan]


def read_by(minibatches: Sequence[Shares]) -> dict[int, Samples]:
    """What each rank reads in all of them. Stages of one replica get the same object."""
    by_replica: dict[tuple[int, ...], Samples] = {}
    read: dict[int, Samples] = {}
    for rank in minibatches[0] if minibatches else ():
        shares = [minibatch[rank] for minibatch in minibatches]
        replica = tuple(map(id, shares))
        if replica not in by_replica:
            parts = [share.samples for share in shares]
            by_replica[replica] = parts[0] if len(parts) == 1 else Samples.gather(parts)
        read[rank] = by_replica[replica]
    return read
