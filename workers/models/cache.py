"""The KV cache of one microbatch: what its live sequences have attended to, one row a sequence.

    row 0   a a a a a a . .      lengths (6, 4, 7); `.` is reserved, and zero until it is written
    row 1   b b b b . . . .
    row 2   c c c c c c c .      max_length = longest prompt + most new tokens - 1
    row 3   - - - - - - - -      was a sequence that has ended: the last live row moved to its place

Invariants: live sequences are rows 0 to n-1, so a forward pass reads a slice, and ended ones cost nothing; the order of
rows after a compaction depends on who lives alone, so every stage finds the same. Memory is reserved when a layer first
writes, for this microbatch's own longest sequence.

Does not: know of models, masks or scores (`attention` writes and reads), or of who has ended (`generation`).

Shapes: n live rows, K key-value heads, S places in use, D head size of keys, E of values, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Place = tuple[int | None, int]
"""A layer's index, and how often it has attended before in the same pass (some layers do so twice)."""

Slots = tuple[Tensor | slice, slice, Tensor | int]
"""Where in [rows, K, max_length, D] the T tokens of a pass go: rows, all heads, positions."""


class KVCache:
    """Keys and values of the sequences of one microbatch, for the layers of one stage.

    cache = KVCache(num_rows=3, max_length=8)
    hidden = stage.run(ids, PackedPass.prefill(cache, (6, 4, 7), device))       # ids [1, 17]
    hidden = stage.run(ids, PackedPass.decode(cache, device))                   # ids [1, 3]
    order = cache.compact([True, False, True])                                  # [0, 2]
    hidden = stage.run(ids, PackedPass.decode(cache, device))                   # ids [1, 2]
    """

    def __init__(self, num_rows: int, max_length: int) -> None:
        self.num_rows, self.max_length = num_rows, max_length
        self.lengths: tuple[int, ...] = ()
        """Tokens of each live row, those of the running pass included."""
        self._keys: dict[Place, Tensor] = {}
        self._values: dict[Place, Tensor] = {}

    def advance(self, lengths: tuple[int, ...]) -> None:
        """Begin a pass after which the live rows hold these many tokens."""
        assert len(lengths) <= self.num_rows, f"{len(lengths)} sequences in a cache of {self.num_rows} rows"
        assert max(lengths) <= self.max_length, f"{max(lengths)} tokens in a row of {self.max_length}"
        self.lengths = lengths

    def write(self, place: Place, key: Tensor, value: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys [1, K, T, D] and values [1, K, T, E]; -> what it has: [n, K, S, D], [n, K, S, E].

        S is the longest live row; what lies past the end of a shorter one is finite, and for the caller to mask.
        """
        if place not in self._keys:
            for tensors, new in ((self._keys, key), (self._values, value)):
                # zeros, not empty: what a mask hides takes weight 0, and 0 times what lies in fresh memory may be NaN
                tensors[place] = new.new_zeros(self.num_rows, new.shape[1], self.max_length, new.shape[3])
        keys, values = self._keys[place], self._values[place]
        keys[slots] = key[0].transpose(0, 1)
        values[slots] = value[0].transpose(0, 1)
        num_live, longest = len(self.lengths), max(self.lengths)
        return keys[:num_live, :, :longest], values[:num_live, :, :longest]

    def compact(self, is_live: Sequence[bool]) -> list[int]:
        """Let go of rows that have ended. Returns for each row that is left the row that it was (`compacted`)."""
        assert len(is_live) == len(self.lengths), (
            f"{len(self.lengths)} rows, but {len(is_live)} are said to live or not"
        )
        order = compacted(is_live)
        moved = [row for row, old in enumerate(order) if row != old]
        self.lengths = tuple(self.lengths[row] for row in order)
        tensors = [*self._keys.values(), *self._values.values()]
        if moved and tensors:
            longest, device = max(self.lengths[row] for row in moved), tensors[0].device
            targets, sources = torch.tensor([moved, [order[row] for row in moved]], device=device)
            for tensor in tensors:
                used = tensor[:, :, :longest]
                used.index_copy_(0, targets, used.index_select(0, sources))
        return order


def compacted(is_live: Sequence[bool]) -> list[int]:
    """The live rows, in an order that moves few: each hole is filled from the end.

    compacted([True, False, True, False, True]) == [0, 4, 2]
    """
    num_live = sum(is_live)
    movers = [row for row in range(num_live, len(is_live)) if is_live[row]]
    return [row if is_live[row] else movers.pop() for row in range(num_live)]
