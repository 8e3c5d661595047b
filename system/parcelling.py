"""From hops of single cells to each worker's own message: its parcels, and what they are about. Pure.

Cells that one worker sends to the same others in the same wave are one parcel. A parcel to several others is a
broadcast. Of those to one other, in one wave: a worker that sends several scatters; otherwise, a worker that receives
several gathers; what remains is direct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .demand import Cells, Demand, Places, split
from .routing import NUM_WAVES, Hops
from .rpc.parcels import KINDS, NONE, NUM_TABLES, Parcels, Redistribute, StepKind, Tables, Whole
from .storage import Numbers, distinct, spans, starts_of_runs

Messages = dict[int, Redistribute]
"""By rank."""
Objects = npt.NDArray[np.object_]
_CELLS_AT_ONCE = 2**15
"""That many of each array are in a core's cache; and of thousands of workers, each with a few, all are dealt with at
once."""


def parcel_out(demand: Demand, hops: Hops, tag: int) -> Messages:
    """Messages by rank, for those that send or receive."""
    plan = _parcels(demand, hops)
    ranks = np.arange(demand.places.num_ranks + 1)
    parcel = np.repeat(np.arange(len(plan.source)), plan.num_peers)
    order = np.sort((plan.peers.astype(np.int64) * NUM_WAVES + plan.wave[parcel]) * max(1, len(parcel)) + parcel)
    rest, received = split(order, len(parcel))
    sent_starts, received_starts = np.searchsorted(plan.source, ranks), np.searchsorted(rest, ranks * NUM_WAVES)
    cells_before = _ends(plan.num_cells)[sent_starts] + _ends(plan.num_cells[received])[received_starts]
    firsts = distinct(np.searchsorted(cells_before[:-1], np.arange(0, cells_before[-1], _CELLS_AT_ONCE)))
    first_peer = _ends(plan.num_peers)
    all_keys, all_ids = (np.array([*each, None], dtype=object)[:-1] for each in (demand.cells.keys, demand.cells.ids))
    messages: Messages = {}
    for first, end in pairwise([*firsts.tolist(), len(ranks) - 1]):
        these, those = sent_starts[first : end + 1], received_starts[first : end + 1]
        outgoing, incoming = np.arange(these[0], these[-1]), received[those[0] : those[-1]]
        peers = plan.peers[first_peer[these[0]] : first_peer[these[-1]]]
        sent = _Side(plan, demand.cells, outgoing, these, plan.num_peers[outgoing], peers)
        got = _Side(plan, demand.cells, incoming, those, np.ones(len(incoming), np.int32), plan.source[incoming])
        messages |= _messages(sent, got, all_keys, all_ids, first, end - first, tag)
    return messages


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Parcels by sender, then wave, then receivers; arrays are `[parcel]` if nothing else is said."""

    kind: Whole
    wave: Whole
    source: Whole
    num_cells: Whole
    first_cell: Whole
    cells: Whole
    """Parcel by parcel, ascending."""
    num_peers: Whole
    first_peer: Whole
    peers: Whole
    """Parcel by parcel, ascending."""


def _parcels(demand: Demand, hops: Hops) -> _Plan:
    places, num_cells = demand.places, max(1, len(demand.cells.size_bytes))
    masks = distinct(hops.receivers)
    mask = np.searchsorted(masks, hops.receivers)
    num_receivers = len(masks) * places.num_places
    codes = ((hops.source * NUM_WAVES + hops.wave) * num_receivers + mask * places.num_places + hops.place) * num_cells
    assert places.num_ranks * NUM_WAVES * num_receivers * num_cells < 2**63, "the code of a hop fits into its integer"
    codes = np.sort(codes + hops.cell)
    of_cell, cells = split(codes, num_cells)
    first_cell = starts_of_runs(of_cell)
    rest, receivers = split(of_cell[first_cell], num_receivers)
    source, wave = split(rest, NUM_WAVES)
    mask, place = split(receivers, places.num_places)
    at, slot = np.nonzero(places.is_member(masks[mask]))
    num_peers = np.bincount(at, minlength=len(place))
    first_peer = np.cumsum(num_peers) - num_peers
    peers = places.ranks[place[at], slot]
    columns = {
        "kind": _kinds(source, wave, num_peers, peers[first_peer], places),
        "wave": wave,
        "source": source,
        "num_cells": np.diff(first_cell, append=len(codes)),
        "first_cell": first_cell,
        "cells": cells,
        "num_peers": num_peers,
        "first_peer": first_peer,
        "peers": peers,
    }
    return _Plan(**{name: column.astype(np.int32) for name, column in columns.items()})


def _kinds(source: Numbers, wave: Numbers, num_peers: Numbers, peer: Numbers, places: Places) -> Numbers:
    """`peer`: the first of each."""
    is_single = num_peers == 1
    kinds = np.full(len(wave), KINDS.index(StepKind.BROADCAST))
    kinds[is_single] = KINDS.index(StepKind.DIRECT)
    for ranks, kind in ((peer, StepKind.GATHER), (source, StepKind.SCATTER)):
        turn = ranks * NUM_WAVES + wave
        num = np.bincount(turn[is_single], minlength=places.num_ranks * NUM_WAVES)
        kinds[is_single & (num[turn] > 1)] = KINDS.index(kind)
    return kinds


class _Side:
    """Parcels of one direction, of some workers in a row: worker by worker."""

    def __init__(
        self, plan: _Plan, cells: Cells, parcels: Numbers, starts: Numbers, num_peers: Whole, peers: Whole
    ) -> None:
        """`parcels` are those that the workers have, and `num_peers` theirs; `peers`, of all of them, parcel by parcel.
        `starts`: where each worker's begin, and where the last one's end."""
        starts = starts - starts[0]
        num_cells = plan.num_cells[parcels]
        self.cells = plan.cells[spans(plan.first_cell[parcels], num_cells)].astype(np.int64)
        """Parcel by parcel."""
        first_cell = _ends(num_cells)[starts]
        self.seats = np.repeat(np.arange(len(starts) - 1), np.diff(first_cell))
        """Of each of the cells: which of the workers has it."""
        counts, first_length, which = NONE, first_cell, cells.starts[self.cells]
        if cells.has_counts:
            num_lengths = cells.counts[self.cells]
            counts, first_length = num_lengths.astype(np.int32), _ends(num_lengths)[first_cell]
            which = spans(which, num_lengths)
        self._tables = Tables(
            kinds=plan.kind[parcels],
            waves=plan.wave[parcels],
            num_peers=num_peers,
            num_cells=num_cells,
            peers=peers,
            cells=NONE,
            counts=counts,
            lengths=cells.lengths[which],
        )
        """Worker by worker; cells are not known yet."""
        of_peers, of_cells, of_lengths = (
            np.diff(each) for each in (_ends(num_peers)[starts], first_cell, first_length)
        )
        of_counts = of_cells if cells.has_counts else np.zeros_like(of_cells)
        self._sizes = np.stack([*4 * [np.diff(starts)], of_peers, of_cells, of_counts, of_lengths])
        """`[table, worker]`"""

    def parcels(self, cells: Whole) -> Callable[[int], Parcels]:
        """Of one worker or another. `cells`: all of them, each as its worker is told of it."""
        tables, sizes = self._tables._replace(cells=cells), self._sizes
        first = _ends(NUM_TABLES + sizes.sum(axis=0))
        numbers = np.empty(first[-1], np.int32)
        numbers[first[:-1] + np.arange(NUM_TABLES)[:, None]] = sizes
        starts = first[:-1] + NUM_TABLES + np.cumsum(sizes, axis=0) - sizes
        for table, start, size in zip(tables, starts, sizes, strict=True):
            numbers[spans(start, size)] = table
        bounds = first.tolist()
        return lambda worker: Parcels(numbers=numbers[slice(*bounds[worker : worker + 2])])


def _messages(
    sent: _Side, received: _Side, all_keys: Objects, all_ids: Objects, first_rank: int, num_ranks: int, tag: int
) -> Messages:
    """Of workers in a row. `all_keys`, `all_ids`: those of the cells."""
    seats = np.concatenate([sent.seats, received.seats])
    key, sample = split(np.concatenate([sent.cells, received.cells]), len(all_ids))
    keys, first_key, key_places = _numbered(seats, num_ranks, key, len(all_keys))
    samples, first_sample, sample_places = _numbered(seats, num_ranks, sample, len(all_ids))
    names, ids = all_keys[keys].tolist(), all_ids[samples].tolist()
    numbers = (key_places * np.diff(first_sample)[seats] + sample_places).astype(np.int32)
    of_sent, of_received = np.split(numbers, [len(sent.cells)])
    outgoing, incoming = sent.parcels(of_sent), received.parcels(of_received)
    return {
        first_rank + seat: Redistribute(
            tag=tag,
            ids=tuple(ids[slice(*first_sample[seat : seat + 2])]),
            keys=tuple(names[slice(*first_key[seat : seat + 2])]),
            outgoing=outgoing(seat),
            incoming=incoming(seat),
        )
        for seat in distinct(seats).tolist()
    }


def _numbered(seats: Numbers, num_seats: int, values: Numbers, num_values: int) -> tuple[Numbers, list[int], Numbers]:
    """Each worker's values, without repetition and ascending, one worker's after the other's; by worker where they
    begin; and of all values their places among their worker's."""
    codes = seats * num_values + values
    if num_seats * num_values <= 4 * len(codes):  # a table of all that could be
        is_used = np.zeros(num_seats * num_values, np.bool_)
        is_used[codes] = True
        used = np.flatnonzero(is_used)
        table = np.empty(len(is_used), np.int64)
        table[used] = np.arange(len(used))
        places = table[codes]
    else:
        ordered, order = split(np.sort(codes * len(codes) + np.arange(len(codes))), len(codes))
        first = starts_of_runs(ordered)
        used, places = ordered[first], np.empty(len(codes), np.int64)
        places[order] = np.repeat(np.arange(len(first)), np.diff(first, append=len(codes)))
    owners, found = split(used, num_values)
    starts = np.searchsorted(owners, np.arange(num_seats + 1))
    return found, starts.tolist(), places - starts[seats]


def _ends(counts: Numbers | Whole) -> Numbers:
    """0, and where each ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
