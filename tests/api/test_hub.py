from pathlib import Path

import pytest
from trainmaster.api.hub import advice, directory_of, is_repository


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of some/model, as `hf download` leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "hub" / "models--some--model"
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    return snapshot


def test_a_repository_is_its_newest_snapshot(cached: Path):
    assert directory_of(Path("some/model")) == cached


def test_a_directory_of_this_name_comes_first(cached: Path, tmp_path: Path):
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert directory_of(Path("some/model")) == Path("some/model")


@pytest.mark.parametrize("path", ["model", "a/b/c", "/some/model", "../model", "some/other"])
def test_what_is_not_there_stays_as_it_is(cached: Path, path: str):
    assert directory_of(Path(path)) == Path(path)


def test_the_advice_tells_how_to_fetch_a_repository(cached: Path):
    assert is_repository(Path("some/other"))
    assert "`hf download some/other`" in advice(Path("some/other"))
    assert "download" not in advice(Path("/some/other"))
