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
from .storage import Numbers, spans


def parcel_out(demand: Demand, hops: Hops, tag: int) -> dict[int, Redistribute]:
    """Messages by rank, for those that send or receive."""
    plan = _parcels(demand, hops)
    messages = _Messages(plan, demand.cells)
    return {rank: messages.message(rank, tag) for rank in np.unique(np.concatenate([plan.source, plan.peers])).tolist()}


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
    masks = np.unique(hops.receivers)
    mask = np.searchsorted(masks, hops.receivers)
    num_receivers = len(masks) * places.num_places
    codes = ((hops.source * NUM_WAVES + hops.wave) * num_receivers + mask * places.num_places + hops.place) * num_cells
    assert places.num_ranks * NUM_WAVES * num_receivers * num_cells < 2**63, "the code of a hop fits into its integer"
    codes = np.sort(codes + hops.cell)
    of_cell, cells = split(codes, num_cells)
    first_cell = np.flatnonzero(np.diff(of_cell, prepend=-1))
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


class _Messages:
    def __init__(self, plan: _Plan, cells: Cells) -> None:
        self._plan, self._cells = plan, cells
        self._key, self._sample = split(plan.cells.astype(np.int64), len(cells.ids))  # wide: they are indices
        self._starts = cells.starts[plan.cells]
        self._counts = cells.counts[plan.cells].astype(np.int32) if (cells.counts != 1).any() else None
        parcel = np.repeat(np.arange(len(plan.source)), plan.num_peers)
        order = np.sort((plan.peers.astype(np.int64) * NUM_WAVES + plan.wave[parcel]) * max(1, len(parcel)) + parcel)
        rest, self._received = split(order, len(parcel))
        num_ranks = 1 + max(int(plan.source.max(initial=-1)), int(plan.peers.max(initial=-1)))
        self._first_received = np.searchsorted(rest, np.arange(num_ranks + 1) * NUM_WAVES).tolist()
        self._first_sent = np.searchsorted(plan.source, np.arange(num_ranks + 1)).tolist()
        self._ids = np.array(cells.ids, dtype=object)
        self._sample_places, self._key_places = np.zeros(len(cells.ids), np.int32), np.zeros(len(cells.keys), np.int32)

    def message(self, rank: int, tag: int) -> Redistribute:
        plan, first, end = self._plan, self._first_sent[rank], self._first_sent[rank + 1]
        received = self._received[self._first_received[rank] : self._first_received[rank + 1]]
        num_received = plan.num_cells[received]
        sent_cells = slice(*_ends(plan.first_cell, plan.num_cells, first, end))
        received_cells = spans(plan.first_cell[received], num_received)
        keys = np.concatenate([self._key[sent_cells], self._key[received_cells]])
        samples = np.concatenate([self._sample[sent_cells], self._sample[received_cells]])
        key_places, sample_places = _used(keys, self._key_places), _used(samples, self._sample_places)
        numbers = self._key_places[keys] * np.int32(len(sample_places)) + self._sample_places[samples]
        num_sent = sent_cells.stop - sent_cells.start
        return Redistribute(
            tag=tag,
            ids=tuple(self._ids[sample_places].tolist()),
            keys=tuple([self._cells.keys[at] for at in key_places.tolist()]),
            outgoing=Parcels(
                kinds=plan.kind[first:end],
                waves=plan.wave[first:end],
                num_peers=plan.num_peers[first:end],
                peers=plan.peers[slice(*_ends(plan.first_peer, plan.num_peers, first, end))],
                num_cells=plan.num_cells[first:end],
                cells=numbers[:num_sent],
                counts=self._counts_of(sent_cells),
                lengths=self._lengths_of(sent_cells),
            ),
            incoming=Parcels(
                kinds=plan.kind[received],
                waves=plan.wave[received],
                num_peers=np.ones(len(received), np.int32),
                peers=plan.source[received],
                num_cells=num_received,
                cells=numbers[num_sent:],
                counts=self._counts_of(received_cells),
                lengths=self._lengths_of(received_cells),
            ),
        )

    def _counts_of(self, cells: slice | Numbers) -> Whole | None:
        return None if self._counts is None else self._counts[cells]

    def _lengths_of(self, cells: slice | Numbers) -> Whole:
        starts = self._starts[cells]
        return self._cells.lengths[starts if self._counts is None else spans(starts, self._counts[cells])]


def _ends(starts: Whole, counts: Whole, first: int, end: int) -> tuple[int, int]:
    """Of the run that these together are."""
    return (int(starts[first]), int(starts[end - 1] + counts[end - 1])) if first < end else (0, 0)


def _used(values: Numbers, places: Whole) -> Numbers:
    """Those that occur, ascending. Their places among them are left in `places`, for who looks only for them."""
    is_used = np.zeros(len(places), np.bool_)
    is_used[values] = True
    used: Numbers = is_used.nonzero()[0]
    places[used] = np.arange(len(used))
    return used
