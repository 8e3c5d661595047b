"""Hosts on one machine: network namespaces with names and addresses of their own, on one switch.

    host 0: eth0 ----- port0 [         ]
    host 1: eth0 ----- port1 [ bridge0 ]    the bridge and its ports are in a namespace of their own: the switch
    host 2: eth0 ----- port2 [         ]

A host that is cut off keeps its link: packets of both directions vanish at the switch, and nobody is told.
The machine's own network is left alone: an address 10.77.0.N is one inside of these namespaces.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from workbench import Workbench

_AS_HOST = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
"""A host has a name of its own too: workers of one name count as being on one host."""


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace."""

    name: str
    """Of the namespace, and what `gethostname` answers inside."""
    address: str
    switch: str
    port: str
    """Its end of the cable at the switch."""

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs this one on the host. The process keeps its pid."""
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", _AS_HOST, self.name, *arguments]

    def cut_off(self) -> None:
        """From now on all that it sends, and all that is sent to it, is lost. Its link stays up."""
        _ip("-n", self.switch, "link", "set", self.port, "nomaster")

    def join(self) -> None:
        """Ends `cut_off`."""
        _ip("-n", self.switch, "link", "set", self.port, "master", "bridge0")

    def vanish(self) -> None:
        """Its link goes down: for the others it is as if it lost its power."""
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def close_connections(self, port: int) -> int:
        """Breaks its TCP connections to this port, at both ends. Returns how many; 0 where the kernel cannot do it."""
        said = _run("ip", "netns", "exec", self.name, "ss", "-K", "-H", "-t", f"dport = :{port}")
        return len(said.splitlines())


def start_python(workbench: Workbench, host: Host | None, *arguments: str) -> subprocess.Popen[str]:
    """Like `workbench.start`, but any Python, on a host: `start_python(workbench, host, "-m", "trainmaster", ...)`."""
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command if host is None else host.command(*command),
        cwd=workbench.folder,
        env=os.environ | {"TRAINMASTER_TEST": workbench.mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workbench.started.append(process)
    return process


@cache
def what_is_missing() -> str | None:
    """Why there can be no namespaces on this machine, and what to install; None if there can be."""
    name = _new_name()
    try:
        with _namespace(name):
            _ip("-n", name, "link", "add", "name", "bridge0", "type", "bridge")
            _ip("-n", name, "link", "add", "name", "eth0", "type", "veth", "peer", "name", "port0")
            subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed (Debian: apt-get install iproute2 util-linux)"
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces, which root can: {error.cmd}: {error.stderr!r}"
    return None


@contextlib.contextmanager
def hosts_on_a_switch(num_hosts: int) -> Iterator[list[Host]]:
    """Makes the hosts, and takes them away with every process that is still on them."""
    name = _new_name()
    switch = f"{name}-switch"
    hosts = [Host(f"{name}-{at}", f"10.77.0.{at + 1}", switch, f"port{at}") for at in range(num_hosts)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_namespace(switch))
        _ip("-n", switch, "link", "add", "name", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for host in hosts:
            stack.enter_context(_namespace(host.name))
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "link", "add", "eth0", "type", "veth", "peer", "name", host.port, "netns", switch)
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", switch, "link", "set", host.port, "up", "master", "bridge0")
        yield hosts


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[None]:
    _ip("netns", "add", name)
    try:
        yield
    finally:
        for pid in map(int, _ip("netns", "pids", name).split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _ip("netns", "delete", name)  # with its links


def _new_name() -> str:
    return f"trainmaster-{uuid.uuid4().hex[:8]}"


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
