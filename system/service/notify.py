"""What a service tells the supervisor that started it (systemd's `sd_notify`), without a library for it.

    trainmaster --"READY=1", "STATUS=step 3 of 10", "WATCHDOG=1", "STOPPING=1"--> $NOTIFY_SOCKET

A service that has no supervisor says nothing. Children do not speak for their parent: start them with
`environment_of_children`, or they inherit the socket, and whatever in them knows the protocol takes itself for the
service.
"""

from __future__ import annotations

import os
import socket

_SOCKET, _WATCHDOG_US, _WATCHDOG_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
_SEND_S = 0.1
"""A supervisor that reads nothing holds nobody up for longer."""


def notify(text: str) -> bool:
    """Whether the supervisor was sent this. Never raises, and waits for 0.1 s at most. Safe from any thread.

    `text` is one assignment a line: `notify("READY=1\\nSTATUS=waits for 2 workers")`.
    """
    address = os.environ.get(_SOCKET, "")
    if address[:1] not in ("/", "@"):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SEND_S)
            sender.connect(f"\0{address[1:]}" if address[0] == "@" else address)  # @: of the abstract name space
            sender.send(text.encode(errors="backslashreplace"))
    except OSError:  # nobody is there, or the path is too long for a socket
        return False
    return True


def watchdog_s() -> float | None:
    """Seconds between two `notify("WATCHDOG=1")`: half of what the supervisor waits for. None if it does not watch."""
    if os.environ.get(_WATCHDOG_PID, str(os.getpid())) != str(os.getpid()):
        return None  # it watches a parent of ours
    try:
        interval_us = int(os.environ.get(_WATCHDOG_US, "0"))
    except ValueError:
        return None
    return interval_us / 2e6 if interval_us > 0 else None


def environment_of_children() -> dict[str, str]:
    """Our environment without what is said to us alone: the `env` of a child process."""
    return {name: value for name, value in os.environ.items() if name not in (_SOCKET, _WATCHDOG_US, _WATCHDOG_PID)}
