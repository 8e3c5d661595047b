import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainmaster.system.service.notify import environment_of_children, notify, watchdog_s


@pytest.fixture(autouse=True)
def unsupervised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind("notify")  # relative: the folder of a test may be too long for a socket's path
        bound.settimeout(5)
        (short := Path(f"/tmp/{uuid.uuid4().hex}")).symlink_to(tmp_path)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short / "notify"))
        yield bound
        short.unlink()


def test_the_supervisor_hears(supervisor: socket.socket):
    assert notify("READY=1\nSTATUS=waits for 2 workers")
    assert supervisor.recv(4096) == b"READY=1\nSTATUS=waits for 2 workers"


def test_text_that_is_no_unicode_is_sent_all_the_same(supervisor: socket.socket):
    assert notify("STATUS=\udcff Übung")
    assert supervisor.recv(4096) == "STATUS=\\udcff Übung".encode()


def test_an_abstract_socket_hears(monkeypatch: pytest.MonkeyPatch):
    name = f"trainmaster-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"\0{name}")
        bound.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert notify("WATCHDOG=1")
        assert bound.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", [None, "", "@", "/nobody/is/here", "/" + "x" * 200, "vsock:2:1234", "relative"])
def test_without_a_supervisor_nothing_happens(address: str | None, monkeypatch: pytest.MonkeyPatch):
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


def test_a_supervisor_that_reads_nothing_holds_nobody_up(supervisor: socket.socket):
    start_s, num_sent = time.monotonic(), 0
    while notify("WATCHDOG=1"):
        num_sent += 1
    assert num_sent > 0
    assert time.monotonic() - start_s < 2


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "a minute"}, None),
        ({"WATCHDOG_USEC": ""}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_interval(
    environment: dict[str, str], seconds: float | None, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert watchdog_s() == seconds


def test_children_do_not_speak_for_their_parent(monkeypatch: pytest.MonkeyPatch):
    before = environment_of_children()
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, "1")
    assert environment_of_children() == before
    assert "PATH" in before
