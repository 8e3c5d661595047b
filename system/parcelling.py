"""From hops of single cells to each worker's own message: its parcels, and what they are about. Pure.

Cells that one worker sends to the same others in the same wave are one parcel. A parcel to several others is a
broadcast. Of those to one other, in one wave: a worker that sends several scatters; otherwise, a worker that receives
several gathers; what remains is direct.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .demand import Cells, Demand, Places, split
from .routing import NUM_WAVES, Hops
from .rpc.parcels import KINDS, Parcels, Redistribute, StepKind, Whole
from .storage import Numbers, distinct, spans, starts_of_runs


def parcel_out(demand: Demand, hops: Hops, tag: int) -> dict[int, Redistribute]:
    """Messages by rank, for those that send or receive."""
    plan = _parcels(demand, hops)
    messages = _Messages(plan, demand.cells)
    return {rank: messages.message(rank, tag) for rank in distinct(np.concatenate([plan.source, plan.peers])).tolist()}


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
    """Parcels of one direction, worker by worker."""

    def __init__(
        self,
        plan: _Plan,
        cells: Cells,
        num_ranks: int,
        parcels: Numbers,
        ranks: Numbers,
        num_peers: Whole,
        peers: Whole,
    ) -> None:
        """`parcels` that workers have, who are in `ranks`, ascending; `peers` parcel by parcel."""
        self._kinds, self._waves, self._num_peers, self._peers = (
            plan.kind[parcels],
            plan.wave[parcels],
            num_peers,
            peers,
        )
        self._num_cells = plan.num_cells[parcels]
        self.cells = plan.cells[spans(plan.first_cell[parcels], self._num_cells)].astype(np.int64)
        """Parcel by parcel."""
        self.ranks = np.repeat(ranks, self._num_cells)
        """Of each of the cells."""
        counts = cells.counts[self.cells]
        self._counts = counts.astype(np.int32) if (cells.counts != 1).any() else None
        self._lengths = cells.lengths[spans(cells.starts[self.cells], counts)]
        first = np.searchsorted(ranks, np.arange(num_ranks + 1))
        first_cell = _ends(self._num_cells)[first]
        each = (first, _ends(num_peers)[first], first_cell, _ends(counts)[first_cell])
        self._starts = [starts.tolist() for starts in each]
        """Of parcels, peers, cells and lengths, by rank."""

    def parcels(self, rank: int, numbers: Whole) -> Parcels:
        """`numbers`: of all the cells, each as its worker is told of it."""
        parcels, peers, cells, lengths = (slice(*starts[rank : rank + 2]) for starts in self._starts)
        return Parcels(
            kinds=self._kinds[parcels],
            waves=self._waves[parcels],
            num_peers=self._num_peers[parcels],
            peers=self._peers[peers],
            num_cells=self._num_cells[parcels],
            cells=numbers[cells],
            counts=None if self._counts is None else self._counts[cells],
            lengths=self._lengths[lengths],
        )


class _Messages:
    def __init__(self, plan: _Plan, cells: Cells) -> None:
        num_ranks = 1 + max(int(plan.source.max(initial=-1)), int(plan.peers.max(initial=-1)))
        everything, source = np.arange(len(plan.source)), plan.source.astype(np.int64)
        parcel = np.repeat(everything, plan.num_peers)
        order = np.sort((plan.peers.astype(np.int64) * NUM_WAVES + plan.wave[parcel]) * max(1, len(parcel)) + parcel)
        rest, received = split(order, len(parcel))
        ones = np.ones(len(received), np.int32)
        self._sent = _Side(plan, cells, num_ranks, everything, source, plan.num_peers, plan.peers)
        self._received = _Side(plan, cells, num_ranks, received, rest // NUM_WAVES, ones, plan.source[received])
        ranks = np.concatenate([self._sent.ranks, self._received.ranks])
        key, sample = split(np.concatenate([self._sent.cells, self._received.cells]), len(cells.ids))
        keys, self._first_key, key_places = _numbered(ranks, num_ranks, key, len(cells.keys))
        samples, self._first_sample, sample_places = _numbered(ranks, num_ranks, sample, len(cells.ids))
        self._keys = [cells.keys[at] for at in keys.tolist()]
        self._ids = [cells.ids[at] for at in samples.tolist()]
        num_samples = np.diff(self._first_sample)
        numbers = (key_places * num_samples[ranks] + sample_places).astype(np.int32)
        self._numbers = np.split(numbers, [len(self._sent.cells)])

    def message(self, rank: int, tag: int) -> Redistribute:
        sent, received = self._numbers
        return Redistribute(
            tag=tag,
            ids=tuple(self._ids[slice(*self._first_sample[rank : rank + 2])]),
            keys=tuple(self._keys[slice(*self._first_key[rank : rank + 2])]),
            outgoing=self._sent.parcels(rank, sent),
            incoming=self._received.parcels(rank, received),
        )


def _numbered(ranks: Numbers, num_ranks: int, values: Numbers, num_values: int) -> tuple[Numbers, list[int], Numbers]:
    """Each worker's values, without repetition and ascending, one worker's after the other's; by rank where they begin;
    and of all values their places among their worker's."""
    codes = ranks * num_values + values
    ordered, order = split(np.sort(codes * len(codes) + np.arange(len(codes))), len(codes))
    first = starts_of_runs(ordered)
    places = np.empty(len(codes), np.int64)
    places[order] = np.repeat(np.arange(len(first)), np.diff(first, append=len(codes)))
    owners, found = split(ordered[first], num_values)
    starts = np.searchsorted(owners, np.arange(num_ranks + 1))
    return found, starts.tolist(), places - starts[ranks]


def _ends(counts: Numbers | Whole) -> Numbers:
    """0, and where each ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
