"""The router: which worker sends which cell to which others, and in which wave. Pure.

A cell takes at most four hops, and enters each host once:

    another host           host A                     host B
    holder ---enters-----> server ---crosses--------> server
                             |--spreads-> the others    |--spreads-> the others

On each host where a cell is lacking, one worker serves the others: one that lacks it, or holds it. A host with a
holder needs nothing from outside: there the holder serves, or, if it has much to send already, hands the cell to the
server. If no host where the cell is lacking has a holder, it enters one of them from anywhere, and crosses to the
others from there. So nobody serves all: a worker that alone holds everything sends each cell little more than once.

What can be chosen (the holder that lets a cell in, the server of each host) goes to whom has least to send so far, the
largest cells first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .demand import Demand, Masks, Places, split
from .storage import Numbers, starts_of_runs

NUM_WAVES = 4
_LAST_ROUND = 0.001
"""The part of all bytes that is assigned at once in the end."""
_NUM_CHOICES = 4
"""Holders between which a cell that enters from elsewhere can choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hops:
    """Cells to one other worker each, or to several of one place. Arrays are `[hop]`."""

    wave: Numbers
    source: Numbers
    cell: Numbers
    place: Numbers
    """Of the receivers."""
    receivers: Masks


class _Loads:
    """Bytes that each worker has to send."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._seats = np.where(places.ranks < places.num_ranks, 0.0, np.inf)  # [place, slot]
        self._of_place = places.place * places.num_slots + places.slot

    def least(self, ranks: Numbers) -> Numbers:
        """Of each row the rank with least to send."""
        at = self._seats.reshape(-1)[self._of_place[ranks]].argmin(axis=1)
        found: Numbers = ranks[np.arange(len(ranks)), at]
        return found

    def least_of(self, place: Numbers, masks: Masks, extra: Numbers | None = None) -> Numbers:
        """The same of these workers of these places. `extra`: `[place, slot]`."""
        loads = self._seats[place]
        if extra is not None:
            loads += extra
        loads[~self._places.is_member(masks)] = np.inf
        found: Numbers = self._places.ranks[place, loads.argmin(axis=1)]
        return found

    def add(self, ranks: Numbers, size_bytes: Numbers) -> None:
        added = np.bincount(self._of_place[ranks], size_bytes, self._seats.size)
        self._seats += added.reshape(self._seats.shape)


def route(demand: Demand) -> Hops:
    """Who lacks a cell receives it once; who sends one holds it, or received it in an earlier wave."""
    places, size = demand.places, demand.cells.size_bytes[demand.cell]
    is_local = demand.holding != 0
    ways = _ways(demand, is_local)
    everywhere = np.arange(len(size))
    loads = _Loads(places)
    enters = np.flatnonzero((ways.entry == everywhere) & ~is_local)
    letting = _let_in(demand, enters, size[enters], loads)
    giver, server = _serve(demand, size, ways.fan_out + np.bitwise_count(demand.lacking), loads)

    handed = np.flatnonzero(is_local & (server != giver))
    crosses = np.flatnonzero((ways.entry != everywhere) & ~is_local)
    first_wave = np.where(is_local & (server == giver), 0, 1)  # in which the server can send
    from_entry = crosses[ways.source[crosses] == ways.entry[crosses]]
    first_wave[from_entry] = first_wave[ways.entry[from_entry]] + 1
    from_hub = crosses[ways.source[crosses] != ways.entry[crosses]]
    first_wave[from_hub] = first_wave[ways.source[from_hub]] + 1
    others = demand.lacking & ~places.bits(server)
    spreads = np.flatnonzero(others)

    single = np.concatenate([enters, handed, crosses])
    hops = np.concatenate([single, spreads])
    return Hops(
        wave=np.concatenate(
            [np.zeros(len(enters) + len(handed), np.int64), first_wave[crosses] - 1, first_wave[spreads]]
        ),
        source=np.concatenate([letting, giver[handed], server[ways.source[crosses]], server[spreads]]),
        cell=demand.cell[hops],
        place=demand.place[hops],
        receivers=np.concatenate([places.bits(server[single]), others[spreads]]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ways:
    """How cells get from place to place. Arrays are `[demand]`, and name entries of it."""

    entry: Numbers
    """Where the cell enters."""
    source: Numbers
    """Whence it comes here; itself where it comes from no other."""
    fan_out: Numbers
    """To how many places it goes on from here."""


def _ways(demand: Demand, is_local: npt.NDArray[np.bool_]) -> _Ways:
    """A cell's entry is a place with a holder, if there is one, else any: they take turns.

    From the entry it crosses to all others without a holder; but where the entry could not be chosen freely and there
    are several others, to one of these, the hub, and from there to the rest.
    """
    starts = starts_of_runs(demand.cell)
    nums = np.diff(starts, append=len(demand.cell))
    of_cell = np.repeat(np.arange(len(starts)), nums)
    key, sample = split(demand.cell[starts], len(demand.cells.ids))
    num_local = np.bincount(of_cell[is_local], minlength=len(starts))
    entry = _turns(is_local | (num_local == 0)[of_cell], starts, key + sample)
    num_crossing = nums - np.maximum(num_local, 1)
    has_hub = (num_local > 0) & (num_crossing > 1)
    hub = np.where(has_hub, _turns(~is_local | ~has_hub[of_cell], starts, key + sample), entry)
    source = np.arange(len(is_local))
    source[~is_local] = hub[of_cell[~is_local]]
    source[hub] = entry
    fan_out = np.zeros(len(is_local), np.int64)
    fan_out[entry] = np.where(has_hub, 1, num_crossing)
    fan_out[hub[has_hub]] = num_crossing[has_hub] - 1
    return _Ways(entry=entry[of_cell], source=source, fan_out=fan_out)


def _turns(can_be: npt.NDArray[np.bool_], starts: Numbers, turn: Numbers) -> Numbers:
    """Of each run that begins at one of `starts`, one that can be: which of them goes round with `turn`."""
    possible = np.flatnonzero(can_be)
    first = np.searchsorted(possible, starts)
    num_possible = np.diff(first, append=len(possible))
    found: Numbers = possible[first + turn % num_possible]
    return found


def _let_in(demand: Demand, enters: Numbers, size: Numbers, loads: _Loads) -> Numbers:
    """Which holder sends each cell that enters a place from elsewhere."""
    num, first = demand.num_holders[enters], demand.first_holder[enters]
    num_choices = min(_NUM_CHOICES, int(num.max(initial=1)))
    offers = (demand.cell[enters] % num)[:, None] + np.arange(num_choices)
    offers -= np.where(offers < num[:, None], 0, num[:, None])
    offered = demand.holders[first[:, None] + np.minimum(offers, num[:, None] - 1)]  # if they are few, some twice
    chosen = np.zeros(len(enters), np.int64)
    for some in _rounds(size, np.arange(len(size)), num_choices):
        chosen[some] = loads.least(offered[some])
        loads.add(chosen[some], size[some])
    return chosen


def _serve(demand: Demand, size: Numbers, fan_out: Numbers, loads: _Loads) -> tuple[Numbers, Numbers]:
    """The holder of each place that gives the cell there, where there is one, and who serves it: the giver, or another.

    Either way the giver sends it once; whoever serves, to `fan_out - 1` more.
    """
    places = demand.places
    giver, server = np.full(len(size), places.num_ranks), np.zeros(len(size), np.int64)
    local, remote = np.flatnonzero(demand.holding), np.flatnonzero(demand.holding == 0)
    for some in _rounds(size, local, _most(demand.holding[local])):
        giver[some] = loads.least_of(demand.place[some], demand.holding[some])
        loads.add(giver[some], size[some])
    for some in _rounds(size * fan_out, local, 1 + _most(demand.lacking[local])):
        gives = places.bits(giver[some])
        handing = np.where(places.is_member(gives), 0, size[some, None])  # better a hop less
        server[some] = loads.least_of(demand.place[some], gives | demand.lacking[some], handing)
        loads.add(server[some], size[some] * (fan_out[some] - 1))
    for some in _rounds(size * fan_out, remote, _most(demand.lacking[remote])):
        server[some] = loads.least_of(demand.place[some], demand.lacking[some])
        loads.add(server[some], size[some] * (fan_out[some] - 1))
    return giver, server


def _most(masks: Masks) -> int:
    """The most bits of any."""
    return int(np.bitwise_count(masks).max(initial=0))


def _rounds(size: Numbers, positions: Numbers, num_choices: int) -> list[Numbers]:
    """The positions, those with the largest sizes first, in rounds.

    What one adds to a worker's load, others of its round do not see, and if all choose the same, that must be little
    beside what is left to be assigned after them.
    """
    if num_choices <= 1:
        return [positions]
    size = size[positions]
    smallness = (2**30 * (1 - size / max(1, size.max(initial=0)))).astype(np.int64)
    order = split(np.sort(smallness * len(size) + np.arange(len(size))), len(size))[1]
    so_far = np.cumsum(size[order])
    part = 1 / (2 * num_choices)
    left = (1 - part) ** np.arange(1, math.ceil(math.log(_LAST_ROUND) / math.log(1 - part)))
    ends = np.searchsorted(so_far, so_far[-1:].sum() * (1 - left), side="right")
    return [positions[some] for some in np.split(order, np.unique(ends)) if len(some)]
