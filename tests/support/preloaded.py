"""Processes of tests as copies of one that has imported torch and transformers: 3.5 s of a processor less each.

    test, or `trainmaster run` --command line, environment, folder, standard streams--> preloaded process
                               <--pid------------------------------------------------- forks --> the copy

From `main` on, a copy does what `python -m trainmaster ...` does. It is a child of whoever started it, and has its own
command line and environment, in /proc too. Unlike in a new interpreter, nothing is left to import late, and all copies
share one seed of hashes. So some runs are to start anew: those with TRAINMASTER_TEST_FRESH in their environment.

A `trainmaster run` or `doctor` gets a preloaded process of its own, so that what it starts becomes its child.
Linux only: elsewhere all start anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

IMPORTS = (
    "datasets",
    "networkx",
    "tensorboardX",
    "trainmaster.system.launchers.local",
    "trainmaster.system.master",
    "trainmaster.system.preflight",
    "trainmaster.workers.handlers",
    "trainmaster.workers.service",
    "transformers.models.qwen3.modeling_qwen3",
    "tyro",
)
FRESH = "TRAINMASTER_TEST_FRESH"
ROOM = "-" * 2**16
"""In the preloaded process's command line and environment, for those of its copies."""
STARTING_OTHERS = (["run"], ["doctor"])
"""Commands."""
MAX_BYTES = 2**17
"""Of a request."""
_libc = ctypes.CDLL(None)


@contextlib.contextmanager
def preloaded_process() -> Iterator[type[subprocess.Popen[str]]]:
    """What to start processes with in place of `subprocess.Popen`."""
    if sys.platform != "linux" or FRESH in os.environ:
        yield subprocess.Popen
        return
    ours, theirs = _pair()
    process = subprocess.Popen([sys.executable, "-P", __file__, ROOM], stdin=theirs, env=os.environ | {"ROOM": ROOM})
    theirs.close()
    assert ours.recv(1), "the preloaded process ended; its standard error says why"  # tests measure time: not this
    yield _popen(ours)
    ours.close()
    process.wait()


def forking() -> BaseContext:
    """For pools of processes: each is a copy, too, though of another process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["trainmaster.workers.handlers"])
    return context


def _popen(preloaded: socket.socket) -> type[subprocess.Popen[Any]]:
    """`subprocess.Popen`, but with copies where they will do."""
    lock = threading.Lock()

    class Popen(subprocess.Popen[Any]):
        def _execute_child(self, args: Any, *rest: Any) -> None:
            given = inspect.signature(super()._execute_child).bind(args, *rest).arguments
            environment = dict(os.environ if given["env"] is None else given["env"])
            if not _is_ours(args) or FRESH in environment:
                super()._execute_child(args, *rest)
                return
            request = {
                "arguments": list(map(os.fspath, args)),
                "environment": environment,
                "folder": os.fspath(given["cwd"] or os.getcwd()),
                "session": given["start_new_session"],
            }
            ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
            with lock, _taking_orphans():
                streams = [at if end == -1 else end for at, end in enumerate(ends)]
                socket.send_fds(preloaded, [json.dumps(request).encode()], streams)
                answer = preloaded.recv(64)
            assert answer, "the preloaded process ended; its standard error says why"
            self.pid, self._child_created = int(answer), True
            pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
            self._close_pipe_fds(*(given[name] for name in pipes))

    return Popen


@contextlib.contextmanager
def _taking_orphans() -> Iterator[None]:
    """A grandchild whose parent ends becomes our child."""
    set_child_subreaper = 36
    _libc.prctl(set_child_subreaper, 1, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(set_child_subreaper, 0, 0, 0, 0)


def _is_ours(command: Any) -> bool:
    """Whether a copy can do it: `python [-P] -m trainmaster ...` or `python FILE ...`."""
    if not isinstance(command, list | tuple) or command[0] != sys.executable:
        return False
    first, second, *_ = [*_without_options(command), "", ""]
    return first.endswith(".py") or (first, second) == ("-m", "trainmaster")


def _without_options(command: Sequence[str]) -> list[str]:
    return list(command[2:] if command[1] == "-P" else command[1:])


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


# ------------------------------------------------------------------------------------------------ the preloaded process


def _main() -> None:
    connection = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    gc.disable()
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    connection.send(b"1")
    request, streams, preloaded = _serve(connection)
    _become(request, streams, preloaded)
    first, *rest = _without_options(request["arguments"])
    if first == "-m":
        name, *sys.argv[1:] = rest
        _import_from(request["folder"], request)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        _import_from(os.path.dirname(os.path.abspath(first)), request)
        runpy.run_path(first, run_name="__main__")


def _import_from(folder: str, request: dict[str, Any]) -> None:
    if "-P" not in request["arguments"][:2]:
        sys.path.insert(0, folder)


def _serve(connection: socket.socket) -> tuple[dict[str, Any], list[int], socket.socket | None]:
    """Forks at each request. Returns in copies only; ends the process with the connection."""
    while True:
        body, streams, _, _ = socket.recv_fds(connection, MAX_BYTES, 3)
        if not body:
            os._exit(0)
        request = json.loads(body)
        told, tells = os.pipe()
        if (between := os.fork()) == 0:
            if pid := os.fork():
                os.write(tells, str(pid).encode())
                os._exit(0)  # its child is an orphan now
            _close(told, tells)
            connection.close()
            if _without_options(request["arguments"])[2:3] not in STARTING_OTHERS:
                return request, streams, None
            ours, connection = _pair()
            if os.fork():
                connection.close()
                return request, streams, ours
            ours.close()
            _close(*streams)
            continue
        pid = os.read(told, 64)
        os.waitpid(between, 0)
        _close(told, tells, *streams)
        connection.send(pid)


def _become(request: dict[str, Any], streams: Sequence[int], preloaded: socket.socket | None) -> None:
    """What a new interpreter would find."""
    for at, stream in enumerate(streams):
        os.dup2(stream, at)
    _close(*streams)
    if request["session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _show(request["arguments"], [f"{name}={value}" for name, value in request["environment"].items()])
    if preloaded is not None:
        subprocess.Popen = _popen(preloaded)  # type: ignore[misc]


def _show(arguments: Sequence[str], environment: Sequence[str]) -> None:
    """Writes both where /proc finds them."""
    with open("/proc/self/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    places = map(int, fields[45:49])  # arg_start, arg_end, env_start, env_end: proc(5)
    for texts, start, end in zip((arguments, environment), places, places, strict=True):
        written = b"".join(os.fsencode(text) + b"\0" for text in texts)
        assert len(written) <= end - start, "more than there is room for"
        ctypes.memmove(start, written.ljust(end - start, b"\0"), end - start)


def _close(*ends: int) -> None:
    for end in ends:
        os.close(end)


if __name__ == "__main__":
    _main()
