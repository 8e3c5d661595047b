"""ZeroMQ addresses: which may be bound without keys, and which of this machine's addresses another worker can reach."""

from __future__ import annotations

import ipaddress
import re
import socket

from ...api.errors import ConfigError

_TCP = re.compile(r"tcp://(?P<host>\[[^\]]+\]|[^:/\[\]]+):(?P<port>\d+)")


def check_address(field: str, address: str) -> None:
    """Raises `ConfigError` unless this is `tcp://HOST:PORT` or `ipc://PATH`."""
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return
    match = _TCP.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 2**16:
        raise ConfigError(
            field, address, "must be tcp://HOST:PORT or ipc://PATH", "write for example tcp://127.0.0.1:5555"
        )


def is_local(address: str) -> bool:
    """Whether only this machine can reach the address: ipc, or a loopback address."""
    if address.startswith("ipc://"):
        return True
    return is_loopback(_host(address))


def is_loopback(host: str) -> bool:
    """Whether this is an address or a name of the machine that asks, whichever that is."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_address(master: str) -> str:
    """This machine's address on the way to the master, for other workers to connect to."""
    if is_local(master):
        return "127.0.0.1"
    match = _TCP.fullmatch(master)
    assert match is not None, f"{master} was checked before"
    try:
        family, kind, _, _, target = socket.getaddrinfo(_host(master), int(match["port"]), type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise ConfigError("--master", master, f"the host cannot be found: {error}", "correct the name") from None
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # a datagram socket sends nothing: this only looks the route up
        return str(probe.getsockname()[0])


def _host(address: str) -> str:
    match = _TCP.fullmatch(address)
    assert match is not None, f"{address} was checked before"
    return match["host"].strip("[]")
