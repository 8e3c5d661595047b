"""Messages that went wrong: valid ones of every type, mutated; and a peer that speaks ZeroMQ's own protocol by hand."""

from __future__ import annotations

import dataclasses
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.system.rpc import codec, framing
from trainmaster.system.rpc.commands import (
    CallDone,
    CallFunction,
    CallModel,
    DatasetOpened,
    Done,
    Echo,
    Echoed,
    Example,
    Fetch,
    Fetched,
    FunctionDone,
    HostStore,
    JoinGroups,
    LoadModel,
    Mean,
    ModelLoaded,
    OpenDataset,
    OpenFunction,
    Release,
    Reshard,
    Save,
    ShardFile,
    StoreAddress,
)
from trainmaster.system.rpc.inquiries import Refuse
from trainmaster.system.rpc.messages import (
    Cancel,
    Executing,
    Failure,
    Heartbeat,
    Lane,
    Message,
    Ping,
    Reply,
    Request,
    Shutdown,
    Success,
)
from trainmaster.system.rpc.parcels import Parcel, Redistribute
from wire import register, welcome

SAMPLES = Samples(ids=("a", "b"), keys={"tokens": KeyColumn(dtype="int64", lengths=(3, 4), trailing=(2,))})
REDISTRIBUTE = Redistribute.of(tag=1, sends=(Parcel(peers=(1,), blocks=(SAMPLES,)),))
ARRAYS = (np.arange(6, dtype=np.int64).reshape(2, 3), np.ones(5, dtype=np.float32), np.zeros((0, 4), dtype=np.uint8))
COMMANDS = (
    Echo(content=ARRAYS),
    HostStore(),
    JoinGroups(store_host="here", store_port=1),
    LoadModel(model="actor"),
    OpenDataset(graph="sft"),
    OpenFunction(graph="sft", call="train"),
    Fetch(graph="sft", start=0, count=4),
    CallModel(graph="sft", call="train", samples=SAMPLES, sizes=(1,) * len(SAMPLES)),
    CallFunction(graph="sft", call="score", samples=SAMPLES),
    REDISTRIBUTE,
    Release(ids=("a", "b")),
)
RESULTS = (
    Echoed(content=ARRAYS),
    Done(),
    StoreAddress(host="here", port=1),
    ModelLoaded(num_parameters=5),
    DatasetOpened(num_sequences=1, num_tokens=2, longest=2, longest_id="a"),
    Fetched(samples=SAMPLES),
    CallDone(statistics={"loss": Mean(total=1.0, weight=2.0)}, version=1, outputs=SAMPLES),
    FunctionDone(
        statistics={},
        outputs=SAMPLES,
        dropped=("a",),
        failures=("no",),
        examples=(Example(id="a", prompt="p", response="r", reward=None),),
    ),
)
HTTP_REQUESTS = {
    "short": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "long": b"GET /metrics HTTP/1.1\r\nHost: localhost:5555\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n" * 4,
}
_BAD_PARTS = (
    b"\xc1",
    b"\xdd\xff\xff\xff\xff",
    b"\xdd\x00\x10\x00\x00",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x91" * 2000,
    b"\x81\xa1a" * 600,
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xc7\x05\x63abcde",
    msgpack.packb(msgpack.ExtType(1, msgpack.packb([0, "int64", [0, 2**62]]))),
    msgpack.packb(msgpack.ExtType(1, msgpack.packb([0, "object", [1]]))),
    msgpack.packb(float("nan")),
    msgpack.packb(float("-inf")),
    msgpack.packb(2**64 - 1),
    msgpack.packb(-(2**63)),
)
"""Reserved bytes, lengths that are not there, depth, extension types, arrays, and numbers that are none."""


def corpus(run: str, epoch: int, digest: str, ids: range) -> list[Message]:
    """At least one message of every type, command and result."""
    requests = [
        Request(
            run=run,
            epoch=epoch,
            id=identity,
            lane=lane,
            deadline_s=60.0,
            submitted_s=0.0,
            command=command,
            pre_hooks=(Reshard(source="actor", target="reference"),),
            post_hooks=(Reshard(source="actor", target="reference", eta=0.3), Save(model="actor", directory="here")),
        )
        for identity in ids
        for lane, command in zip(list(Lane) * 4, COMMANDS, strict=False)
    ]
    failure = Failure(
        kind="KeyError", message="'x'", traceback="Traceback ...", field="f", value="v", rule="r", cure="c"
    )
    outcomes = (*(Success(result=result, files=(ShardFile(file="f"),)) for result in RESULTS), failure)
    replies = [
        Reply(run=run, epoch=epoch, id=identity, outcome=outcome, seconds={"echo": 0.5})
        for identity in ids
        for outcome in outcomes
    ]
    registration = register(devices=("cuda:0",), versions={"python": "3.11"}, code_digest=digest)
    told = {"overrides": ("--run.steps", "1"), "experiment_digest": "d", "log_directory": "logs", "orphan_s": 60.0}
    return [
        *requests,
        *replies,
        *(Cancel(run=run, epoch=epoch, id=identity) for identity in ids),
        *(Heartbeat(run=run, epoch=epoch, executing=(Executing(id=identity, seconds=1.0),)) for identity in ids),
        dataclasses.replace(registration, run=run, epoch=epoch),
        registration,
        welcome(run=run, epoch=epoch, **told),
        Refuse(reason="no"),
        Ping(),
        Shutdown(is_done=True, reason="the run is over"),
    ]


class Fuzzer:
    """The same messages for the same seed. Each is a valid one, wrong in one place to four, or of another epoch."""

    def __init__(self, seed: int, messages: list[Message], epoch: int) -> None:
        self.counts: Counter[str] = Counter()
        """How often each mutation was made."""
        self._draw = random.Random(seed)
        self._epoch = epoch
        self._bodies = [[bytes(frame) for frame in codec.encode_body(message)] for message in messages]
        self._mutations: list[Callable[[list[bytes]], None]] = [
            self._flip_bits,
            self._flip_bits,
            self._truncate,
            self._insert,
            self._swap_frames,
            self._repeat_frame,
            self._drop_frame,
            self._random_frame,
            self._splice,
            self._bad_part,
            self._duplicate_key,
            self._other_envelope,
            self._other_envelope,
        ]

    def message(self) -> list[bytes]:
        """All frames, at least one. The envelope and the message, one frame, are changed as if they were two."""
        draw = self._draw
        order = draw.choice((0, 0, 1, 2, 300, 2**40, 2**64 - 1))
        frames = [self._envelope(epoch=self._epoch, order=order), *draw.choice(self._bodies)]
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            mutation = draw.choice(self._mutations)
            mutation(frames)
            self.counts[mutation.__name__.strip("_")] += 1
        return [b"".join(frames[:2]), *frames[2:]]

    def _envelope(self, epoch: int, order: int, received: int = 0, version: int = framing.PROTOCOL_VERSION) -> bytes:
        (frame,) = framing.Envelope(epoch, order, received, sent_s=time.monotonic(), version=version).around([b""])
        return bytes(frame)

    def _other_envelope(self, frames: list[bytes]) -> None:
        draw = self._draw
        frames[0] = self._envelope(
            epoch=draw.choice((0, self._epoch - 1, self._epoch, self._epoch + 1, 2**63, 2**64 - 1)),
            order=draw.choice((0, 1, 255, 257, 2**32, 2**64 - 1)),
            received=draw.choice((0, 1, 2**64 - 1)),
            version=draw.choice((framing.PROTOCOL_VERSION,) * 8 + (0, 1, framing.PROTOCOL_VERSION + 1, 2**16 - 1)),
        )

    def _pick(self, frames: list[bytes]) -> int:
        """Mostly the message itself."""
        return 1 if len(frames) > 1 and self._draw.random() < 0.7 else self._draw.randrange(len(frames))

    def _flip_bits(self, frames: list[bytes]) -> None:
        at = self._pick(frames)
        if frames[at]:
            changed = bytearray(frames[at])
            for _ in range(self._draw.choice((1, 1, 2, 8))):
                changed[self._draw.randrange(len(changed))] ^= 1 << self._draw.randrange(8)
            frames[at] = bytes(changed)

    def _truncate(self, frames: list[bytes]) -> None:
        at = self._pick(frames)
        frames[at] = frames[at][: self._draw.randrange(len(frames[at]) + 1)]

    def _insert(self, frames: list[bytes]) -> None:
        at = self._pick(frames)
        place = self._draw.randrange(len(frames[at]) + 1)
        frames[at] = frames[at][:place] + self._draw.randbytes(self._draw.choice((1, 2, 8))) + frames[at][place:]

    def _swap_frames(self, frames: list[bytes]) -> None:
        one, other = self._draw.randrange(len(frames)), self._draw.randrange(len(frames))
        frames[one], frames[other] = frames[other], frames[one]

    def _repeat_frame(self, frames: list[bytes]) -> None:
        at = self._draw.randrange(len(frames))
        frames[at:at] = [frames[at]] * self._draw.choice((1, 1, 2, 80))

    def _drop_frame(self, frames: list[bytes]) -> None:
        if len(frames) > 1:
            del frames[self._draw.randrange(len(frames))]

    def _random_frame(self, frames: list[bytes]) -> None:
        frames[self._pick(frames)] = self._draw.randbytes(self._draw.choice((0, 1, 8, 34, 200, 2000)))

    def _splice(self, frames: list[bytes]) -> None:
        """The front of one message, the back of another."""
        at, other = self._pick(frames), self._draw.choice(self._bodies)[0]
        place = self._draw.randrange(len(frames[at]) + 1)
        frames[at] = frames[at][:place] + other[min(place, len(other)) :]

    def _bad_part(self, frames: list[bytes]) -> None:
        at = self._pick(frames)
        place = self._draw.randrange(len(frames[at]) + 1)
        frames[at] = frames[at][:place] + self._draw.choice(_BAD_PARTS) + frames[at][place + 1 :]

    def _duplicate_key(self, frames: list[bytes]) -> None:
        """A message that says twice what its run, epoch or type is."""
        if len(frames) > 1 and frames[1][:1] and 0x80 < frames[1][0] < 0x8F:
            key, value = self._draw.choice((("run", "other"), ("epoch", 2**64 - 1), ("type", "ping"), ("id", 0)))
            twice = msgpack.packb(key) + msgpack.packb(value)
            frames[1] = bytes([frames[1][0] + 1]) + frames[1][1:] + twice


def rss_bytes(pid: int, what: str = "VmRSS") -> int:
    """A process's memory now, or `VmHWM`: at most so far."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def plain_connection(address: str, text: bytes = b"") -> socket.socket:
    """A TCP connection over which this has been sent."""
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(text)
    return connection


def closed_after_s(connection: socket.socket, deadline_s: float) -> float | None:
    """How long until the other end closes; None if it does not in time."""
    start_s = time.monotonic()
    while (left_s := start_s + deadline_s - time.monotonic()) > 0:
        connection.settimeout(left_s)
        try:
            if not connection.recv(4096):
                return time.monotonic() - start_s
        except TimeoutError:
            return None
        except ConnectionError:
            return time.monotonic() - start_s
    return None


def shaken_hands(address: str) -> socket.socket:
    """A plain TCP connection on which ZeroMQ's greeting and READY (ZMTP 3.1, NULL, a DEALER) have passed."""
    connection = plain_connection(address)
    connection.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
    _receive_exactly(connection, 64)
    ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    connection.sendall(b"\x04" + bytes([len(ready)]) + ready)
    _, size = _receive_exactly(connection, 2)
    assert _receive_exactly(connection, size).startswith(b"\x05READY")
    return connection


def long_frame(size_bytes: int, more: bool = False) -> bytes:
    """The head of a frame of that size."""
    return bytes([0x02 | more]) + struct.pack(">Q", size_bytes)


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    content = b""
    while len(content) < num_bytes:
        part = connection.recv(num_bytes - len(content))
        assert part, "the other end closed the connection"
        content += part
    return content
