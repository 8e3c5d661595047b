"""A worker's end of the control plane: a DEALER socket on a thread of its own.

The thread registers, sends heartbeats while the interpreter lets it, sorts requests into one queue a lane, and sends
replies. It ends the process when the master is gone: a worker without a master has nothing left to do. Whether a
connection is alive is ZeroMQ's to say, whose own thread answers the master's pings whatever Python does.

    master <--DEALER--> [I/O thread] --requests--> queue of each lane --> lane threads
                              ^--------inproc PUSH/PULL--replies-----------'
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from ...api.errors import ConfigError, ProtocolError, RunError
from . import codec
from .messages import HEARTBEAT_S, Heartbeat, Lane, Message, Ping, Refuse, Register, Reply, Request, Shutdown, Welcome

logger = logging.getLogger(__name__)

EXIT_MASTER_LOST = 3
EXIT_RUN_FAILED = 4
"""The run failed or was stopped, and the master told this worker so."""
_SHUTDOWN_GRACE_S = 3.0
_REPLIES = "inproc://replies"


class Client:
    """Connects at construction. `welcome` first, then `next_request` from the thread of each lane, and `reply`."""

    def __init__(self, master: str, register: Register) -> None:
        self._master, self._register = master, register
        self._requests: dict[Lane, queue.SimpleQueue[Request | None]] = {lane: queue.SimpleQueue() for lane in Lane}
        self._answers: queue.SimpleQueue[Welcome | Refuse | Shutdown] = queue.SimpleQueue()
        self._welcomed: Welcome | None = None
        self.shutdown: Shutdown | None = None
        """The master's last word, once it has spoken it."""
        self._finished = threading.Event()
        self._context = zmq.Context()
        self._outbox: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._outbox.bind(_REPLIES)
        self._outbox_lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="rpc", daemon=True)
        self._thread.start()

    def welcome(self, deadline_s: float) -> Welcome:
        """Waits for the master's answer to the registration. Raises `ConfigError` if it refuses this worker."""
        try:
            answer = self._answers.get(timeout=deadline_s)
        except queue.Empty:
            raise RunError(
                f"no master answered at {self._master} within {deadline_s:g} s (run.deadlines.register_s)"
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

    def next_request(self, lane: Lane) -> Request | None:
        """Waits for the lane's next request; None when the run is over."""
        return self._requests[lane].get()

    def reply(self, reply: Reply) -> None:
        """Hands a reply to the I/O thread. Safe from any thread."""
        with self._outbox_lock:
            self._outbox.send_multipart(codec.encode(reply))

    def close(self) -> None:
        """Says that this process is done: the I/O thread will not end it by force."""
        self._finished.set()

    # -- the I/O thread -------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 1000)
        dealer.setsockopt(zmq.IPV6, "[" in self._master)
        dealer.setsockopt(zmq.MAXMSGSIZE, codec.MAX_BODY_BYTES)
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        replies: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        replies.connect(_REPLIES)
        dealer.connect(self._master)
        poller = zmq.Poller()
        for socket in (dealer, monitor, replies):
            poller.register(socket, zmq.POLLIN)
        last_sent_s = time.monotonic()
        while True:
            ready = dict(poller.poll(int(1000 * HEARTBEAT_S / 2)))
            now_s = time.monotonic()
            if replies in ready:
                dealer.send_multipart(replies.recv_multipart())
            if dealer in ready:
                self._receive(dealer.recv_multipart())
            if monitor in ready:
                self._follow(recv_monitor_message(monitor)["event"], dealer)
            if self._welcomed is not None and now_s - last_sent_s >= HEARTBEAT_S:
                last_sent_s = now_s
                beat = Heartbeat(run=self._welcomed.run, epoch=self._welcomed.epoch)
                dealer.send_multipart(codec.encode(beat))

    def _follow(self, event: int, dealer: zmq.Socket[bytes]) -> None:
        """Registers with whoever is at the other end until one welcomes us; after that, its loss is the end."""
        if self._welcomed is None:
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                dealer.send_multipart(codec.encode(self._register))
        elif event == zmq.EVENT_DISCONNECTED:
            while dealer.poll(0):  # its last words may have come just before: a shutdown is no loss
                self._receive(dealer.recv_multipart())
            self._leave("the master closed its connection, or fell silent")

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message: Message = codec.decode(frames)
        except ProtocolError as error:
            logger.warning("dropped a message from the master: %s", error)
            return
        match message:
            case Request():
                assert self._welcomed is not None, "the master welcomes a worker before it asks anything"
                if (message.run, message.epoch) == (self._welcomed.run, self._welcomed.epoch):
                    self._requests[message.lane].put(message)
                else:
                    logger.warning("dropped a request of epoch %d", message.epoch)
            case Welcome():
                self._welcomed = message
                self._answers.put(message)
            case Refuse():
                self._answers.put(message)
            case Shutdown():
                logger.info("shutting down: %s", message.reason)
                self._answers.put(message)
                if self._welcomed is not None:
                    self._wind_up(message)
            case Ping():
                pass
            case _:
                logger.warning("dropped a %s from the master: not a master's message", message.type)

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
