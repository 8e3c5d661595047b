"""A service's health for operators: a small HTTP server, what it answers, and figures in Prometheus' text format 0.0.4.

    GET /healthz    200 while the service is well, else 503 with the reason
    GET /readyz     200 once the service is ready or runs, 503 before and after
    GET /metrics    the service's figures

    event loop, or I/O thread --post, once a second--> Latest <--ask-- threads of the server

Guarantees: a service whose loop hangs, and so posts no more, is not well (one whose interpreter lets no other thread
run does not answer at all); whoever asks neither waits for the service nor runs any of its code; a connection lives for
`_CONNECTION_S` at most, and of more than `_MAX_CONNECTIONS` the oldest makes room.

What it does not do: encrypt its answers, or ask who wants them. Bind an address that only operators reach.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any

from pydantic import Field

from ...api.errors import ConfigError
from ...api.record import record

logger = logging.getLogger(__name__)

STALE_S = 10.0
"""A service that has posted nothing for this long is not well."""
_CONNECTION_S = 5.0
"""For a request to be sent and its answer to be read."""
_MAX_CONNECTIONS = 16
_SWEEP_S = 0.5
"""Between two looks for connections that are too old; `close` takes as long at most."""
_MAX_BODY_BYTES = 2**16
"""Of a refused request that is still read, so that the refusal arrives."""
_TEXT = "text/plain; charset=utf-8"
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"

Figure = Annotated[float, Field(allow_inf_nan=True)]


class Kind(StrEnum):
    COUNTER = "counter"
    """Only ever rises; its name ends with `_total`."""
    GAUGE = "gauge"


@record
class Sample:
    value: Figure
    labels: dict[Annotated[str, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")], str] = Field(default_factory=dict)


@record
class Metric:
    name: Annotated[str, Field(pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")]
    help: str
    kind: Kind = Kind.GAUGE
    samples: tuple[Sample, ...]
    """No two with the same labels."""


@record
class Health:
    """How a service is."""

    is_well: bool
    """Whether to leave it alone, rather than to end it and start another."""
    is_ready: bool
    """Whether it does what it is there for, rather than to wait for others."""
    reason: str = ""
    """Why it is not well, or not ready."""
    metrics: tuple[Metric, ...] = ()
    """No two of one name."""


class Latest:
    """The health that a service posted last. Called from any thread, posted to from one.

    Unwell, whatever was posted, once that is `stale_s` old: then the service's loop hangs.
    """

    def __init__(self, stale_s: float = STALE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_s, self._clock = stale_s, clock
        self._posted = (clock(), Health(is_well=True, is_ready=False, reason="it starts"))

    def post(self, health: Health) -> None:
        self._posted = (self._clock(), health)  # one assignment: whoever reads finds the old pair or the new

    def __call__(self) -> Health:
        posted_s, health = self._posted
        silent_s = self._clock() - posted_s
        if silent_s <= self._stale_s:
            return health
        reason = f"it hangs: it has posted nothing for {silent_s:.0f} s"
        return Health(is_well=False, is_ready=False, reason=reason, metrics=health.metrics)


class HealthServer:
    """Answers from its construction until `close`, on a thread of its own.

    `snapshot` is called on the server's threads, several at a time: pass a `Latest`, or what is as safe. If it raises,
    the service is not well. Port 0 takes any free one: see `address`. Raises `ConfigError` if it cannot be bound.

        latest = Latest()
        with HealthServer("127.0.0.1", 9100, latest) as server:
            logger.info("health: %s", server.address)
            ...  # latest.post(health_of(status)), once a second
    """

    def __init__(self, host: str, port: int, snapshot: Callable[[], Health]) -> None:
        family, target = _resolve(host, port)
        try:
            self._server = _Server(family, target, snapshot)
        except OSError as error:
            raise _cannot_bind(host, port, error) from None
        shown = f"[{host}]" if family is socket.AF_INET6 else host
        self.address = f"http://{shown}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_SWEEP_S,), name="health", daemon=True)
        self._thread.start()

    def __enter__(self) -> HealthServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the port, and breaks off what is not answered yet. To close again changes nothing."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.break_off()


# -- HTTP -------------------------------------------------------------------------------------------------------------


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:  # Any: of the family's own form
    if not 0 <= port < 2**16:
        raise ConfigError("--health-port", port, "must be a port: 0 to 65535", "choose one, or 0 for any free one")
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError("--health-host", host, f"the host cannot be found: {error}", "correct the name") from None
    return family, target


def _cannot_bind(host: str, port: int, error: OSError) -> ConfigError:
    match error.errno:
        case errno.EADDRINUSE:
            rule, cure = f"the port is taken on {host}", "choose another one, or 0 for any free one"
        case errno.EACCES:
            rule, cure = "this user may not bind the port", "choose one from 1024 on"
        case _:
            rule, cure = f"cannot be bound: {error.strerror}", "give an address of this machine"
            return ConfigError("--health-host", host, rule, cure)
    return ConfigError("--health-port", port, rule, cure)


class _Server(ThreadingHTTPServer):
    """A thread a connection, with a bound on how many there are and on how long each lives."""

    request_queue_size = 128

    def __init__(
        self, family: socket.AddressFamily, target: tuple[Any, ...], snapshot: Callable[[], Health]
    ) -> None:  # Any: see _resolve
        self.address_family = family
        self.snapshot = snapshot
        self._lock = threading.Lock()
        self._began_s: dict[socket.socket, float] = {}
        """Of connections that are open, the oldest first."""
        super().__init__(target, _Handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)  # HTTPServer's own would look the host's name up, which can take long
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:  # Any: as socketserver types them
        with self._lock:
            if len(self._began_s) >= _MAX_CONNECTIONS:
                self._end(next(iter(self._began_s)))
            self._began_s[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called by `serve_forever` again and again."""
        now_s = time.monotonic()
        with self._lock:
            for connection in [each for each, began_s in self._began_s.items() if now_s - began_s > _CONNECTION_S]:
                self._end(connection)

    def shutdown_request(self, request: Any) -> None:  # Any: as socketserver types it
        with self._lock:
            self._began_s.pop(request, None)
            super().shutdown_request(request)

    def break_off(self) -> None:
        """Ends every connection."""
        with self._lock:
            for connection in list(self._began_s):
                self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        """Its thread wakes, finds the connection at its end, and closes it."""
        del self._began_s[connection]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # Any: as socketserver types them
        if not isinstance(sys.exception(), OSError):  # connections break: that is no news
            logger.exception("the health server failed at a request")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _CONNECTION_S
    error_content_type = _TEXT
    error_message_format = "%(message)s\n"

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        if path not in ("/healthz", "/readyz", "/metrics"):
            self._say(404, "there is /healthz, /readyz and /metrics\n")
            return
        health = self._ask()
        if path == "/metrics":
            self._say(200, prometheus_text(health.metrics), _EXPOSITION)
        elif health.is_well and (path == "/healthz" or health.is_ready):
            self._say(200, "ok\n")
        else:
            self._say(503, f"{health.reason or 'it does not say why'}\n")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        self.rfile.read(min(int(length) if length.isdecimal() else 0, _MAX_BODY_BYTES))
        self._say(405, "only GET and HEAD\n", allow="GET, HEAD")

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def _ask(self) -> Health:
        try:
            return self.server.snapshot()
        except Exception as error:
            logger.exception("the service cannot say how it is")
            return Health(is_well=False, is_ready=False, reason=f"cannot say how it is: {error}")

    def _say(self, code: int, text: str, content_type: str = _TEXT, allow: str = "") -> None:
        body = text.encode(errors="backslashreplace")
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if allow:
            self.send_header("Allow", allow)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "trainmaster"

    def log_message(self, format: str, *_: Any) -> None:  # Any: as http.server types them
        """Requests come every few seconds, and are nobody's news."""


# -- Prometheus -------------------------------------------------------------------------------------------------------


def prometheus_text(metrics: Iterable[Metric]) -> str:
    """All metrics in the text exposition format, version 0.0.4."""
    return "".join(f"{line}\n" for metric in metrics for line in _lines(metric))


def _lines(metric: Metric) -> Iterator[str]:
    help_text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {metric.name} {help_text}"
    yield f"# TYPE {metric.name} {metric.kind}"
    for sample in metric.samples:
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in sample.labels.items())
        yield (
            f"{metric.name}{{{labels}}} {_number(sample.value)}" if labels else f"{metric.name} {_number(sample.value)}"
        )


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
