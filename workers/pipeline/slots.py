"""Who sits in which KV slot while responses are generated, and who comes next. Pure, torch-free.

    pool of microbatch 0   | a | b | c | d |        b ends:   | a | d | c | e |        d moves, e joins in the next trip
    pool of microbatch 1   | k | l | m |   |        waiting: e f g ...

A *slot* has room for the longest that any sequence may grow to; a *pool* is the slots of one open microbatch. There are
as many pools as pipeline ranks (as microbatches, if they are fewer), which fills the pipe. Two ways to go on from here:

    max_tokens is None   A microbatch stays by itself; one that has ended gives its place to the next as a whole.
    max_tokens = n       Continuous batching. A pool has as many slots as n tokens have room for, and a slot that gets
                         free is taken at once by whoever waits longest: the rest of the first microbatches, if they
                         did not fit, and then all others, in their order.

Every rank decides by itself what is decided here, from what it was told at the start and from the *marks* that come
with each trip, so all find the same without a message of their own. Invariants: every sequence gets one slot, once; a
pool's slots times their room is at most `max_tokens`; live sequences are rows 0 to n-1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...api.errors import RunError

ENDED = -1
"""A mark in place of a token: the sequence gets no more in this round."""
PAUSED = -2
"""A mark in place of all tokens of a microbatch: the round is over, and nobody joins any more."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What one sequence needs."""

    num_tokens: int
    """With which it joins; at least one."""
    most_tokens: int
    """To which it may grow."""


@dataclass(slots=True)
class Pool:
    """The slots of one open microbatch."""

    microbatch: int
    """Which one, by index; where others join, the place in the pipe."""
    num_slots: int
    slot_tokens: int
    """Room of each."""
    rows: list[int]
    """The sequence in each row, by index."""
    num_joining: int
    """The last rows, which have not taken a trip in this pool yet."""
    order: list[int] = field(default_factory=list)
    """Of each row before those that join: its row in the last trip."""
    trip: int = 0
    """Trips that were taken."""

    @property
    def joining(self) -> list[int]:
        """Sequences whose first trip is the next one."""
        return self.rows[len(self.rows) - self.num_joining :]

    @property
    def num_free(self) -> int:
        return self.num_slots - len(self.rows)


class Slots:
    """Deals sequences to pools. `claims` by sequence; `microbatches` have sequences by index.

    Raises RunError for a sequence that alone outgrows `max_tokens`.

        slots = Slots(claims, [[0, 1], [2, 3, 4]], num_places=1, max_tokens=None)
        (pool,) = slots.opened                       # rows 0 and 1
        slots.settle(pool, [7, ENDED]) is pool       # row 0 goes on with token 7
        slots.settle(pool, [ENDED])                  # another pool: rows 2, 3 and 4
    """

    def __init__(
        self, claims: Sequence[Claim], microbatches: Sequence[Sequence[int]], num_places: int, max_tokens: int | None
    ) -> None:
        self._claims, self._max_tokens = claims, max_tokens
        self._unopened = deque(enumerate(microbatches))
        self._waiting: deque[int] = deque()
        first = [self._unopened.popleft() for _ in range(min(num_places, len(microbatches)))]
        if max_tokens is None:
            self.opened = [self._whole(index, rows) for index, rows in first]
        else:
            self.opened = self._limited(max_tokens, [list(rows) for _, rows in first])
        """The pools at the start, in the order of their turns."""

    def settle(self, pool: Pool, marks: Sequence[int]) -> Pool | None:
        """After a trip: lets go of who has ended, and lets others in. `marks`: for each row its new token, or a mark.

        Returns the pool that has the place now: the same one; another, if this was closed and a whole microbatch takes
        its place; None, if it was closed for good.
        """
        assert len(marks) == len(pool.rows), f"{len(marks)} marks for {len(pool.rows)} rows"
        is_over = PAUSED in marks
        pool.order = compacted([mark >= 0 for mark in marks])
        pool.rows = [pool.rows[row] for row in pool.order]
        pool.num_joining = 0
        if is_over:
            self._waiting.clear()
            self._unopened.clear()
        else:
            self._fill(pool)
        if pool.rows:
            return pool
        return self._whole(*self._unopened.popleft()) if self._unopened else None

    def _whole(self, index: int, rows: Sequence[int]) -> Pool:
        return Pool(
            index, len(rows), max(self._claims[row].most_tokens for row in rows), self._by_length(rows), len(rows)
        )

    def _limited(self, max_tokens: int, parts: Sequence[list[int]]) -> list[Pool]:
        """One pool a part, each with its own sequences; those that have no room, and all others, wait, and fill up."""
        room = max((claim.most_tokens for claim in self._claims), default=1)
        if room > max_tokens:
            raise RunError(
                f"a sequence may grow to {room} tokens, and the KV slots of a microbatch have room for {max_tokens}; "
                "raise microbatch_tokens, or lower sampling.max_new_tokens"
            )
        size = max_tokens // room
        for part in parts:
            self._waiting.extend(part[size:])
        for _, rows in self._unopened:
            self._waiting.extend(rows)
        self._unopened.clear()
        counts = [min(len(part), size) for part in parts]
        num_waiting = len(self._waiting)
        while self._waiting and min(counts) < size:  # evenly
            place = counts.index(min(counts))
            parts[place].insert(counts[place], self._waiting.popleft())
            counts[place] += 1
        return [
            Pool(
                index,
                min(size, count + num_waiting),
                room,
                self._by_length(part[:count]),
                count,
            )
            for index, (part, count) in enumerate(zip(parts, counts, strict=True))
        ]

    def _fill(self, pool: Pool) -> None:
        joining = [self._waiting.popleft() for _ in range(min(pool.num_free, len(self._waiting)))]
        pool.rows += self._by_length(joining)
        pool.num_joining = len(joining)

    def _by_length(self, rows: Sequence[int]) -> list[int]:
        """Equal neighbours attend together as they join."""
        return sorted(rows, key=lambda row: self._claims[row].num_tokens)


def compacted(is_live: Sequence[bool]) -> list[int]:
    """The live rows, in an order that moves few: each hole is filled from the end.

    compacted([True, False, True, False, True]) == [0, 4, 2]
    """
    num_live = sum(is_live)
    movers = [row for row in range(num_live, len(is_live)) if is_live[row]]
    return [row if is_live[row] else movers.pop() for row in range(num_live)]
