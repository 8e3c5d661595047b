import os
import signal

import pytest
from trainmaster.system.service.failpoints import InjectedFault, failpoint


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: calls.append((pid, number)))
    return calls


def test_an_unarmed_failpoint_does_nothing(killed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRAINMASTER_FAILPOINT", raising=False)
    failpoint("worker.save", 1)
    assert killed == []


@pytest.mark.parametrize(
    ("armed", "name", "rank", "dies"),
    [
        ("worker.save", "worker.save", 1, True),
        ("worker.save", "worker.save", None, True),
        ("worker.save@1", "worker.save", 1, True),
        ("worker.save@1", "worker.save", 0, False),
        ("worker.save@1", "worker.save", 11, False),
        ("worker.save@1", "worker.save", None, False),
        ("worker.save", "worker.saved", 1, False),
        ("", "worker.save", 1, False),
    ],
)
def test_an_armed_failpoint_kills_at_its_place_and_rank(
    killed: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    armed: str,
    name: str,
    rank: int | None,
    dies: bool,
):
    monkeypatch.setenv("TRAINMASTER_FAILPOINT", armed)
    failpoint(name, rank)
    assert killed == ([(os.getpid(), signal.SIGKILL)] if dies else [])


def test_an_armed_failpoint_can_raise_instead(killed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRAINMASTER_FAILPOINT", "worker.save@1=raise")
    failpoint("worker.save", 0)
    with pytest.raises(InjectedFault, match=r"the failpoint worker\.save@1 is armed"):
        failpoint("worker.save", 1)
    assert killed == []
