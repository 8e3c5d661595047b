"""The sequence buffer: the sequences of one traversal, which keys they have, and who has yet to read them. Pure.

              tokens  reward  score        left
    seq a       x       x       x            1      one call has yet to read it
    seq b       x       x                    2
    seq c       x      gone                  0      dropped by `reward`: what depends on that does not read it

Metadata only, in order of admission. It costs by its content: a cell is two numbers, and the columns that calls
produced are kept as they came. A sequence retires when nobody has yet to read it.

How many buffers there may be at once is the rule of `dataflow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..api.batch import KeyColumn, Samples
from ..api.graph import Call, Graph

Places = npt.NDArray[np.int64]
ABSENT = -1


@dataclass(slots=True, eq=False)
class _Column:
    """One key, in the parts in which it came."""

    part: Places
    """`[sequence]`: in which of `parts` it is; `ABSENT` if it is not there yet."""
    place: Places
    """`[sequence]`: its place in there."""
    parts: list[KeyColumn] = field(default_factory=list)

    def add(self, column: KeyColumn, at: Places) -> None:
        self.part[at], self.place[at] = len(self.parts), np.arange(len(column))
        self.parts.append(column)

    def select(self, at: Places) -> KeyColumn:
        """Of these sequences, which all have it."""
        part = self.part[at]
        is_used = np.bincount(part, minlength=len(self.parts)) > 0
        chosen = [self.parts[number] for number in np.flatnonzero(is_used)]
        starts = np.zeros(len(self.parts), np.int64)
        starts[is_used] = np.cumsum([0, *map(len, chosen)])[:-1]
        return KeyColumn.gather(chosen).select(starts[part] + self.place[at])


class SequenceBuffer:
    """The sequences of one traversal of `graph`, admitted with the keys of the dataset."""

    def __init__(self, graph: Graph, samples: Samples) -> None:
        self.ids = samples.ids
        self._place = {sequence: place for place, sequence in enumerate(samples.ids)}
        self._everywhere = np.arange(len(samples))
        assert len(self._place) == len(samples), "sequences have unique ids"
        self._descendants = {call.name: graph.descendants(call.name) for call in graph.calls}
        self._columns: dict[str, _Column] = {}
        self._gone: dict[str, npt.NDArray[np.bool_]] = {}
        """By call: `[sequence]`, whether it was dropped before the call could read it."""
        self._left = np.full(len(samples), len(graph.calls))
        """`[sequence]`: calls that have yet to read it."""
        self.amend(samples)

    def __len__(self) -> int:
        """Sequences that have not retired."""
        return int(np.count_nonzero(self._left))

    def amend(self, samples: Samples) -> None:
        """Adds keys to sequences."""
        at = self._places(samples.ids)
        for key, column in samples.keys.items():
            if key not in self._columns:
                self._columns[key] = _Column(*np.full((2, len(self.ids)), ABSENT))
            self._columns[key].add(column, at)

    def look(self, call: Call, start: int, stop: int) -> Samples | None:
        """The call's inputs of the sequences `start ... stop - 1`, less dropped ones; None before all are there."""
        at = self._everywhere[start:stop]
        if call.name in self._gone:
            at = at[~self._gone[call.name][at]]
        if not all(self._has(key, at) for key in call.inputs):
            return None
        keys = {key: self._columns[key].select(at) for key in call.inputs} if len(at) else {}
        return Samples(ids=self._ids_at(at), keys=keys)

    def lacks(self, call: Call, sequences: Sequence[str]) -> tuple[str, str] | None:
        """The first sequence, and an output of the call that it has not."""
        at = self._places(sequences)
        for key in call.outputs:
            if not self._has(key, at):
                missing = at if key not in self._columns else at[self._columns[key].part[at] == ABSENT]
                return self.ids[missing[0]], key
        return None

    def finish(self, call: Call, sequences: Sequence[str], dropped: Sequence[str] = ()) -> tuple[str, ...]:
        """The call has read these. Calls that depend on it read none of `dropped`. Returns what retires."""
        at, lost = self._places(sequences), self._places(dropped)
        self._left[at] -= 1
        for name in self._descendants[call.name] if len(lost) else ():
            gone = self._gone.setdefault(name, np.zeros(len(self.ids), np.bool_))
            self._left[lost] -= ~gone[lost]
            gone[lost] = True
        assert (self._left[at] >= 0).all(), "a call reads a sequence once"
        return self._ids_at(at[self._left[at] == 0])

    def num_gone(self, call: Call) -> int:
        """Sequences that were dropped before the call could read them."""
        return int(np.count_nonzero(self._gone[call.name])) if call.name in self._gone else 0

    def _has(self, key: str, at: Places) -> bool:
        if not len(at):
            return True
        return key in self._columns and not (self._columns[key].part[at] == ABSENT).any()

    def _ids_at(self, at: Places) -> tuple[str, ...]:
        """The same object for all of them, in their order: whoever reads all can know it again."""
        if len(at) == len(self.ids) and (at == self._everywhere).all():
            return self.ids
        return tuple([self.ids[place] for place in at.tolist()])

    def _places(self, sequences: Iterable[str]) -> Places:
        if sequences is self.ids:
            return self._everywhere
        return np.fromiter(map(self._place.__getitem__, sequences), np.int64)
