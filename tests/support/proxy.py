"""A stranger in the middle: passes messages between workers and a master, but loses, repeats and delays some."""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import Counter
from types import TracebackType

import zmq


class Proxy:
    """Listens at `front` for workers, and speaks to the master at `back` in the name of each. A context manager."""

    def __init__(self, front: str, back: str, share: float, seed: int = 0, max_delay_s: float = 0.3) -> None:
        self.counts: Counter[str] = Counter()
        """What became of messages: passed, dropped, repeated, delayed."""
        self._back, self._share, self._max_delay_s = back, share, max_delay_s
        self._draw = random.Random(seed)
        self._context = zmq.Context()
        self._front: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._front.bind(front)
        self._dealers: dict[bytes, zmq.Socket[bytes]] = {}
        self._delayed: list[tuple[float, int, zmq.Socket[bytes], list[bytes]]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="proxy")

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._is_over.is_set():
            poller = zmq.Poller()
            for socket in (self._front, *self._dealers.values()):
                poller.register(socket, zmq.POLLIN)
            ready = dict(poller.poll(10))
            if self._front in ready:
                route, *frames = self._front.recv_multipart()
                self._pass_on(self._dealer(route), frames)
            for route, dealer in list(self._dealers.items()):
                if dealer in ready:
                    self._pass_on(self._front, [route, *dealer.recv_multipart()])
            while self._delayed and self._delayed[0][0] <= time.monotonic():
                _, _, socket, frames = heapq.heappop(self._delayed)
                socket.send_multipart(frames)

    def _dealer(self, route: bytes) -> zmq.Socket[bytes]:
        if route not in self._dealers:
            dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.ROUTING_ID, route)
            dealer.connect(self._back)
            self._dealers[route] = dealer
        return self._dealers[route]

    def _pass_on(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        lot = self._draw.random() / self._share
        if lot < 1:
            self.counts["dropped"] += 1
            return
        if lot < 2:
            self.counts["delayed"] += 1
            due_s = time.monotonic() + self._draw.uniform(0, self._max_delay_s)
            heapq.heappush(self._delayed, (due_s, sum(self.counts.values()), socket, frames))
            return
        self.counts["passed"] += 1
        socket.send_multipart(frames)
        if lot < 3:
            self.counts["repeated"] += 1
            socket.send_multipart(frames)
