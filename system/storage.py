"""Who holds which key of which sequence. Pure bookkeeping in the master; the values are in the workers' stores."""

from __future__ import annotations

from collections.abc import Iterable

from ..api.batch import Samples


class Storage:
    """Holders by sequence and key, in the order in which they came to hold it."""

    def __init__(self) -> None:
        self._holders: dict[str, dict[str, dict[int, None]]] = {}

    def add(self, rank: int, samples: Samples) -> None:
        """This worker holds every key of these samples from now on."""
        for sequence in samples.ids:
            keys = self._holders.setdefault(sequence, {})
            for key in samples.keys:
                keys.setdefault(key, {})[rank] = None

    def holders(self, sequence: str, key: str) -> tuple[int, ...]:
        keys = self._holders.get(sequence, {})
        return tuple(keys[key]) if key in keys else ()

    def release(self, sequences: Iterable[str]) -> dict[int, tuple[str, ...]]:
        """Forgets sequences; returns who has to forget which."""
        by_rank: dict[int, list[str]] = {}
        for sequence in sequences:
            ranks = {rank for holders in self._holders.pop(sequence).values() for rank in holders}
            for rank in sorted(ranks):
                by_rank.setdefault(rank, []).append(sequence)
        return {rank: tuple(ids) for rank, ids in by_rank.items()}

    def __len__(self) -> int:
        return len(self._holders)
