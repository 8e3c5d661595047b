"""Process groups: named by (run, epoch, members), formed on a store that a worker hosts, never the default group.

Every wait stands under a deadline, and every failure is a `PeerLost` that names the group and what was under way.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore  # the public names lack types

from ...api.errors import PeerLost


@dataclass(frozen=True, slots=True)
class Sending:
    """A send under way. The tensor is kept alive until `wait` returns."""

    tensor: Tensor
    work: dist.Work
    group: Group

    def wait(self) -> None:
        with self.group.named("send"):
            self.work.wait(self.group.deadline)


@dataclass(frozen=True, slots=True)
class Receiving:
    """A receive under way. The tensor is kept alive, and means nothing, until `wait` returns."""

    tensor: Tensor
    work: dist.Work
    group: Group

    def wait(self) -> None:
        with self.group.named("receive"):
            self.work.wait(self.group.deadline)


@dataclass(slots=True)
class Group:
    """The members of one process group; peers are named by their index among the members."""

    name: str
    members: tuple[int, ...]
    """Ranks, in order."""
    index: int
    """This worker's place among the members."""
    backend: Any  # torch's backends share no public base class; None once the group was left
    deadline: timedelta
    connections: tuple[tuple[int, int], ...] = ()
    """Descriptor and inode of each socket to another member."""

    @property
    def size(self) -> int:
        return len(self.members)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums in place over all members."""
        with self.named("all_reduce"):
            self._live().allreduce([tensor]).wait(self.deadline)

    def send(self, tensor: Tensor, to: int, tag: int) -> Sending:
        """Starts to send a contiguous tensor. The receiver must ask for the same shape, type and tag."""
        with self.named("send"):
            return Sending(tensor, self._live().send([tensor], to, tag), self)

    def receive(self, tensor: Tensor, source: int, tag: int) -> None:
        """Receives into a contiguous tensor, and waits for it."""
        self.expect(tensor, source, tag).wait()

    def expect(self, tensor: Tensor, source: int, tag: int) -> Receiving:
        """Starts to receive into a contiguous tensor. Messages of one sender and tag arrive in the order of this."""
        with self.named("receive"):
            return Receiving(tensor, self._live().recv([tensor], source, tag), self)

    def leave(self) -> None:
        """Cuts the connections: whatever waits in this group, here or elsewhere, fails. Safe from any thread."""
        if self.backend is not None:
            self.backend.abort()  # of which gloo makes nothing: there, a stopped peer would be waited for
        for descriptor, inode in self.connections:
            with contextlib.suppress(OSError):  # closed before, or the descriptor is another's by now
                if os.fstat(descriptor).st_ino == inode:
                    with socket.socket(fileno=os.dup(descriptor)) as connection:
                        connection.shutdown(socket.SHUT_RDWR)
        self.connections = ()
        self.backend = None

    def _live(self) -> Any:  # torch's backends share no public base class
        if self.backend is None:
            raise PeerLost(f"group {self.name} of workers {list(self.members)} was left")
        return self.backend

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerLost(f"{what} in group {self.name} of workers {list(self.members)}: {error}") from error


def host_store(address: str) -> tuple[TCPStore, int]:
    """Opens a store on a free port of this one address (not of every interface). Returns it and its port."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.bind((address, 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    store = TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )
    return store, port


def join_store(address: str, port: int, deadline: timedelta) -> TCPStore:
    """Connects to a store that another worker hosts."""
    try:
        return TCPStore(address, port, is_master=False, timeout=deadline)
    except RuntimeError as error:
        raise PeerLost(f"the store of the process groups at {address}:{port} cannot be reached: {error}") from error


def form_group(
    store: Store,
    name: str,
    members: Sequence[int],
    rank: int,
    device: torch.device,
    own_address: str,
    deadline: timedelta,
) -> Group:
    """Forms a group. Every member calls this, in the same order of groups; it returns once all have."""
    index, before = list(members).index(rank), _connections()
    prefixed = PrefixStore(name, store)
    try:
        backend: Any  # torch's backends share no public base class
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = deadline
            backend = dist.ProcessGroupNCCL(prefixed, index, len(members), options)
        else:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [ProcessGroupGloo.create_device(hostname=own_address)]
            options._timeout = deadline
            backend = ProcessGroupGloo(prefixed, index, len(members), options)
    except RuntimeError as error:
        raise PeerLost(f"group {name} of workers {list(members)} could not be formed: {error}") from error
    connections = tuple(_connections() - before)
    return Group(name, tuple(members), index, backend, deadline, connections)


def _connections() -> set[tuple[int, int]]:
    """Descriptor and inode of each TCP connection of this process; none where the system does not tell."""
    found = set()
    descriptors = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for descriptor in map(int, descriptors):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as probe:
                    if probe.family in (socket.AF_INET, socket.AF_INET6) and probe.getpeername():
                        found.add((descriptor, os.fstat(descriptor).st_ino))
    return found
