"""Simulated workers, for `control_plane_scale.py`: hundreds in one process, which answer at once and compute nothing.

    master's ROUTER <--one TCP connection a worker--> [one ROUTER of this process] --> one `SimulatedWorker` each

To the master each is a worker like others: it registers, has a link of its own, executes what it is asked in order,
replies with metadata of the right shape and the seconds that a real one would have taken, answers pings by heartbeats
that tell of a call that it is at, and lets ZeroMQ answer and send pings as a `Dealer` does. Less than a worker it is in
this: it refuses nothing, reconnects never, and has no lanes: replies come in the order of the requests. No torch here.
"""

from __future__ import annotations

import os
import resource
import select
import time
from collections import deque
from functools import cache
from pathlib import Path
from typing import assert_never

import numpy as np
import numpy.typing as npt
import zmq
from trainmaster.api.algorithms import Generation
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.config import Dataset, Layout, Model, Optimizer, RunOptions
from trainmaster.api.experiments.base import CompiledExperiment
from trainmaster.api.experiments.grpo import GRPO
from trainmaster.api.graph import CallKind, ModelFunctionCall
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling
from trainmaster.system.rpc import codec, dealer, framing
from trainmaster.system.rpc.commands import (
    CallDone,
    CallFunction,
    CallModel,
    Command,
    DatasetOpened,
    Done,
    Echo,
    Echoed,
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
    Redistribute,
    Release,
    Result,
    StoreAddress,
)
from trainmaster.system.rpc.link import Link
from trainmaster.system.rpc.messages import (
    HEARTBEAT_S,
    Executing,
    Heartbeat,
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
from trainmaster.system.rpc.port import io_threads

STAGES, GROUP_SIZE, SEQUENCES_PER_WORKER, HOST_SIZE = 8, 8, 16, 8
MAX_PROMPT, MAX_RESPONSE = 256, 512
NUM_ROWS = 2**20
CODE_DIGEST = "none"
STATISTICS = {
    CallKind.TRAIN_STEP: ("loss", "kl", "entropy", "ratio", "clipped", "reward", "gradient_norm", "learning_rate"),
    CallKind.GENERATE: ("response_length", "finished"),
    CallKind.INFERENCE: ("entropy",),
}
SECONDS = {CallKind.GENERATE: 5.0, CallKind.INFERENCE: 1.0, CallKind.TRAIN_STEP: 3.0}
"""That a call would have taken."""


def compiled_experiment(num_workers: int) -> CompiledExperiment:
    """GRPO with a reference that shares the actor's workers; one pass, one minibatch."""
    assert num_workers % STAGES == 0, f"each replica has {STAGES} workers"
    return GRPO(
        actor=Model(path=Path("model"), layout=Layout(dp=num_workers // STAGES, pp=STAGES)),
        prompts=Dataset(path=Path("prompts.jsonl")),
        reward=Reward(function="exact_match"),
        sampling=Sampling(max_new_tokens=MAX_RESPONSE),
        optimizer=Optimizer(),
        batch_size=num_workers * SEQUENCES_PER_WORKER // GROUP_SIZE,
        group_size=GROUP_SIZE,
        kl_coefficient=0.1,
        microbatch_tokens=32_768,
        run=RunOptions(name="scale", steps=1000),
    ).compile()


def raise_file_limit() -> None:
    """A connection takes a descriptor at each end."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class SimulatedWorker:
    """What it is asked, it does at once."""

    def __init__(self, place: int, compiled: CompiledExperiment) -> None:
        self._compiled = compiled
        self.register = Register(
            host=f"host-{place // HOST_SIZE:04}",
            pid=place + 1,
            incarnation=f"{os.getpid()}-{place}",
            address=f"10.{place >> 16 & 255}.{place >> 8 & 255}.{place & 255}",
            versions={"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"},
            code_digest=CODE_DIGEST,
        )
        self.welcome: Welcome | None = None
        self.link: Link[framing.Body] = Link()
        self.said_s = 0.0
        """When it sent its last heartbeat."""
        self._at, self._version = 0, 0

    @property
    def epoch(self) -> int:
        return 0 if self.welcome is None else self.welcome.epoch

    @property
    def _stage(self) -> int:
        assert self.welcome is not None, "requests follow a welcome"
        return self.welcome.rank % STAGES

    def begin(self, welcome: Welcome) -> None:
        self.welcome, self.link = welcome, Link(seldomness(welcome.num_workers))

    def heartbeat(self, now_s: float) -> Message:
        if self.welcome is None:
            return self.register
        executing = (Executing(id=self._at, seconds=now_s % 1000),)
        return Heartbeat(run=self.welcome.run, epoch=self.welcome.epoch, executing=executing)

    def answer(self, request: Request) -> Reply:
        self._at = request.id
        result, seconds = self._execute(request.command)
        times = {request.command.type: seconds} | dict.fromkeys((hook.type for hook in request.pre_hooks), 0.05)
        outcome = Success(result=result)
        return Reply(run=request.run, epoch=request.epoch, id=request.id, outcome=outcome, seconds=times)

    def _execute(self, command: Command) -> tuple[Result, float]:
        """The result, and the seconds that it would have taken."""
        match command:
            case HostStore():
                return StoreAddress(host=self.register.address, port=29_500), 0.1
            case LoadModel():
                return ModelLoaded(num_parameters=10**9, reads_tokens=self._stage in (0, STAGES - 1)), 10.0
            case OpenDataset():
                return DatasetOpened(num_sequences=NUM_ROWS, num_tokens=NUM_ROWS, longest=1, longest_id="-"), 10.0
            case Fetch():
                return Fetched(samples=prompts(command.start, command.count)), 0.1
            case CallModel():
                call = self._compiled.graphs[command.graph].graph.call(command.call)
                assert isinstance(call, ModelFunctionCall), "the master calls models by their calls"
                return self._call(call, command.samples), SECONDS[call.kind]
            case CallFunction():
                return scored(command.samples), 0.5
            case Echo():
                return Echoed(text=command.text, content=command.content), 0.0
            case JoinGroups() | OpenFunction() | Redistribute() | Release():
                return Done(), 0.05
            case _:
                assert_never(command)

    def _call(self, call: ModelFunctionCall, samples: Samples) -> CallDone:
        assert self.welcome is not None, "requests follow a welcome"
        rank = self.welcome.rank
        is_last, is_head = rank % STAGES + 1 == STAGES, rank + 1 == STAGES
        self._version += call.kind is CallKind.TRAIN_STEP
        owns = is_last if call.kind is CallKind.GENERATE else is_head
        names = STATISTICS[call.kind] if owns else ()
        return CallDone(
            statistics={name: Mean(total=1.0, weight=2.0) for name in names},
            version=self._version,
            outputs=self._outputs(call, samples) if is_last and call.outputs else None,
        )

    def _outputs(self, call: ModelFunctionCall, samples: Samples) -> Samples:
        ids, lengths = samples.ids, samples.keys[call.inputs[0]].lengths
        if isinstance(call.settings, Generation):
            random = np.random.default_rng((self._at, len(ids)))
            drawn = random.lognormal(np.log(MAX_RESPONSE / 3), 0.5, len(ids))
            lengths = (lengths + np.clip(drawn, 1, MAX_RESPONSE)).astype(np.int32)
        types = {"tokens": "int64", "loss_mask": "bool", "versions": "int32"}
        keys = {key: KeyColumn(dtype=types.get(key, "float32"), lengths=lengths) for key in call.outputs}
        return Samples(ids=ids, keys=keys)


def prompts(start: int, count: int) -> Samples:
    """Rows of the stream, each once for every response of its group."""
    ids = tuple(
        f"prompts/{row // NUM_ROWS}/{row % NUM_ROWS}/{copy}"
        for row in range(start, start + count)
        for copy in range(GROUP_SIZE)
    )
    lengths = prompt_lengths()[np.arange(start, start + count) % NUM_ROWS].repeat(GROUP_SIZE)
    return Samples(ids=ids, keys={"prompt": KeyColumn(dtype="int64", lengths=lengths)})


@cache
def prompt_lengths() -> npt.NDArray[np.int32]:
    drawn = np.random.default_rng(0).lognormal(np.log(MAX_PROMPT / 3), 0.5, NUM_ROWS)
    return np.clip(drawn, 1, MAX_PROMPT).astype(np.int32)


def scored(samples: Samples) -> FunctionDone:
    column = KeyColumn(dtype="float32", lengths=np.ones(len(samples), np.int32))
    return FunctionDone(
        statistics={name: Mean(total=1.0, weight=2.0) for name in ("reward", "failures", "zero_variance")},
        outputs=Samples(ids=samples.ids, keys={"reward": column, "advantage": column}),
        dropped=(),
        failures=(),
        examples=(),
    )


class Swarm:
    """All workers of one process, over one socket."""

    def __init__(self, address: str, places: range, num_workers: int, silence_s: float) -> None:
        compiled = compiled_experiment(num_workers)
        self._workers = {f"w{place}".encode(): SimulatedWorker(place, compiled) for place in places}
        self._socket: zmq.Socket[bytes] = zmq.Context(io_threads(len(places))).socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, framing.QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, framing.QUEUED_MESSAGES)
        dealer.keep_alive(self._socket, silence_s)
        for route in self._workers:
            self._socket.setsockopt(zmq.CONNECT_ROUTING_ID, route)
            self._socket.connect(address)
        start_s, step_s = time.monotonic(), HEARTBEAT_S / len(self._workers)
        self._unasked_s = HEARTBEAT_S * (2 * seldomness(num_workers) - 1)
        """After which a heartbeat comes by itself, as a `Client`'s does."""
        self._beats = deque((start_s + at * step_s, route) for at, route in enumerate(self._workers))
        """When each looks whether it has anything to say of its own, in that order."""
        self._num_left = len(places)
        """Workers that have not heard the run's end."""

    def run(self) -> None:
        """Until the master says that the run is over."""
        while self._num_left > 0:
            while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                self._receive(self._socket.recv(zmq.NOBLOCK), framing.receive(self._socket))
            now_s = time.monotonic()
            while self._beats[0][0] <= now_s:
                due_s, route = self._beats.popleft()
                self._beats.append((due_s + HEARTBEAT_S, route))
                worker = self._workers[route]
                if now_s - worker.said_s > (HEARTBEAT_S if worker.welcome is None else self._unasked_s):
                    self._beat(route, worker)
                self._flush(route, worker)
            if not self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # its descriptor tells of each arrival once
                select.select([self._socket], [], [], max(0.0, self._beats[0][0] - time.monotonic()))
        self._socket.close(linger=1000)

    def _receive(self, route: bytes, frames: list[framing.Frame]) -> None:
        worker = self._workers[route]
        envelope, body = framing.opened(frames)
        if envelope.order == 0:
            message = codec.decode_body(body)
            if isinstance(message, Welcome):
                worker.begin(message)
            elif isinstance(message, Ping) and worker.welcome is not None:
                self._beat(route, worker)
        if worker.welcome is None or envelope.epoch != worker.epoch:
            return
        worker.link.acknowledge(envelope.received)
        if envelope.order > 0:
            for delivered in worker.link.accept(envelope.order, body):
                self._obey(route, worker, codec.decode_body(delivered))
            self._flush(route, worker)

    def _obey(self, route: bytes, worker: SimulatedWorker, message: Message) -> None:
        if isinstance(message, Request):
            reply = worker.answer(message)
            if not message.is_silent:
                worker.link.post(codec.encode_body(reply))
        elif isinstance(message, Shutdown):
            self._num_left -= 1
            self._beat(route, worker)  # acknowledges it

    def _beat(self, route: bytes, worker: SimulatedWorker) -> None:
        worker.said_s = time.monotonic()
        self._send(route, worker, 0, codec.encode_body(worker.heartbeat(worker.said_s)))

    def _flush(self, route: bytes, worker: SimulatedWorker) -> None:
        now_s = time.monotonic()
        if worker.link.is_due(now_s):
            for order, body in worker.link.due(now_s):
                self._send(route, worker, order, body)

    def _send(self, route: bytes, worker: SimulatedWorker, order: int, body: framing.Body) -> None:
        envelope = framing.Envelope(worker.epoch, order, worker.link.received, time.monotonic())
        framing.send(self._socket, [route, *envelope.around(body)])


def serve(address: str, places: range, num_workers: int, silence_s: float, cores: set[int]) -> None:
    """A process's work."""
    if cores:
        os.sched_setaffinity(0, cores)
    raise_file_limit()
    Swarm(address, places, num_workers, silence_s).run()
