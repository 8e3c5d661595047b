"""Asking a run's master, from any process: what it is at, or to pause, to go on, to stop."""

from __future__ import annotations

from pathlib import Path

import zmq

from ...api.errors import ConfigError, ProtocolError, RunError
from ..rpc import codec
from ..rpc.messages import Inquire, Order, Refuse, RunStatus
from .lifecycle import read_entry

ANSWER_S = 3.0
"""For an answer. A master answers within milliseconds, whatever its workers do."""


def address_of(run: str, directory: Path) -> str:
    """Of a run by its address, its directory, or its name in `directory`. Raises `ConfigError` if none is there."""
    if "://" in run:
        return run
    for path in (Path(run), directory / run):
        entry = read_entry(path)
        if entry is not None:
            if entry.state.is_final:
                raise ConfigError("RUN", run, f"it is {entry.state}", f"look into {path / 'logs'}")
            return entry.address
    raise ConfigError(
        "RUN", run, f"no run by that name is in {directory}", "give its directory or address, or see `trainmaster ps`"
    )


def ask(address: str, order: Order, answer_s: float = ANSWER_S) -> RunStatus:
    """Raises `RunError` if there is no answer in time, `ConfigError` for a refusal."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IPV6, "[" in address)
        dealer.setsockopt(zmq.MAXMSGSIZE, codec.MAX_BODY_BYTES)
        dealer.connect(address)
        dealer.send_multipart(codec.encode(Inquire(order=order), codec.Envelope(epoch=0)))
        if not dealer.poll(round(1000 * answer_s)):
            raise RunError(f"no master answered at {address} within {answer_s:g} s")
        try:
            _, answer = codec.decode(codec.receive(dealer))
        except ProtocolError as error:
            raise RunError(f"the answer from {address} cannot be read: {error}") from None
    match answer:
        case RunStatus():
            return answer
        case Refuse():
            raise ConfigError("RUN", address, answer.reason, "see there")
        case _:
            raise RunError(f"{address} answered with a {answer.type}")
