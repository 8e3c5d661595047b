"""The sequence buffer: which sequences are in flight, which keys they have, and which calls have read them. Pure.

    admit --> (a call takes what has all its inputs, oldest first, each sequence once) --> amend --> ... --> retire

It costs by its content. A sequence retires after its last reader is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..api.batch import KeyColumn, Samples
from ..api.graph import Graph, ModelFunctionCall


@dataclass(slots=True)
class _Entry:
    columns: dict[str, KeyColumn]
    """Of this one sequence: each column has one length."""
    taken: set[str] = field(default_factory=set)
    """Calls that have taken it."""
    done: set[str] = field(default_factory=set)
    """Calls that are done with it."""


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
            self._entries[sequence] = _Entry(dict(samples.select([position]).keys))

    def take(self, call: ModelFunctionCall, count: int) -> Samples | None:
        """The `count` oldest sequences that have all of the call's inputs and that it has not taken; None if fewer."""
        ready = [
            sequence
            for sequence, entry in self._entries.items()
            if call.name not in entry.taken and all(key in entry.columns for key in call.inputs)
        ][:count]
        if len(ready) < count:
            return None
        parts = []
        for sequence in ready:
            entry = self._entries[sequence]
            entry.taken.add(call.name)
            parts.append(Samples(ids=(sequence,), keys={key: entry.columns[key] for key in call.inputs}))
        return Samples.gather(parts)

    def amend(self, samples: Samples) -> None:
        """Adds keys to sequences in flight."""
        for position, sequence in enumerate(samples.ids):
            self._entries[sequence].columns.update(samples.select([position]).keys)

    def finish(self, call: ModelFunctionCall, sequences: Sequence[str]) -> tuple[str, ...]:
        """The call is done with these; returns those of them that retire."""
        retired = []
        for sequence in sequences:
            entry = self._entries[sequence]
            entry.done.add(call.name)
            if entry.done == self._readers:
                del self._entries[sequence]
                retired.append(sequence)
        return tuple(retired)
