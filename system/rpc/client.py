"""A worker's end of the control plane: a DEALER socket on a thread of its own.

The thread registers, sends heartbeats while the interpreter lets it, sorts requests into one queue a lane, and sends
replies. It ends the process when the master is gone: a worker without a master has nothing left to do. Whether a
connection is alive is ZeroMQ's to say, whose own thread answers the master's pings whatever Python does.

    master <--DEALER--> [I/O thread: link] --requests--> queue of each lane --> lane threads
                              ^-------------replies-----------------------------------'
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from ...api.errors import ConfigError, ProtocolError, RunError
from ..service.keys import ClientKeys
from . import codec
from .drops import Drops
from .link import Link, MasterClock
from .messages import (
    HEARTBEAT_S,
    PROTOCOL_VERSION,
    Cancel,
    Executing,
    Heartbeat,
    Lane,
    Message,
    Ping,
    Refuse,
    Register,
    Reply,
    Request,
    Shutdown,
    Welcome,
)

logger = logging.getLogger(__name__)

EXIT_MASTER_LOST = 3
EXIT_RUN_FAILED = 4
"""The run failed or was stopped, and the master told this worker so."""
_SHUTDOWN_GRACE_S = 3.0
_RECONNECT_MS, _CONNECT_TIMEOUT_MS = 50, 1000
_PING_SHARE, _PONG_SHARE = 0.1, 0.5
"""Of `silence_s`: between two of ZeroMQ's pings, and for an answer. Together less than what the master grants: a worker
knows of a partition before it is given up."""
_WAKE = "inproc://wake"
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Client:
    """Connects at construction. `welcome` first, then `next_request` from the thread of each lane, and `reply`.

    With keys, it encrypts what it says, and hears nobody but the master that the keys name.
    """

    def __init__(self, master: str, register: Register, silence_s: float, keys: ClientKeys | None = None) -> None:
        self._master, self._register, self._silence_s, self._keys = master, register, silence_s, keys
        self.on_epoch: Callable[[], None] = lambda: None
        """Called on the I/O thread when the master begins another epoch: what is under way in the old one is to end,
        for its other members may be gone. Requests of the new one follow."""
        self.on_tick: Callable[[], None] = lambda: None
        """Called on the I/O thread about every second, as long as it goes round."""
        self._requests: dict[Lane, queue.SimpleQueue[Request | None]] = {lane: queue.SimpleQueue() for lane in Lane}
        self._answers: queue.SimpleQueue[Welcome | Refuse | Shutdown | ConfigError] = queue.SimpleQueue()
        self.current: Welcome | None = None
        """The last welcome: of the epoch whose requests are executed."""
        self._link: Link[codec.Body] = Link()
        self._clock = MasterClock()
        self._executing: dict[int, float] = {}
        """Since when, by request."""
        self._cancelled: set[int] = set()
        self._disconnected_s: float | None = None
        self._num_failed = 0
        """Handshakes that failed, since the last that did not."""
        self._again_s: float | None = None
        """When to connect anew: ZeroMQ does not, after some failures."""
        self._is_heard = threading.Event()
        """Whether the master of the current epoch was heard on this connection."""
        self.shutdown: Shutdown | None = None
        """The master's last word, once it has spoken it."""
        self._finished = threading.Event()
        self._context = zmq.Context()
        self._replies: queue.SimpleQueue[tuple[int, codec.Body]] = queue.SimpleQueue()
        self._waker: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._waker.bind(_WAKE)
        self._waker_lock = threading.Lock()
        self._poller = zmq.Poller()
        self._drops = Drops(logger)
        self._thread = threading.Thread(target=self._serve, name="rpc", daemon=True)
        self._thread.start()

    def welcome(self, deadline_s: float) -> Welcome:
        """Waits for the master's answer to the registration. Raises `ConfigError` if it refuses this worker."""
        try:
            answer = self._answers.get(timeout=deadline_s)
        except queue.Empty:
            raise RunError(
                f"no master answered at {self._master} within {deadline_s:g} s (run.deadlines.register_s)"
                + (f". {self._suspicion()}" if self._num_failed else "")
            ) from None
        match answer:
            case Welcome():
                return answer
            case Refuse():
                raise ConfigError(
                    "--master", self._master, f"the master refused this worker: {answer.reason}", "see there"
                )
            case Shutdown():
                raise RunError(f"the master is shutting down: {answer.reason}")
            case ConfigError():
                raise answer

    def next_request(self, lane: Lane) -> tuple[Request, float] | None:
        """Waits for the lane's next request, and returns it with the seconds that are left to it.

        None when the run is over. Passes over what nobody waits for any more, and begins nothing while the connection
        is down: the master may have given this worker up.
        """
        while (request := self._requests[lane].get()) is not None:
            self._is_heard.wait()
            welcome, clock, now_s = self.current, self._clock, time.monotonic()
            if welcome is None or request.epoch != welcome.epoch:
                continue
            if request.id in self._cancelled:
                self._cancelled.discard(request.id)
                continue
            left_s = min(request.deadline_s, request.deadline_s - clock.age(request.submitted_s, now_s))
            if left_s <= 0:
                logger.warning("request %d had expired before it could begin", request.id)
                continue
            self._executing[request.id] = now_s
            return request, left_s
        return None

    def reply(self, reply: Reply) -> None:
        """Hands a reply to the I/O thread. Safe from any thread. Raises `ProtocolError` if it is too large."""
        body = codec.encode_body(reply)
        self._executing.pop(reply.id, None)
        self._replies.put((reply.epoch, body))
        with self._waker_lock:
            self._waker.send(b"")

    @property
    def is_connected(self) -> bool:
        """Whether the master was heard on the connection that is open."""
        return self._is_heard.is_set()

    def num_waiting(self) -> dict[Lane, int]:
        """Requests that have not begun."""
        return {lane: requests.qsize() for lane, requests in self._requests.items()}

    def close(self) -> None:
        """Says that this process is done: the I/O thread will not end it by force."""
        self._finished.set()

    # -- the I/O thread -------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        wake: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        wake.connect(_WAKE)
        self._poller.register(wake, zmq.POLLIN)
        self._connect()
        last_sent_s = time.monotonic()
        while True:
            ready = dict(self._poller.poll(int(1000 * HEARTBEAT_S / 2)))
            if wake in ready:
                wake.recv()
                self._post_reply()
            if self._dealer in ready:
                self._receive(codec.receive(self._dealer))
            if self._monitor in ready:
                self._follow(recv_monitor_message(self._monitor)["event"])
            if self._again_s is not None and time.monotonic() >= self._again_s:
                self._reconnect()
            now_s = time.monotonic()
            self._flush(now_s)
            if now_s - last_sent_s >= HEARTBEAT_S:
                last_sent_s = now_s
                self._say(self._heartbeat(now_s) if self.current is not None else self._register)
                self.on_tick()
            self._check_master(now_s)

    def _connect(self) -> None:
        """A new socket. The router gives each connection a name, and `Register` says whose it is."""
        dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 1000)
        dealer.setsockopt(zmq.IPV6, "[" in self._master)
        dealer.setsockopt(zmq.MAXMSGSIZE, codec.MAX_BODY_BYTES)
        dealer.setsockopt(zmq.RCVHWM, codec.QUEUED_MESSAGES)
        dealer.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        dealer.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS)
        dealer.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * self._silence_s * _PING_SHARE))
        dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * self._silence_s * _PONG_SHARE))
        if self._keys is not None:
            self._keys.secure(dealer)
        self._dealer, self._again_s = dealer, None
        self._monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED)
        dealer.connect(self._master)
        for socket in (self._dealer, self._monitor):
            self._poller.register(socket, zmq.POLLIN)

    def _reconnect(self) -> None:
        self._poller.unregister(self._dealer)
        self._poller.unregister(self._monitor)
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close(linger=0)
        self._connect()

    def _heartbeat(self, now_s: float) -> Heartbeat:
        assert self.current is not None, "only a welcomed worker has a run and an epoch"
        executing = tuple(
            Executing(id=identity, seconds=max(0.0, now_s - start_s))
            for identity, start_s in list(self._executing.items())
        )
        return Heartbeat(run=self.current.run, epoch=self.current.epoch, executing=executing)

    def _post_reply(self) -> None:
        epoch, body = self._replies.get()
        if self.current is not None and epoch == self.current.epoch:
            self._link.post(body)

    def _flush(self, now_s: float) -> None:
        if self._disconnected_s is None:
            for order, body in self._link.due(now_s):
                self._transmit(order, body)

    def _say(self, message: Message) -> None:
        if self._disconnected_s is None:
            self._transmit(0, codec.encode_body(message))

    def _transmit(self, order: int, body: codec.Body) -> None:
        epoch = 0 if self.current is None else self.current.epoch
        envelope = codec.Envelope(epoch, order, self._link.received, time.monotonic())
        with contextlib.suppress(zmq.Again):  # no connection yet, or its queue is full: it is said again
            codec.send(self._dealer, [envelope.encode(), *body])

    def _follow(self, event: int) -> None:
        """Registers with whoever is at the other end of each new connection."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._disconnected_s, self._num_failed = None, 0
            register = self._register
            if self.current is not None:
                register = dataclasses.replace(register, run=self.current.run, epoch=self.current.epoch)
            self._say(register)
            self._link.hurry()
        elif event & _FAILED:
            self._failed(event)
        else:
            while self._dealer.poll(0):  # its last words may have come just before: a shutdown is no loss
                self._receive(codec.receive(self._dealer))
            if self._disconnected_s is None:  # a handshake that fails is no sign of the master's life
                self._disconnected_s = time.monotonic()
            self._is_heard.clear()

    def _failed(self, event: int) -> None:
        """A handshake did. The master does not say why, but that it knows the key and does not allow it."""
        self._num_failed += 1
        if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._again_s is None:
            self._again_s = time.monotonic() + HEARTBEAT_S
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._keys is not None:
            if self.current is not None:
                self._leave(f"the master does not accept this worker's key any more ({self._keys.name})")
            self._answers.put(self._keys.refused(self._master))

    def _suspicion(self) -> str:
        """What failed handshakes likely come from."""
        if self._keys is None:
            why = "it likely asks for keys, and this worker has none: give it its own, --keys RUN/keys/worker-N.key"
        else:
            why = f"{self._keys.file} is likely of another run, or this master runs without keys"
        return f"{self._num_failed} connections to it ended in the handshake: {why}"

    def _check_master(self, now_s: float) -> None:
        if self.current is None or self._disconnected_s is None:
            return  # before the welcome, `welcome` watches the clock
        if now_s - self._disconnected_s > self.current.orphan_s:
            self._leave("the master closed its connection, or fell silent, and did not come back")

    def _receive(self, frames: codec.Body) -> None:
        try:
            envelope = codec.Envelope.decode(frames)
            if envelope.version != PROTOCOL_VERSION:
                raise ProtocolError(f"protocol version {envelope.version}, not {PROTOCOL_VERSION}")
            if self.current is not None and envelope.epoch == self.current.epoch:
                self._clock.note(envelope.sent_s, time.monotonic())
                self._link.acknowledge(envelope.received)
                self._is_heard.set()
            if envelope.order == 0:
                self._hear(codec.decode_body(frames[1:]))
            elif self.current is None or envelope.epoch != self.current.epoch:
                self._drops.note(f"it was of epoch {envelope.epoch}", time.monotonic())
            else:
                for body in self._link.accept(envelope.order, frames[1:]):
                    self._obey(codec.decode_body(body))
        except ProtocolError as error:
            self._drops.note(str(error), time.monotonic())

    def _hear(self, message: Message) -> None:
        """What is said outside of the link."""
        match message:
            case Welcome():
                self._begin(message)
            case Refuse():
                self._answers.put(message)
                if self.current is not None:
                    self._leave(f"the master refuses this worker: {message.reason}")
            case Shutdown() if self.current is None:
                self._answers.put(message)
            case Ping():
                pass
            case _:
                self._drops.note(f"a {message.type} is not what a master says outside of a link", time.monotonic())

    def _begin(self, welcome: Welcome) -> None:
        """The first epoch, or the next; a welcome that comes again, or late, changes nothing."""
        if self.current is not None and (welcome.run != self.current.run or welcome.epoch <= self.current.epoch):
            return
        is_first, self._link, self._clock, self.current = self.current is None, Link(), MasterClock(), welcome
        if welcome.silence_s != self._silence_s:  # changed on the master's command line
            self._silence_s = welcome.silence_s
            self._reconnect()
        self._cancelled.clear()
        self._executing.clear()
        if is_first:
            self._answers.put(welcome)
        else:
            logger.info("epoch %d begins: this worker is rank %d now", welcome.epoch, welcome.rank)
            self.on_epoch()

    def _obey(self, message: Message) -> None:
        """What comes through the link."""
        assert self.current is not None, "links begin with a welcome"
        match message:
            case Request() if (message.run, message.epoch) == (self.current.run, self.current.epoch):
                self._requests[message.lane].put(message)
            case Cancel() if (message.run, message.epoch) == (self.current.run, self.current.epoch):
                if message.id not in self._executing:
                    self._cancelled.add(message.id)
            case Shutdown():
                logger.info("shutting down: %s", message.reason)
                self._say(self._heartbeat(time.monotonic()))  # acknowledges it: the master waits for that
                self._answers.put(message)
                self._wind_up(message)
            case _:
                logger.warning("dropped a %s from the master", message.type)

    def _wind_up(self, shutdown: Shutdown) -> None:
        self.shutdown = shutdown
        for lane in Lane:
            self._requests[lane].put(None)
        if not self._finished.wait(_SHUTDOWN_GRACE_S):
            logger.warning("still busy %g s after the shutdown: leaving at once", _SHUTDOWN_GRACE_S)
            logging.shutdown()
            os._exit(0 if shutdown.is_done else EXIT_RUN_FAILED)
        threading.Event().wait()  # the main thread ends the process

    def _leave(self, why: str) -> None:
        logger.error("%s: this worker ends", why)
        logging.shutdown()
        os._exit(EXIT_MASTER_LOST)
