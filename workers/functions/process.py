"""The process that calls a user's function: `python -m trainmaster.workers.functions.process FILE NAME [--batched]`.

    standard input   requests: one frame an item list, `[[prompt, response, row], ...]`
    standard output  replies: first `[]` (ready) or `[field, value, rule, cure]` (the function cannot be had), then for
                     each request one `[value, failure]` an item, of which one is nil

A frame is a length (4 bytes, big-endian) and that much msgpack. Guarantees: before user code runs, both pipes move to
descriptors that it does not know, so that its prints go to standard error and its reads find nothing; it ends when
standard input closes; and if started with `--lifeline`, the whole process group is killed as soon as that pipe's other
end closes, as it does when the parent dies, even amid a call that hangs. It keeps no deadlines; `pool` does.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import reprlib
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

from ...api.errors import ConfigError
from ...api.rewards import SHIPPED, resolve_reward

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 2**30
_MAX_FAILURE_CHARACTERS = 2000
_INTEGER = 1
"""The extension type of an integer that 64 bits cannot hold."""

Call = Callable[..., Any]  # Any: a user's function may return what it likes
Verdict = tuple[float | None, str | None]
"""A value or a failure."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves one function until standard input closes."""
    parser = argparse.ArgumentParser(prog="trainmaster.workers.functions.process")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--batched", action="store_true")
    parser.add_argument("--lifeline", type=int, metavar="FD", help="of a process group's leader: a pipe to die with")
    options = parser.parse_args(arguments)
    if options.lifeline is not None:
        _die_with(options.lifeline)
    requests, replies = _take_pipes()
    try:
        function = _resolve(options.file, options.name, options.batched)
    except ConfigError as error:
        _write(replies, [error.field, str(error.value), error.rule, error.cure])
        sys.exit(error.exit_code)
    _write(replies, [])
    served_by = os.getpid()
    while (body := _read(requests)) is not None:
        items = unpack(body)
        verdicts = score_batch(function, items) if options.batched else [score_one(function, *item) for item in items]
        if os.getpid() != served_by:  # the user's function forked, and this copy came back from it too
            os._exit(1)
        _write(replies, verdicts)


def _resolve(file: Path, name: str, is_batched: bool) -> Call:
    function = resolve_reward(file, name)
    if is_batched and function in SHIPPED.values():
        raise ConfigError("Reward.is_batched", True, f"`{name}` scores one sample at a time", "set it to False")
    return function


# ------------------------------------------------------------------------------------------------ frames


def pack(value: object) -> bytes:
    """What JSON can say, and bytes. Raises `TypeError`, `ValueError` or `OverflowError` for anything else."""
    packed: bytes = msgpack.packb(value, default=_pack_other, unicode_errors="surrogatepass")
    return packed


def unpack(body: bytes | bytearray) -> Any:  # Any: whatever the frame holds
    """The inverse of `pack`, but for tuples, which become lists."""
    return msgpack.unpackb(body, ext_hook=_unpack_other, strict_map_key=False, unicode_errors="surrogatepass")


def _pack_other(value: object) -> object:
    if isinstance(value, int):
        return msgpack.ExtType(_INTEGER, hex(value).encode())
    raise TypeError(f"a {type(value).__name__} is not what JSON can say")


def _unpack_other(code: int, data: bytes) -> object:
    if code != _INTEGER:
        raise ValueError(f"extension type {code} is not one of ours")
    return int(data, 16)


def frame(*parts: bytes) -> bytes:
    """One frame of these parts of a body."""
    return b"".join((sum(map(len, parts)).to_bytes(LENGTH_BYTES, "big"), *parts))


def _read(requests: int) -> bytes | None:
    """The next body; None at the end."""
    header = _read_exactly(requests, LENGTH_BYTES)
    return None if header is None else _read_exactly(requests, int.from_bytes(header, "big"))


def _read_exactly(source: int, num_bytes: int) -> bytes | None:
    body = bytearray()
    while len(body) < num_bytes:
        chunk = os.read(source, min(num_bytes - len(body), 2**20))
        if not chunk:
            return None
        body += chunk
    return bytes(body)


def _write(replies: int, value: object) -> None:
    rest = memoryview(frame(pack(value)))
    while rest:
        rest = rest[os.write(replies, rest) :]


# ------------------------------------------------------------------------------------------------ calls


def score_one(function: Call, prompt: str, response: str, row: dict[str, object]) -> Verdict:
    """Calls it for one sample."""
    try:
        return _verdict(function(prompt, response, row))
    except BaseException as error:  # noqa: BLE001  (a user's code, `sys.exit` included; told to the parent)
        return None, _told(error)


def score_batch(function: Call, items: Sequence[tuple[str, str, dict[str, object]]]) -> list[Verdict]:
    """Calls it for all samples at once. What goes wrong with the call as a whole is a failure of each."""
    try:
        prompts, responses, rows = ([item[part] for item in items] for part in range(3))
        results = function(prompts, responses, rows)
        if (
            not hasattr(results, "__len__")
            or not hasattr(results, "__getitem__")
            or isinstance(results, str | bytes | Mapping)
        ):
            failure = f"returned {_shown(results)}, not a list of numbers"
        elif len(results) != len(items):
            failure = f"returned {len(results)} results for {len(items)} samples"
        else:
            return [_verdict(result) for result in results]
    except BaseException as error:  # noqa: BLE001  (as above)
        failure = _told(error)
    return [(None, failure)] * len(items)


def _verdict(result: object) -> Verdict:
    """Takes whatever `float` takes but text: Python's and NumPy's numbers, booleans, one-element tensors."""
    if not hasattr(type(result), "__float__"):
        return None, f"returned {_shown(result)}, not a number"
    try:
        value = float(result)  # type: ignore[arg-type]  # checked above by shape
    except Exception as error:  # noqa: BLE001  (an array of two, say; told to the parent)
        return None, f"returned {_shown(result)}, not a number: {_told(error)}"
    if not math.isfinite(value):
        return None, f"returned {value}, not a finite number"
    return value, None


def _shown(result: object) -> str:
    return _clipped(f"{reprlib.repr(result)} (of type {type(result).__name__})")


def _told(error: BaseException) -> str:
    """The traceback's last line, and the place in the experiment file that it came from."""
    places = [(Path(at.f_code.co_filename), line) for at, line in traceback.walk_tb(error.__traceback__)][1:]
    experiment = Path(getattr(sys.modules.get("trainmaster_experiment"), "__file__", ""))
    own = [place for place in places if place[0] == experiment] or places
    where = f" ({own[-1][0].name}, line {own[-1][1]})" if own else ""
    return _clipped("raised " + "".join(traceback.format_exception_only(error)).strip()) + where


def _clipped(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MAX_FAILURE_CHARACTERS else text[:_MAX_FAILURE_CHARACTERS] + " ..."


# ------------------------------------------------------------------------------------------------ the process


def _take_pipes() -> tuple[int, int]:
    """Requests and replies, out of the user's reach."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _die_with(lifeline: int) -> None:
    """Kills this process's group when the pipe's other end closes.

    Where the kernel can do it (Linux), it does: no thread would run while user code holds the interpreter lock, as a
    regular expression does that backtracks for ever, and a process of one thread forks safely.
    """
    os.set_inheritable(lifeline, False)
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([lifeline], [], [], 0)[0]:  # it closed before we asked
            os.killpg(0, signal.SIGKILL)
        return

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


if __name__ == "__main__":
    main()
