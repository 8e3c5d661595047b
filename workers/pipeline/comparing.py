"""Whether all ranks of a pipeline are about to run the same program on microbatches of the same lengths.

Asked before every program, by one small sum over the pipeline. To remember what was compared before would save it, but
then ranks that differ need not agree on whether to ask, and would wait for each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ...api.errors import ProgramError
from ..parallel.groups import Group
from .instructions import Program

_NUM_BYTES = 16
"""Of a digest."""


def compare(program: Program, lengths: Sequence[int], group: Group, device: torch.device) -> None:
    """Raises ProgramError, on all ranks, that names the first that differ. `lengths`: tokens by microbatch."""
    own = [*bytes.fromhex(program.digest)[:_NUM_BYTES], *_digest(lengths), len(lengths), sum(lengths)]
    table = torch.zeros(group.size, len(own), dtype=torch.int64)
    table[group.index] = torch.tensor(own)
    table = table.to(device)
    group.all_reduce(table)
    rows = table.tolist()
    for rank, row in enumerate(rows):
        if row != rows[0]:
            raise ProgramError(
                f"pipeline ranks differ: rank 0 is about to run {_told(rows[0])}, and rank {rank} {_told(row)}; "
                f"this is rank {group.index}, with {program.name}"
            )


def _digest(lengths: Sequence[int]) -> bytes:
    return hashlib.sha256(",".join(map(str, lengths)).encode()).digest()[:_NUM_BYTES]


def _told(row: Sequence[int]) -> str:
    program, lengths = bytes(row[:_NUM_BYTES]).hex(), bytes(row[_NUM_BYTES : 2 * _NUM_BYTES]).hex()
    count, num_tokens = row[2 * _NUM_BYTES :]
    return f"program {program} on {count} microbatches of {num_tokens} tokens (lengths {lengths[:8]})"
