"""Asking a run's master, from any process: what it is at, or to pause, to go on, to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Annotated

import msgpack  # type: ignore[import-untyped]
import zmq
from pydantic import Field, TypeAdapter

from ...api.errors import ConfigError, ProtocolError, RunError
from ..rpc import framing
from ..rpc.dealer import HANDSHAKE_FAILED, dealer_to, next_event, suspicion
from ..rpc.inquiries import Inquire, Order, Refuse, RunStatus
from .keys import DIRECTORY, ClientKeys, has_keys, load_operator_keys
from .lifecycle import Entry, read_entry

ANSWER_S = 3.0
"""For an answer. A master answers within milliseconds, whatever its workers do."""
_MAX_BROKEN_OFF = 3
"""Handshakes that the master breaks off, after which it is no accident."""
Answer = Annotated[RunStatus | Refuse, Field(discriminator="type")]
_ANSWERS: TypeAdapter[Answer] = TypeAdapter(Answer)  # the codec reads all messages: to import them takes as long again
_SAID_CHARACTERS = 500


def find_run(run: str, directory: Path) -> tuple[Path, Entry]:
    """A run by its directory, or its name in `directory`. Raises `ConfigError` if there is none."""
    for path in (Path(run), directory / run):
        entry = read_entry(path)
        if entry is not None:
            return path, entry
    raise ConfigError(
        "RUN", run, f"no run by that name is in {directory}", "give its directory or address, or see `trainmaster ps`"
    )


def way_to(run: str, directory: Path, given: Path | None = None) -> tuple[str, ClientKeys | None]:
    """The address of a run's master, and the operator's key to it: the one given, or the one in the run's directory.

    The run may be named by its address too. Raises `ConfigError` if it is not there, has ended, or for an unusable key.
    """
    keys = None if given is None else load_operator_keys(given)
    if "://" in run:
        return run, keys
    path, entry = find_run(run, directory)
    if entry.state.is_final:
        raise ConfigError("RUN", run, f"it is {entry.state}", f"look into {path / 'logs'}")
    if keys is None and has_keys(path / DIRECTORY):
        keys = load_operator_keys(path / DIRECTORY)
    return entry.address, keys


def ask(address: str, order: Order, answer_s: float = ANSWER_S, keys: ClientKeys | None = None) -> RunStatus:
    """Raises `RunError` if there is no answer in time, `ConfigError` for a refusal or for the wrong keys."""
    with (
        zmq.Context() as context,
        dealer_to(address, context, keys, linger_ms=0) as dealer,
        dealer.get_monitor_socket(HANDSHAKE_FAILED) as failures,
    ):
        try:
            dealer.connect(address)
            with contextlib.suppress(zmq.Again):  # the handshake may have failed already: nobody to send to
                inquire = msgpack.packb(dataclasses.asdict(Inquire(order=order)))
                framing.send(dealer, framing.Envelope(epoch=0).around([inquire]))
            answer = _answer(address, dealer, failures, answer_s, keys)
        finally:
            dealer.disable_monitor()
    match answer:
        case RunStatus():
            return answer
        case Refuse():
            raise ConfigError("RUN", address, answer.reason, "see there")


def _answer(
    address: str,
    dealer: zmq.Socket[bytes],
    failures: zmq.Socket[bytes],
    answer_s: float,
    keys: ClientKeys | None,
) -> Answer:
    """What the master says, or what the failure of a handshake means."""
    poller = zmq.Poller()
    for socket in (dealer, failures):
        poller.register(socket, zmq.POLLIN)
    end_s, num_broken_off = time.monotonic() + answer_s, 0
    while ready := dict(poller.poll(max(0, round(1000 * (end_s - time.monotonic()))))):
        if dealer in ready:
            return _read(address, framing.receive(dealer))
        event, num_broken_off = next_event(failures), num_broken_off + 1
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and keys is not None:
            raise keys.refused(address)
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or num_broken_off == _MAX_BROKEN_OFF:
            raise _broken_off(address, keys)
    raise RunError(f"no master answered at {address} within {answer_s:g} s")


def _read(address: str, frames: list[framing.Frame]) -> Answer:
    try:
        envelope, body = framing.opened(frames)
        if envelope.version != framing.PROTOCOL_VERSION:
            raise ProtocolError(f"protocol version {envelope.version}, not {framing.PROTOCOL_VERSION}")
        return _ANSWERS.validate_python(msgpack.unpackb(body[0], use_list=False))
    except (ProtocolError, ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RunError(f"the answer from {address} cannot be read: {error}"[:_SAID_CHARACTERS]) from None


def _broken_off(address: str, keys: ClientKeys | None) -> ConfigError:
    value = None if keys is None else str(keys.file)
    rule = f"the master at {address} breaks off every handshake: {suspicion(keys)}"
    return ConfigError("--keys", value, rule, "give the run's own, --keys RUN/keys/operator.key")
