"""Carries out a redistribution: one packed buffer for each pair of workers, in the values' own types, unpadded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...api.batch import KeyColumn, Samples
from ...system.rpc.commands import Redistribute
from ..parallel.groups import Group
from .store import Store


def redistribute(plan: Redistribute, store: Store, group: Group) -> None:
    """Sends and receives this worker's parcels. Sends do not wait for each other, so no order can deadlock."""
    sendings = [
        group.send(_pack(block, store), peer, plan.tag)
        for parcel in plan.sends
        for block in parcel.blocks
        for peer in parcel.peers
    ]
    for parcel in plan.receives:
        for block in parcel.blocks:
            buffer = torch.empty(_num_bytes(block), dtype=torch.uint8)
            group.receive(buffer, parcel.peers[0], plan.tag)
            _unpack(block, buffer, store)
    for sending in sendings:
        sending.wait()


def _pack(samples: Samples, store: Store) -> Tensor:
    """All keys one after the other, wider types first so that each part is aligned. `[bytes]`, uint8."""
    parts = [
        store.get(sequence, key).contiguous().view(-1).view(torch.uint8)
        for key in _by_width(samples)
        for sequence in samples.ids
    ]
    return torch.cat(parts)


def _unpack(samples: Samples, buffer: Tensor, store: Store) -> None:
    at = 0
    for key in _by_width(samples):
        column = samples.keys[key]
        for sequence, length in zip(samples.ids, samples.sizes(key), strict=True):
            num_bytes = length * _bytes_per_token(column)
            values = buffer[at : at + num_bytes].view(_dtype(column)).view(length, *column.trailing)
            store.put(sequence, key, values.clone())  # its own memory: releasing one sequence frees it
            at += num_bytes


def _by_width(samples: Samples) -> list[str]:
    return sorted(samples.keys, key=lambda key: (-_dtype(samples.keys[key]).itemsize, key))


def _num_bytes(samples: Samples) -> int:
    return sum(int(column.sizes.sum()) * _bytes_per_token(column) for column in samples.keys.values())


def _bytes_per_token(column: KeyColumn) -> int:
    return _dtype(column).itemsize * math.prod(column.trailing)


def _dtype(column: KeyColumn) -> torch.dtype:
    dtype = getattr(torch, column.dtype)
    assert isinstance(dtype, torch.dtype), f"{column.dtype} names a torch type"
    return dtype
