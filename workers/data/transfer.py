"""Carries out a redistribution: one packed buffer for each parcel, in the values' own types, unpadded.

    parcel   | block 0, tokens: a b c | block 1, tokens: d | block 0, scores: a b c | block 0, mask: a b c |
               widest types first, so that each part is aligned and nothing lies between them

Nothing can deadlock. All receives are posted first, and a send does not wait for its receiver: it waits for nothing
but what it passes on, which are parcels of earlier waves. By induction over waves all are sent. Parcels of one sender
are received in the order in which they are sent, by waves and then as planned: one tag is enough.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...system.rpc.parcels import Parcel, Redistribute
from ..parallel.groups import Group, Receiving
from .packed import PackedSamples, bytes_per_value, dtype_of
from .store import Store

HUGE_PAGE_BYTES = 2 * 2**20


@dataclass(slots=True)
class _Incoming:
    """A parcel on its way here."""

    parcel: Parcel
    buffer: Tensor
    receiving: Receiving
    is_stored: bool = False

    def store_when_here(self, store: Store) -> None:
        if not self.is_stored:
            self.receiving.wait()
            store.add(_parts(self.parcel, self.buffer))
            self.is_stored = True


def redistribute(plan: Redistribute, store: Store, group: Group) -> None:
    """Sends and receives this worker's parcels; returns when all are sent and stored.

    Redistributions with different tags may run at once. Raises `PeerLost` if a peer fails.
    """
    incoming = [_expect(parcel, group, plan.tag) for parcel in _by_wave(plan.receives)]
    outgoing = _by_wave(plan.sends)
    bringing = _bringing(incoming) if outgoing and outgoing[-1].wave > 0 else {}
    sendings = []
    for parcel in outgoing:
        for value in _values(parcel) if parcel.wave > 0 else ():
            if value in bringing and bringing[value].parcel.wave < parcel.wave:
                bringing[value].store_when_here(store)
        buffer = _memory(_num_bytes(parcel))
        for part in _parts(parcel, buffer):
            store.packed(part.samples, into=part)
        sendings += [group.send(buffer, peer, plan.tag) for peer in parcel.peers]
    for each in incoming:
        each.store_when_here(store)
    for sending in sendings:
        sending.wait()


def _by_wave(parcels: Iterable[Parcel]) -> list[Parcel]:
    return sorted(parcels, key=lambda parcel: parcel.wave)


def _expect(parcel: Parcel, group: Group, tag: int) -> _Incoming:
    buffer = _memory(_num_bytes(parcel))
    return _Incoming(parcel, buffer, group.expect(buffer, parcel.peers[0], tag))


def _values(parcel: Parcel) -> Iterator[tuple[str, str]]:
    """Key and sample of each."""
    return ((key, sequence) for block in parcel.blocks for key in block.keys for sequence in block.ids)


def _bringing(incoming: Sequence[_Incoming]) -> dict[tuple[str, str], _Incoming]:
    """Which parcel brings a value."""
    return {value: each for each in incoming for value in _values(each.parcel)}


def _num_bytes(parcel: Parcel) -> int:
    return sum(
        int(column.sizes.sum()) * bytes_per_value(key, column)
        for block in parcel.blocks
        for key, column in block.keys.items()
    )


def _parts(parcel: Parcel, buffer: Tensor) -> list[PackedSamples]:
    """The parcel's blocks as views of its buffer."""
    values: list[dict[str, Tensor | None]] = [{} for _ in parcel.blocks]
    places = [(place, key) for place, block in enumerate(parcel.blocks) for key in sorted(block.keys)]
    start = 0
    for place, key in sorted(places, key=lambda at: -dtype_of(at[1], parcel.blocks[at[0]].keys[at[1]]).itemsize):
        column = parcel.blocks[place].keys[key]
        shape = (int(column.lengths.sum()), *column.trailing)
        stop = start + shape[0] * bytes_per_value(key, column)
        values[place][key] = buffer[start:stop].view(dtype_of(key, column)).view(shape)
        start = stop
    return [PackedSamples(samples=block, values=each) for block, each in zip(parcel.blocks, values, strict=True)]


def _memory(num_bytes: int) -> Tensor:
    """`[num_bytes]`, uint8. In huge pages where there are any: new small ones take as long as the way over the wire."""
    if num_bytes < 2 * HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
