"""Key files: who may read them, what is in them, and what is made when."""

import os
import stat
from pathlib import Path

import pytest
import zmq
from trainmaster.api.errors import ConfigError
from trainmaster.system.service.keys import (
    Role,
    has_keys,
    load_master_keys,
    load_operator_keys,
    load_worker_keys,
    make_keys,
    read_allowed,
    revoke,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", 2)
    return tmp_path / "keys"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_private_and_nothing_else_is_left_behind(directory: Path):
    assert mode_of(directory) == 0o700
    assert {path.name: mode_of(path) for path in directory.iterdir()} == dict.fromkeys(
        ("allowed", "master.key", "operator.key", "worker-0.key", "worker-1.key"), 0o600
    )


def test_every_key_is_another_and_the_master_allows_all_but_its_own(directory: Path):
    master, operator = load_master_keys(directory), load_operator_keys(directory)
    workers = [load_worker_keys(directory / f"worker-{at}.key") for at in range(2)]
    clients = [*workers, operator]
    assert [keys.name for keys in clients] == ["worker-0", "worker-1", "operator"]
    assert {keys.master for keys in clients} == {master.pair.public}
    assert [master.allowed[keys.pair.public].role for keys in clients] == [Role.WORKER, Role.WORKER, Role.OPERATOR]
    assert len(master.allowed) == 3
    assert len({keys.pair.secret for keys in (master, *clients)}) == 4
    for keys in (master, *clients):
        assert zmq.curve_public(keys.pair.secret) == keys.pair.public.encode()


def test_only_what_is_missing_is_made(directory: Path):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert make_keys(directory, 2) == ()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    (directory / "worker-1.key").unlink()  # it was moved to its host
    assert make_keys(directory, 3) == ("worker-2",)
    assert not (directory / "worker-1.key").exists()
    assert load_worker_keys(directory / "worker-0.key").file.read_bytes() == before["worker-0.key"]


def test_a_revoked_key_is_made_anew_when_its_file_is_gone(directory: Path):
    old = load_worker_keys(directory / "worker-1.key")
    revoke(directory, "worker-1")
    assert old.pair.public not in read_allowed(directory)
    with pytest.raises(ConfigError, match=r"worker-1\.key': this key is there, but not in .*: it was revoked\. Remove"):
        make_keys(directory, 2)
    (directory / "worker-1.key").unlink()
    assert make_keys(directory, 2) == ("worker-1",)
    assert load_worker_keys(directory / "worker-1.key").pair.public != old.pair.public


def test_only_an_allowed_name_can_be_revoked(directory: Path):
    with pytest.raises(ConfigError, match=r"--revoke = 'worker-7': is not in .*allowed\. Look there for names"):
        revoke(directory, "worker-7")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o660])
@pytest.mark.parametrize("name", ["master.key", "allowed"])
def test_a_file_of_the_master_that_others_may_use_is_refused(directory: Path, name: str, mode: int):
    (directory / name).chmod(mode)
    with pytest.raises(
        ConfigError,
        match=rf"--keys = '{directory}/{name}': others may use it: its mode is {mode:04o}, where 0600 is the loosest\. "
        rf"Run `chmod 600 {directory}/{name}`",
    ):
        load_master_keys(directory)


def test_a_file_of_a_worker_or_operator_that_others_may_read_is_refused(directory: Path):
    for name in ("worker-0.key", "operator.key"):
        (directory / name).chmod(0o644)
    with pytest.raises(ConfigError, match=r"worker-0\.key': others may use it: its mode is 0644"):
        load_worker_keys(directory / "worker-0.key")
    with pytest.raises(ConfigError, match=r"operator\.key': others may use it: its mode is 0644"):
        load_operator_keys(directory)


def test_a_file_that_only_its_owner_reads_will_do(directory: Path):
    (directory / "worker-0.key").chmod(0o400)
    assert load_worker_keys(directory / "worker-0.key").name == "worker-0"


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o711])
def test_a_directory_that_others_may_enter_is_refused(directory: Path, mode: int):
    directory.chmod(mode)
    rule = rf"others may use it: its mode is {mode:04o}, where 0700 is the loosest\. Run `chmod 700 {directory}`"
    for use in (load_master_keys, load_operator_keys, lambda path: make_keys(path, 2)):
        with pytest.raises(ConfigError, match=rule):
            use(directory)


def test_a_file_of_another_user_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=rf"belongs to user {owner}, and this process is user {owner + 1}\."):
        load_worker_keys(directory / "worker-0.key")


def test_a_worker_and_an_operator_need_keys_of_their_own(directory: Path):
    with pytest.raises(ConfigError, match=r"is the key of operator\. Give this worker a key of its own"):
        load_worker_keys(directory / "operator.key")
    with pytest.raises(ConfigError, match=r"is the key of master\. Give this worker"):
        load_worker_keys(directory / "master.key")
    with pytest.raises(ConfigError, match=r"is the key of worker-0\. Give this operator"):
        load_operator_keys(directory / "worker-0.key")
    with pytest.raises(ConfigError, match=r"is a directory\. Name the file of one worker in it"):
        load_worker_keys(directory)


def test_files_that_are_missing_are_named(directory: Path, tmp_path: Path):
    assert has_keys(directory)
    assert not has_keys(tmp_path)
    with pytest.raises(ConfigError, match=r"worker-9\.key': there is no such file\. Make keys with `trainmaster keys`"):
        load_worker_keys(directory / "worker-9.key")
    with pytest.raises(ConfigError, match=r"nowhere': cannot be read: No such file or directory\. Make it with"):
        load_master_keys(tmp_path / "nowhere")
    (directory / "master.key").unlink()
    with pytest.raises(ConfigError, match=r"master\.key': there is no such file"):
        make_keys(directory, 2)


def test_what_is_wrong_with_a_file_is_said_without_its_secret(directory: Path):
    path = directory / "worker-0.key"
    whole = path.read_text()
    secret = load_worker_keys(path).pair.secret.decode()
    other = load_worker_keys(directory / "worker-1.key").pair.secret.decode()
    for text in (
        "",
        whole[:-20],
        whole.replace("name worker-0", "name ../worker"),
        whole.replace("secret ", "secret"),
        whole.replace(secret, secret[:-1]),
        whole.replace(secret, other),
        whole.replace(secret, secret + " more"),
        whole.replace(secret, "ä" * 40),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not a whole file of Trainmaster's keys") as caught:
            load_worker_keys(path)
        assert secret not in str(caught.value)
        assert other not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_broken_list_is_refused(directory: Path):
    path = directory / "allowed"
    for line in ("worker-0", "worker-0 short", "root " + "a" * 40, "worker-0 " + "a" * 40 + " more"):
        path.write_text(line + "\n")
        with pytest.raises(ConfigError, match="allowed': is not a whole file of Trainmaster's keys"):
            load_master_keys(directory)


def test_no_secret_is_in_what_a_key_says_of_itself(directory: Path):
    for keys in (load_master_keys(directory), load_operator_keys(directory)):
        secret = keys.pair.secret.decode()
        for text in (repr(keys), str(keys), f"{keys.pair}", repr(keys.pair)):
            assert secret not in text
            assert keys.pair.public in text


def test_no_worker_means_no_keys(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--workers = 0: must be at least 1"):
        make_keys(tmp_path / "keys", 0)
    assert not (tmp_path / "keys").exists()


def test_a_stranger_who_comes_first_finds_no_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the umask, a file is private from its first byte on."""
    seen = []
    real = os.open

    def watched(path: object, flags: int, mode: int = 0o777, **rest: object) -> int:
        descriptor = real(path, flags, mode, **rest)
        if flags & os.O_CREAT:
            seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
            assert flags & os.O_EXCL
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys", 1)
    finally:
        os.umask(before)
    assert seen == [0o600] * 4
    assert mode_of(tmp_path / "keys") == 0o700


def test_a_zeromq_that_cannot_encrypt_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zmq, "has", lambda _: False)
    with pytest.raises(ConfigError, match=r"this ZeroMQ cannot encrypt\. Install pyzmq from its wheel"):
        load_worker_keys(directory / "worker-0.key")
