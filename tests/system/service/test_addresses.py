import socket

import pytest
from trainmaster.api.errors import ConfigError
from trainmaster.system.service.addresses import check_address, is_local, own_address


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:5555", "tcp://[::1]:1", "tcp://host.example:65535", "ipc:///tmp/x", "ipc://x"]
)
def test_good_addresses(address: str):
    check_address("--bind", address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:5555",
        "tcp://127.0.0.1",
        "tcp://:5555",
        "tcp://host:0",
        "tcp://host:65536",
        "tcp://host:port",
        "tcp://host:1/path",
        "tcp://::1:5555",
        "ipc://",
        "http://host:1",
        "udp://host:1",
    ],
)
def test_bad_addresses_are_named(address: str):
    with pytest.raises(ConfigError, match=r"--bind = '.*': must be tcp://HOST:PORT or ipc://PATH\. Write for example"):
        check_address("--bind", address)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("ipc:///tmp/x", True),
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.8.9.1:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://[::]:1", False),
        ("tcp://*:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://localhost.example:1", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(address: str, local: bool):
    assert is_local(address) is local


def test_to_a_local_master_the_own_address_is_loopback():
    assert own_address("ipc:///tmp/x") == "127.0.0.1"
    assert own_address("tcp://localhost:5555") == "127.0.0.1"


def test_to_another_machine_the_own_address_is_that_of_the_route(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def resolve(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        asked.append((host, port))
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert own_address("tcp://master.example:5555") == "127.0.0.1"
    assert asked == [("master.example", 5555)]


def test_a_master_whose_name_is_unknown_is_a_config_error(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConfigError, match=r"--master = 'tcp://mastre\.example:5555'.*Name or service not known"):
        own_address("tcp://mastre.example:5555")
