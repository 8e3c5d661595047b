from pathlib import Path

import pytest
from trainmaster.system.service.claims import claim
from trainmaster.system.service.lifecycle import NEXT, Life, State, read_entry


def test_every_change_is_on_disk(tmp_path: Path):
    with claim(tmp_path):
        life = Life(tmp_path, "first", "tcp://127.0.0.1:1")
        for state in (State.READY, State.RUNNING, State.PAUSED, State.RUNNING, State.STOPPING, State.STOPPED):
            life.enter(state)
            entry = read_entry(tmp_path)
            assert entry == life.entry
            assert entry is not None
            assert (entry.run, entry.state, entry.address) == ("first", state, "tcp://127.0.0.1:1")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_illegal_changes_are_our_own_mistake(tmp_path: Path):
    life = Life(tmp_path, "first", "")
    with pytest.raises(AssertionError, match="a service that is starting cannot become paused"):
        life.enter(State.PAUSED)
    life.enter(State.FAILED, "it broke")
    assert life.entry.reason == "it broke"
    with pytest.raises(AssertionError, match="a service that is failed cannot become running"):
        life.enter(State.RUNNING)


def test_no_state_is_a_dead_end_but_the_last():
    for state in State:
        assert (not NEXT[state]) == state.is_final
        assert State.LOST not in NEXT[state]


def test_a_service_whose_process_is_gone_is_lost(tmp_path: Path):
    assert read_entry(tmp_path) is None
    with claim(tmp_path):
        Life(tmp_path, "first", "").enter(State.READY)
    entry = read_entry(tmp_path)
    assert entry is not None
    assert entry.state is State.LOST


def test_what_cannot_be_read_is_no_service(tmp_path: Path):
    (tmp_path / "service.json").write_text("{}")
    assert read_entry(tmp_path) is None
