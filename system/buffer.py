"""The sequence buffer: which sequences are in flight, which keys they have, and which calls have read them. Pure.

    admit --> (a call takes what has all its inputs, oldest first, each sequence once) --> amend --> ... --> retire

It costs by its content. A sequence retires after its last reader is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..api.batch import KeyColumn, Samples
from ..api.graph import Call, Graph


@dataclass(slots=True)
class _Entry:
    columns: dict[str, tuple[KeyColumn, int]]
    """By key: the column that came with it and others, and its place there."""
    taken: set[str] = field(default_factory=set)
    """Calls that have taken it."""
    done: set[str] = field(default_factory=set)
    """Calls that are done with it."""
    is_dropped: bool = False
    """No further call takes it."""


class SequenceBuffer:
    """Metadata only; sequences stand in order of admission."""

    def __init__(self, graph: Graph) -> None:
        self._readers = {call.name for call in graph.calls}
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def admit(self, samples: Samples) -> None:
        """New sequences, with the keys of the dataset."""
        for position, sequence in enumerate(samples.ids):
            assert sequence not in self._entries, f"sequence {sequence} is admitted twice"
            self._entries[sequence] = _Entry({key: (column, position) for key, column in samples.keys.items()})

    def take(self, call: Call, count: int) -> Samples | None:
        """The `count` oldest sequences that have all of the call's inputs and that it has not taken; None if fewer."""
        ready = [
            sequence
            for sequence, entry in self._entries.items()
            if self._is_open(entry, call) and all(key in entry.columns for key in call.inputs)
        ][:count]
        if len(ready) < count:
            return None
        if not ready:
            return Samples(ids=(), keys={})
        entries = [self._entries[sequence] for sequence in ready]
        for entry in entries:
            entry.taken.add(call.name)
        keys = {key: _joined(key, [entry.columns[key] for entry in entries]) for key in call.inputs}
        return Samples(ids=tuple(ready), keys=keys)

    def num_open(self, call: Call) -> int:
        """How many sequences the call has yet to take, ready or not."""
        return sum(self._is_open(entry, call) for entry in self._entries.values())

    def drop(self, sequences: Sequence[str]) -> tuple[str, ...]:
        """No further call takes these; returns those of them that nobody is reading: they retire."""
        for sequence in sequences:
            self._entries[sequence].is_dropped = True
        return self._retire(sequences)

    def amend(self, samples: Samples) -> None:
        """Adds keys to sequences in flight; those that have retired are passed over."""
        for position, sequence in enumerate(samples.ids):
            if sequence in self._entries:
                columns = self._entries[sequence].columns
                for key, column in samples.keys.items():
                    columns[key] = (column, position)

    def finish(self, call: Call, sequences: Sequence[str]) -> tuple[str, ...]:
        """The call is done with these; returns those of them that retire."""
        for sequence in sequences:
            self._entries[sequence].done.add(call.name)
        return self._retire(sequences)

    def _retire(self, sequences: Sequence[str]) -> tuple[str, ...]:
        retired = []
        for sequence in sequences:
            entry = self._entries[sequence]
            if entry.done == (entry.taken if entry.is_dropped else self._readers):
                del self._entries[sequence]
                retired.append(sequence)
        return tuple(retired)

    @staticmethod
    def _is_open(entry: _Entry, call: Call) -> bool:
        return call.name not in entry.taken and not entry.is_dropped


def _joined(key: str, cells: Sequence[tuple[KeyColumn, int]]) -> KeyColumn:
    """One column of these sequences."""
    runs: list[tuple[KeyColumn, list[int]]] = []
    for column, position in cells:
        if not runs or runs[-1][0] is not column:
            runs.append((column, []))
        runs[-1][1].append(position)
    first = runs[0][0]
    assert all(column.has_type_of(first) for column, _ in runs), f"key {key} differs in type"
    return KeyColumn.gather([column.select(positions) for column, positions in runs])
