"""A worker's end of the control plane: a DEALER socket on a thread of its own.

The thread registers, sends heartbeats while the interpreter lets it, and sorts requests into one queue a lane. It ends
the process when the master is gone: a worker without a master has nothing left to do. Lanes send their replies
themselves, taking turns with it. Whether a connection is alive is ZeroMQ's to say, whose own thread answers the
master's pings whatever Python does.

    master <--DEALER--> [link] --I/O thread--> queue of each lane --requests--> lane threads
                           ^-------------------------replies-------------------------'
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable

import zmq

from ...api.errors import ConfigError, ProtocolError, RunError
from ..service.keys import ClientKeys
from . import codec, framing
from .dealer import HANDSHAKE_FAILED, Dealer, suspicion
from .drops import Drops
from .framing import PROTOCOL_VERSION
from .inquiries import Refuse
from .link import ACKNOWLEDGED, Link, MasterClock
from .messages import (
    HEARTBEAT_S,
    Cancel,
    Executing,
    Heartbeat,
    Lane,
    Message,
    Ping,
    Register,
    Reply,
    Request,
    Shutdown,
    Success,
    Welcome,
    seldomness,
)

logger = logging.getLogger(__name__)

EXIT_MASTER_LOST = 3
EXIT_RUN_FAILED = 4
"""The run failed or was stopped, and the master told this worker so."""
_SHUTDOWN_GRACE_S = 3.0


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
        self._begins_anew = False
        """Whether `on_epoch` is due."""
        self._requests: dict[Lane, queue.SimpleQueue[Request | None]] = {lane: queue.SimpleQueue() for lane in Lane}
        self._answers: queue.SimpleQueue[Welcome | Refuse | Shutdown | ConfigError] = queue.SimpleQueue()
        self.current: Welcome | None = None
        """The last welcome: of the epoch whose requests are executed."""
        self._turn = threading.Lock()
        """Whose holder may use the link and the dealer."""
        self._link: Link[framing.Body] = Link()
        self._clock = MasterClock()
        self._executing: dict[int, float] = {}
        """Since when, by request."""
        self._cancelled: set[int] = set()
        self._disconnected_s: float | None = None
        self._num_failed = 0
        """Handshakes that failed, since the last that did not."""
        self._again_s: float | None = None
        """When to connect anew: ZeroMQ does not, after some failures."""
        self._refusal = ""
        """Why the master has not let this worker in yet, and may later."""
        self._said_s = 0.0
        """When the last heartbeat was sent."""
        self._is_heard = threading.Event()
        """Whether the master of the current epoch was heard on this connection."""
        self.shutdown: Shutdown | None = None
        """The master's last word, once it has spoken it."""
        self._finished = threading.Event()
        self._dealer = Dealer(master, silence_s, keys)
        self._drops = Drops(logger)
        self._thread = threading.Thread(target=self._serve, name="rpc", daemon=True)
        self._thread.start()

    def welcome(self, deadline_s: float) -> Welcome:
        """Waits for the master's answer to the registration. Raises `ConfigError` if it refuses this worker.

        What it refuses for now, such as a key that is still in use, is asked again each second until the deadline.
        """
        try:
            answer = self._answers.get(timeout=deadline_s)
        except queue.Empty:
            if self._refusal:
                raise _refused(self._master, self._refusal) from None
            raise _unanswered(self._master, deadline_s, self._num_failed, self._keys) from None
        match answer:
            case Welcome():
                return answer
            case Refuse():
                raise _refused(self._master, answer.reason)
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
            if not self._is_heard.is_set():
                self._is_heard.wait()
            welcome, clock, now_s = self.current, self._clock, time.monotonic()
            if welcome is None or request.epoch != welcome.epoch:
                continue
            if request.id in self._cancelled:
                self._cancelled.discard(request.id)
                continue
            age_s = 0.0 if request.is_silent else clock.age(request.submitted_s, now_s)
            left_s = request.deadline_s - max(0.0, age_s)
            if left_s <= 0:  # never of a silent one: nobody would miss it
                logger.warning("request %d had expired before it could begin", request.id)
                continue
            self._executing[request.id] = now_s
            return request, left_s
        return None

    def reply(self, reply: Reply) -> None:
        """Sends it, now or as soon as it can be: a success only to who asked. Safe from any thread.

        Raises `ProtocolError` if it is too large.
        """
        body = codec.encode_body(reply)
        self._executing.pop(reply.id, None)
        if reply.is_unasked and isinstance(reply.outcome, Success):
            return
        with self._turn:
            if self.current is not None and reply.epoch == self.current.epoch:
                self._link.post(body)
                self._flush(time.monotonic())
            is_readable = self._dealer.is_readable
        if is_readable:
            self._dealer.wake()

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
        tick_s = checked_s = time.monotonic()
        is_readable = True
        while self.shutdown is None:
            has_message, has_events = self._dealer.wait(0 if is_readable else HEARTBEAT_S / 2)
            with self._turn:
                if (is_readable or has_message) and (frames := self._dealer.receive()) is not None:
                    self._receive(frames)
                if has_events:
                    for event in self._dealer.events():
                        self._follow(event)
                now_s = time.monotonic()
                if self._link.is_due(now_s):
                    self._flush(now_s)
                if now_s - checked_s >= HEARTBEAT_S / 2:
                    checked_s = now_s
                    self._check_master(now_s)
                if is_ticking := now_s - tick_s >= HEARTBEAT_S:
                    tick_s = now_s
                    self._say_own(now_s)
                is_readable = self._dealer.is_readable
            if self._begins_anew:
                self._begins_anew = False
                self.on_epoch()
            if is_ticking:
                self.on_tick()
        self._wind_up(self.shutdown)

    def _reconnect(self) -> None:
        self._again_s = None
        self._dealer.reconnect(self._silence_s)

    def _say_own(self, now_s: float) -> None:
        """What nobody asked for: heartbeats come by themselves only if a ping is late; with many workers, missing."""
        if self.current is None:
            self._say(self._register)
        elif now_s - self._said_s > HEARTBEAT_S * (2 * seldomness(self.current.num_workers) - 1):
            self._beat(now_s)

    def _beat(self, now_s: float) -> None:
        assert self.current is not None, "only a welcomed worker has a run and an epoch"
        self._said_s = now_s
        since = list(self._executing.items())
        executing = tuple(Executing(id=identity, seconds=max(0.0, now_s - start_s)) for identity, start_s in since)
        self._say(Heartbeat(run=self.current.run, epoch=self.current.epoch, executing=executing))

    def _flush(self, now_s: float) -> None:
        if self._disconnected_s is None:
            for order, body in self._link.due(now_s):
                self._transmit(order, body)

    def _say(self, message: Message) -> None:
        if self._disconnected_s is None:
            self._transmit(0, codec.encode_body(message))

    def _transmit(self, order: int, body: framing.Body) -> None:
        epoch = 0 if self.current is None else self.current.epoch
        envelope = framing.Envelope(epoch, order, self._link.received, time.monotonic())
        self._dealer.send(envelope.around(body))

    def _follow(self, event: int) -> None:
        """Registers with whoever is at the other end of each new connection."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._disconnected_s, self._num_failed = None, 0
            register = self._register
            if self.current is not None:
                register = dataclasses.replace(register, run=self.current.run, epoch=self.current.epoch)
            self._say(register)
            self._link.hurry()
        elif event & HANDSHAKE_FAILED:
            self._failed(event)
        else:
            while (frames := self._dealer.receive()) is not None:  # its last words: a shutdown is no loss
                self._receive(frames)
            self._refusal = ""
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
                _leave(f"the master does not accept this worker's key any more ({self._keys.name})")
            self._answers.put(self._keys.refused(self._master))

    def _check_master(self, now_s: float) -> None:
        if self._again_s is not None and now_s >= self._again_s:
            self._reconnect()
        if self.current is None or self._disconnected_s is None:
            return  # before the welcome, `welcome` watches the clock
        if now_s - self._disconnected_s > self.current.orphan_s:
            _leave("the master closed its connection, or fell silent, and did not come back")

    def _receive(self, frames: list[framing.Frame]) -> None:
        try:
            envelope, body = framing.opened(frames)
            if envelope.version != PROTOCOL_VERSION:
                raise ProtocolError(f"protocol version {envelope.version}, not {PROTOCOL_VERSION}")
            if self.current is not None and envelope.epoch == self.current.epoch:
                self._link.acknowledge(envelope.received)
                if not self._is_heard.is_set():
                    self._is_heard.set()
            if envelope.order == 0:
                message = codec.decode_body(body)
                if isinstance(message, Ping) and self.current is not None and envelope.epoch == self.current.epoch:
                    now_s = time.monotonic()
                    self._clock.note(envelope.sent_s, now_s)
                    self._beat(now_s)
                self._hear(message)
            elif self.current is None or envelope.epoch != self.current.epoch:
                self._drops.note(f"it was of epoch {envelope.epoch}", time.monotonic())
            else:
                for delivered in self._link.accept(envelope.order, body):
                    self._obey(codec.decode_body(delivered))
                if envelope.order % ACKNOWLEDGED == 0:
                    self._beat(time.monotonic())
        except ProtocolError as error:
            self._drops.note(str(error), time.monotonic())

    def _hear(self, message: Message) -> None:
        """What is said outside of the link."""
        match message:
            case Welcome():
                self._begin(message)
            case Refuse() if message.again and self.current is None:  # it goes on to register
                if message.reason != self._refusal:
                    logger.warning("not let in yet: %s. It is asked again each second", message.reason)
                self._refusal = message.reason
            case Refuse():
                self._answers.put(message)
                if self.current is not None:
                    _leave(f"the master refuses this worker: {message.reason}")
            case Shutdown() if self.current is None:
                self._answers.put(message)
            case Ping():
                self._refusal = ""  # said to those who are in
            case _:
                self._drops.note(f"a {message.type} is not what a master says outside of a link", time.monotonic())

    def _begin(self, welcome: Welcome) -> None:
        """The first epoch, or the next; a welcome that comes again, or late, changes nothing."""
        if self.current is not None and (welcome.run != self.current.run or welcome.epoch <= self.current.epoch):
            return
        is_first, self._clock, self.current = self.current is None, MasterClock(), welcome
        self._link = Link(seldomness(welcome.num_workers))
        if welcome.silence_s != self._silence_s:  # changed on the master's command line
            self._silence_s = welcome.silence_s
            self._reconnect()
        self._cancelled.clear()
        self._executing.clear()
        if is_first:
            self._answers.put(welcome)
        else:
            logger.info("epoch %d begins: this worker is rank %d now", welcome.epoch, welcome.rank)
            self._begins_anew = True

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
                self._beat(time.monotonic())  # acknowledges it: the master waits for that
                self._answers.put(message)
                self.shutdown = message
            case _:
                logger.warning("dropped a %s from the master", message.type)

    def _wind_up(self, shutdown: Shutdown) -> None:
        for lane in Lane:
            self._requests[lane].put(None)
        if not self._finished.wait(_SHUTDOWN_GRACE_S):
            logger.warning("still busy %g s after the shutdown: leaving at once", _SHUTDOWN_GRACE_S)
            logging.shutdown()
            os._exit(0 if shutdown.is_done else EXIT_RUN_FAILED)


def _leave(why: str) -> None:
    logger.error("%s: this worker ends", why)
    logging.shutdown()
    os._exit(EXIT_MASTER_LOST)


def _refused(master: str, reason: str) -> ConfigError:
    return ConfigError("--master", master, f"the master refused this worker: {reason}", "see there")


def _unanswered(master: str, deadline_s: float, num_failed: int, keys: ClientKeys | None) -> RunError:
    why = f". {num_failed} connections to it ended in the handshake: {suspicion(keys)} (--keys RUN/keys/worker-N.key)"
    what = f"no master answered at {master} within {deadline_s:g} s (run.deadlines.register_s)"
    return RunError(what + (why if num_failed else ""))
