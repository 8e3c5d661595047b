"""A crowd before a master's door, from another host. Run by its path: ADDRESS, the master's PUBLIC KEY, SECONDS.

    300 idle      150 say nothing, 150 say that they will use CURVE and then nothing: whoever is cut off comes again
     20 HTTP      ask for a page, and again half a second after they were cut off
     20 plain     speak ZeroMQ without keys, and then the same
     10 wrong     ZeroMQ sockets that encrypt to the master with keys that it does not know, new ones every half second

At its end it prints, as JSON, how often each kind came, and how many of them heard more than ZeroMQ's greeting.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter

import zmq

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""ZeroMQ's, as of a client that is about to use CURVE."""
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
HELLOS = {
    "silent": b"",
    "greeting": GREETING,
    "HTTP": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n",
    "plain": GREETING.replace(b"CURVE", b"NULL\0") + READY,
}
NUM_STRANGERS = {"silent": 150, "greeting": 150, "HTTP": 20, "plain": 20}
NUM_WRONG_KEYS = 10
AGAIN_S = 0.5


async def stranger(kind: str, address: tuple[str, int], came: Counter[str], heard: Counter[str]) -> None:
    """Comes, waits until it is cut off, and comes again."""
    while True:
        reader, writer = await asyncio.open_connection(*address)
        came[kind] += 1
        try:
            writer.write(HELLOS[kind])
            with contextlib.suppress(ConnectionError):
                heard[kind] += len(await reader.read(-1)) > len(GREETING)
        finally:
            writer.close()
        await asyncio.sleep(AGAIN_S)


async def wrong_keys(address: str, master: bytes, came: Counter[str], heard: Counter[str]) -> None:
    with zmq.Context() as context:
        while True:
            sockets = [context.socket(zmq.DEALER) for _ in range(NUM_WRONG_KEYS)]
            try:
                for socket in sockets:
                    socket.curve_serverkey = master
                    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
                    socket.linger = 0
                    socket.connect(address)
                await asyncio.sleep(AGAIN_S)
                came["wrong"] += NUM_WRONG_KEYS  # they have had the time to
                heard["wrong"] += sum(1 for socket in sockets if socket.poll(0))
            finally:
                for socket in sockets:
                    socket.close()


async def crowd(address: str, master: str, seconds: float) -> None:
    came: Counter[str] = Counter()
    heard: Counter[str] = Counter()
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    start_s = time.monotonic()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for kind, number in NUM_STRANGERS.items():
                for _ in range(number):
                    group.create_task(stranger(kind, (host, int(port)), came, heard))
            group.create_task(wrong_keys(address, master.encode(), came, heard))
    print(json.dumps({"came": came, "num_heard": heard.total(), "took_s": time.monotonic() - start_s}))


if __name__ == "__main__":
    asyncio.run(crowd(sys.argv[1], sys.argv[2], float(sys.argv[3])))
