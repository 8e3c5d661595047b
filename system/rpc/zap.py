"""The door of the master's socket: who gets in, and how many did not.

    stranger --handshake--> ZeroMQ's I/O thread --key--> [zap thread: is it allowed?] --yes: key on every message-->
                                     |
                                     '--came, went--> [event loop: counts who went without having got in]

Guarantees:
- nobody gets in but the holders of the keys in `allowed`, whatever becomes of the thread: without an answer of its own
  ZeroMQ lets nobody in, and those inside go on;
- every message is told by its sender's key, which only its holder can have used;
- a key that is struck from `allowed` is nobody's within about `REREAD_S`, on connections that are open too.

What it does not do: close connections (ZeroMQ cannot), or say what a holder may send (see `system.rpc.peer`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from ...api.errors import ConfigError
from ..service.keys import ALLOWED, Holder, MasterKeys, PublicKey, Role, read_allowed

logger = logging.getLogger(__name__)

REREAD_S = 1.0
"""Between two looks at whether `allowed` has changed."""
HANDSHAKE_S = 5.0
"""For a stranger to prove who it is."""
_EVENTS_AT_ONCE = 100
"""However many strangers come and go: others on the loop have their turn."""
_DOMAIN = b"trainmaster"
_ADDRESS = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks."""
_EVENTS_ADDRESS = "inproc://strangers"
_KEY_BYTES = 32
_WHY: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it had no key of the right kind, or did not know the master's",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it did not prove in time who it is, or went before it had",
}
_NOT_ZEROMQ = "it speaks no ZeroMQ of today: an HTTP client, perhaps"


class Gate:
    """Of one ROUTER socket, the only one with keys in its context. `secure` before it is bound, then `open`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: MasterKeys) -> None:
        self._keys, self._allowed = keys, keys.allowed
        self._seen: tuple[int, int, int] | None = None
        self._reread_s = 0.0
        self.num_refused = 0
        """Connections that ended, or were ended, before anyone had got in by them."""
        self.had_closed = False
        """Whether the connection of one who was in has closed. Whoever looks sets it back."""
        self._last_key = ""
        self._pending: dict[int, None] = {}
        """Connections whose handshake is under way, the youngest last."""
        self._why: str | None = None
        self._questions: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._questions.bind(_ADDRESS)
        self.events: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        """Of the router: for `refusals`, on the thread that owns it."""
        self.events.setsockopt(zmq.RCVHWM, 0)  # a full queue would halt ZeroMQ's I/O thread
        self._thread = threading.Thread(target=self._serve, name="zap", daemon=True)

    def secure(self, router: zmq.Socket[bytes]) -> None:
        """Has a socket that is not yet bound let in nobody whom this gate does not."""
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.pair.secret)
        router.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else nobody being asked means everybody being let in
        router.setsockopt(zmq.HANDSHAKE_IVL, round(1000 * HANDSHAKE_S))
        router.monitor(
            _EVENTS_ADDRESS,
            zmq.EVENT_ACCEPTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_DISCONNECTED,
        )
        self.events.connect(_EVENTS_ADDRESS)

    def open(self) -> None:
        """Begins to answer. The thread ends with its context."""
        self._thread.start()

    def holder(self, key: str) -> Holder:
        """Who has this key now."""
        found = self._allowed.get(PublicKey(key))
        return Holder("nobody", PublicKey(key), Role.NOBODY) if found is None else found

    def sender(self, frame: zmq.Frame) -> Holder:
        """Who sent a message, by its first frame: whose key the handshake proved."""
        try:
            key = str(frame.get("User-Id"))
        except zmq.ZMQError:  # it was let in unasked, which cannot be
            key = ""
        return self.holder(key)

    def refusals(self) -> Iterator[str]:
        """Why strangers did not get in, since the last time: one reason for each connection. Ask again for more."""
        for _ in range(_EVENTS_AT_ONCE):
            if not self.events.poll(0):
                return
            message = recv_monitor_message(self.events)
            event, descriptor = message["event"], message["value"]
            if event == zmq.EVENT_ACCEPTED:
                self._pending[descriptor] = None
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if self._pending:
                    self._pending.popitem()  # ZeroMQ does not say whose: most likely of who came last
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._why = f"its key is not allowed ({self._last_key})"
            elif event != zmq.EVENT_DISCONNECTED:
                self._why = self._why or _WHY[event]
            elif descriptor in self._pending:
                del self._pending[descriptor]
                self.num_refused += 1
                why, self._why = self._why or _NOT_ZEROMQ, None
                yield f"a stranger's handshake: {why}"
            else:
                self.had_closed = True

    # -- the thread -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while True:
                if self._questions.poll(round(1000 * REREAD_S)):
                    self._answer(self._questions.recv_multipart())
                self._reread(self._keys.directory / ALLOWED)
        except zmq.ContextTerminated:
            pass  # the port was closed
        except Exception:
            logger.exception("the thread that checks keys broke down: nobody else gets in as long as this master lives")
        finally:
            self._questions.close(linger=0)

    def _answer(self, question: list[bytes]) -> None:
        """ZeroMQ's RFC 27: version, request, domain, address, routing id, mechanism, credentials."""
        version, request, domain, address, _, mechanism, *credentials = question
        key = ""
        if (domain, mechanism) == (_DOMAIN, b"CURVE") and [len(each) for each in credentials] == [_KEY_BYTES]:
            key = z85.encode(credentials[0]).decode()
        if self.holder(key).role is Role.NOBODY:
            self._last_key = f"{key or 'none'} from {address.decode(errors='replace')}"
            self._questions.send_multipart([version, request, b"400", b"not allowed", b"", b""])
        else:
            self._questions.send_multipart([version, request, b"200", b"", key.encode(), b""])

    def _reread(self, path: Path) -> None:
        """Heeds changes. A file that cannot be read changes nothing, and is told of."""
        now_s = time.monotonic()
        if now_s < self._reread_s:
            return
        self._reread_s = now_s + REREAD_S
        try:
            status = path.stat()
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            seen = (0, 0, 0)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._allowed = read_allowed(self._keys.directory)
        except ConfigError as error:
            logger.error("%s Until then, those who were allowed stay so", error)
