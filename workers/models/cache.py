"""The KV cache of one microbatch: what its live sequences have attended to, one row (slot) a sequence.

    row 0   a a a a a a . .      lengths (6, 4, 7); `.` is reserved, and finite whatever was there
    row 1   b b b b . . . .
    row 2   c c c c c c c .      max_length = the most that any sequence of these slots may grow to
    row 3   - - - - - - - -      free: was a sequence that has ended; who joins takes the first free row

Invariants: live sequences are rows 0 to n-1, so a forward pass reads a slice, and ended ones cost nothing. Memory is
`num_rows * max_length` tokens of each layer, reserved when the layer first writes.

Does not: know of models, masks or scores (`attention` writes and reads), or of who ends, moves or joins (`slots`).

Shapes: n live rows, K key-value heads, S places in use, D head size of keys, E of values, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    cache.keep([0, 2])                                                          # the second has ended
    hidden = stage.run(ids, PackedPass.step(cache, (5,), device))               # ids [1, 7]: one of 5 tokens joins
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

    def keep(self, order: Sequence[int]) -> None:
        """Let go of all rows but these, which become rows 0, 1, ... in this order."""
        moved = [(row, old) for row, old in enumerate(order) if row != old]
        assert all(old >= len(order) for _, old in moved), (
            f"rows {list(order)}: a row moves into a hole, not to another's"
        )
        self.lengths = tuple([self.lengths[old] for old in order])
        if not moved:
            return
        for tensor in (*self._keys.values(), *self._values.values()):
            for row, old in moved:
                length = self.lengths[row]
                tensor[row, :, :length] = tensor[old, :, :length]
