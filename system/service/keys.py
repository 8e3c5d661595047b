"""Who may speak to a run's master: a CURVE key for the master, one for each worker, one for operators. Of one run only.

    KEYS/master.key      the master's; stays where it is
    KEYS/allowed         who may come in: on each line a name and a public key. A key that is struck out is revoked
    KEYS/worker-0.key    a worker's, with the master's public key: this one file is all that the worker's host needs
    KEYS/operator.key    the same for those who ask after the run, pause it or stop it

Guarantees:
- what others may read or change, or what belongs to another user, is refused, never used;
- a file is there whole or not at all, is private from its first byte on, and is never overwritten; only `allowed` is;
- a secret stands in its file and in ZeroMQ's memory: it is in no message, log line or `repr` of ours.

What it does not do: decide who comes in. See `system.rpc.zap`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NewType

import zmq

from ...api.errors import ConfigError
from .files import sync

PublicKey = NewType("PublicKey", str)
"""In Z85, as it stands in files: 40 characters."""
DIRECTORY = "keys"
"""Of a run's keys, in its run directory, unless another is named."""
ALLOWED = "allowed"
_MASTER = "master"
_OPERATOR = "operator"
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"operator|worker-\d{1,6}")
_OTHERS = 0o077
"""Modes that are too loose."""


class Role(StrEnum):
    WORKER = "worker"
    OPERATOR = "operator"
    """Who asks after the run, pauses it or stops it."""
    NOBODY = "nobody"
    """Whose key is not, or not any more, among those that are allowed."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a key."""

    name: str
    """`worker-0`, or `operator`."""
    key: PublicKey
    role: Role


@dataclass(frozen=True, slots=True)
class KeyPair:
    public: PublicKey
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """What the master needs."""

    directory: Path
    pair: KeyPair
    allowed: Mapping[PublicKey, Holder]
    """As the file was when it was read. It may change while the run goes on."""


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a worker needs, or an operator."""

    file: Path
    name: str
    pair: KeyPair
    master: PublicKey

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Has a socket that is not yet connected encrypt, show this key, and speak to nobody but the run's master."""
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.pair.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.pair.secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.master.encode())

    def refused(self, master: str) -> ConfigError:
        """For a holder who is told that this key is not allowed."""
        return ConfigError(
            "--keys",
            str(self.file),
            f"the master at {master} does not accept this key ({self.name}): it was revoked, or the master's keys are "
            "made anew",
            f"copy {self.name}.key from the run's keys again, or have it made anew with `trainmaster keys`",
        )


# -- making -----------------------------------------------------------------------------------------------------------


def make_keys(directory: Path, num_workers: int) -> tuple[str, ...]:
    """Makes the keys that are missing, and allows them. Returns their names; what is there stays as it is.

    A worker or operator whose name is in `allowed` has its key already, be the file here or on another host.
    Raises `ConfigError` if the directory is not ours alone, or for the file of a key that was revoked.
    """
    if num_workers < 1:
        raise ConfigError("--workers", num_workers, "must be at least 1", "give the number of the run's workers")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--keys", str(directory), f"cannot be made: {error.strerror}", "choose another") from None
    _check_directory(directory)
    made = []
    if not has_keys(directory):
        if (directory / ALLOWED).exists():
            raise _missing(directory / f"{_MASTER}.key")
        _make_key(directory, _MASTER, None)
        made.append(_MASTER)
    master = _read_key(directory / f"{_MASTER}.key")
    allowed = dict(read_allowed(directory)) if (directory / ALLOWED).exists() else {}
    present = {holder.name for holder in allowed.values()}
    for name in (*(f"worker-{at}" for at in range(num_workers)), _OPERATOR):
        if name not in present:
            key = _make_key(directory, name, master.pair.public)
            allowed[key] = _holder(name, key)
            made.append(name)
    _write_allowed(directory, allowed)
    return tuple(made)


def revoke(directory: Path, name: str) -> None:
    """Strikes a key from those that are allowed. A master that runs heeds it within about a second.

    Remove the key's file too, and `make_keys` makes that name another. Raises `ConfigError` if it is not allowed.
    """
    _check_directory(directory)
    allowed = read_allowed(directory)
    if name not in {holder.name for holder in allowed.values()}:
        raise ConfigError("--revoke", name, f"is not in {directory / ALLOWED}", "look there for names")
    _write_allowed(directory, {key: holder for key, holder in allowed.items() if holder.name != name})


def _make_key(directory: Path, name: str, master: PublicKey | None) -> PublicKey:
    _check_curve()
    public, secret = (half.decode() for half in zmq.curve_keypair())
    lines = [f"# Trainmaster: who has this file can pass for {name}", f"name {name}", f"public {public}"]
    lines += [f"secret {secret}"] + ([] if master is None else [f"master {master}"])
    path = directory / f"{name}.key"
    aside = _write_aside(path, lines)
    try:
        os.link(aside, path)  # unlike a rename, it fails if there is one
    except FileExistsError:
        raise ConfigError(
            "--keys",
            str(path),
            f"this key is there, but not in {directory / ALLOWED}: it was revoked",
            "remove the file, and another is made",
        ) from None
    finally:
        aside.unlink()
    sync(directory)
    return PublicKey(public)


def _write_allowed(directory: Path, allowed: Mapping[PublicKey, Holder]) -> None:
    path = directory / ALLOWED
    lines = ["# Trainmaster: who may speak to the master of this run. A key that is struck out is revoked"]
    _write_aside(path, [*lines, *(f"{holder.name} {key}" for key, holder in allowed.items())]).replace(path)
    sync(directory)


def _write_aside(path: Path, lines: list[str]) -> Path:
    """A new file beside `path` that nobody else can read, on disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write("\n".join(lines) + "\n")
    sync(aside)
    return aside


# -- reading ----------------------------------------------------------------------------------------------------------


def has_keys(directory: Path) -> bool:
    """Whether a run has keys there: then its master lets nobody in without."""
    return (directory / f"{_MASTER}.key").exists()


def load_master_keys(directory: Path) -> MasterKeys:
    """Raises `ConfigError` if they are not there, not whole, or not ours alone."""
    _check_directory(directory)
    return MasterKeys(directory, _read_key(directory / f"{_MASTER}.key").pair, read_allowed(directory))


def load_worker_keys(file: Path) -> ClientKeys:
    """The same for a worker."""
    return _load_client_keys(file, Role.WORKER)


def load_operator_keys(path: Path) -> ClientKeys:
    """The same for an operator, from the file or the directory that it is in."""
    if path.is_dir():
        _check_directory(path)
        path /= f"{_OPERATOR}.key"
    return _load_client_keys(path, Role.OPERATOR)


def read_allowed(directory: Path) -> Mapping[PublicKey, Holder]:
    """Who may come in. Raises `ConfigError`."""
    path = directory / ALLOWED
    allowed: dict[PublicKey, Holder] = {}
    for name, key in _pairs(path):
        if _NAME.fullmatch(name) is None or _KEY.fullmatch(key) is None:
            raise _unreadable(path)
        allowed[PublicKey(key)] = _holder(name, PublicKey(key))
    return allowed


def _holder(name: str, key: PublicKey) -> Holder:
    return Holder(name, key, Role.OPERATOR if name == _OPERATOR else Role.WORKER)


def _load_client_keys(file: Path, role: Role) -> ClientKeys:
    if file.is_dir():
        raise ConfigError("--keys", str(file), "is a directory", f"name the file of one {role} in it")
    keys = _read_key(file)
    if keys.name == _MASTER or _holder(keys.name, keys.pair.public).role is not role:
        raise ConfigError("--keys", str(file), f"is the key of {keys.name}", f"give this {role} a key of its own")
    return keys


def _read_key(path: Path) -> ClientKeys:
    """A key file of any kind; of the master's own, `master` is what it says as `public`."""
    _check_curve()
    said = dict(_pairs(path))
    name, public, secret = (said.get(what, "") for what in ("name", "public", "secret"))
    master = public if name == _MASTER else said.get("master", "")
    is_name = name == _MASTER or _NAME.fullmatch(name) is not None
    if not is_name or any(_KEY.fullmatch(key) is None for key in (public, secret, master)):
        raise _unreadable(path)
    if zmq.curve_public(secret.encode()) != public.encode():
        raise _unreadable(path)
    return ClientKeys(path, name, KeyPair(PublicKey(public), secret.encode()), PublicKey(master))


def _pairs(path: Path) -> list[tuple[str, str]]:
    """The two words of each line. What is wrong with a file is said without what is in it."""
    try:
        with path.open(encoding="ascii") as file:
            _check_private(path, os.fstat(file.fileno()), "600")
            lines = [line.split() for line in file if not line.startswith("#")]
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise ConfigError("--keys", str(path), f"cannot be read: {error.strerror}", "give rights to it") from None
    except UnicodeDecodeError:
        raise _unreadable(path) from None
    if any(len(words) not in (0, 2) for words in lines):
        raise _unreadable(path)
    return [(words[0], words[1]) for words in lines if words]


def _check_curve() -> None:
    if not zmq.has("curve"):
        raise ConfigError("--keys", zmq.zmq_version(), "this ZeroMQ cannot encrypt", "install pyzmq from its wheel")


def _check_directory(directory: Path) -> None:
    try:
        status = directory.stat()
    except OSError as error:
        raise ConfigError(
            "--keys", str(directory), f"cannot be read: {error.strerror}", "make it with `trainmaster keys`"
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError("--keys", str(directory), "is not a directory", "name the directory of the run's keys")
    _check_private(directory, status, "700")


def _check_private(path: Path, status: os.stat_result, wanted: str) -> None:
    """Raises `ConfigError` unless it is this user's alone."""
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid():
        raise ConfigError(
            "--keys",
            str(path),
            f"belongs to user {status.st_uid}, and this process is user {os.geteuid()}",
            f"run `chown {os.geteuid()} {path}` if its keys were never another's, or make new ones",
        )
    if mode & _OTHERS:
        raise ConfigError(
            "--keys",
            str(path),
            f"others may use it: its mode is {mode:04o}, where {wanted:0>4} is the loosest",
            f"run `chmod {wanted} {path}`, and make new keys if others could read these",
        )


def _missing(path: Path) -> ConfigError:
    return ConfigError("--keys", str(path), "there is no such file", "make keys with `trainmaster keys`, or copy it")


def _unreadable(path: Path) -> ConfigError:
    return ConfigError("--keys", str(path), "is not a whole file of Trainmaster's keys", "copy it again, or make new")
