"""The client in a process of its own (it ends its process when the master is gone), against a bare ROUTER."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from trainmaster.system.rpc.commands import Done, HostStore
from trainmaster.system.rpc.inquiries import Refuse
from trainmaster.system.rpc.link import ACKNOWLEDGED
from trainmaster.system.rpc.messages import (
    Cancel,
    Heartbeat,
    Lane,
    Message,
    Ping,
    Register,
    Reply,
    Request,
    Shutdown,
    Success,
)
from wire import EPOCH, RUN, Wire, welcome

SCRIPT = """
import sys, threading
from trainmaster.api.errors import TrainmasterError
from trainmaster.system.rpc import client as module
from trainmaster.system.rpc.commands import Done
from trainmaster.system.rpc.messages import Failure, Lane, Register, Reply, Success

module.HEARTBEAT_S = 0.05
address, behaviour = sys.argv[1:]
module._SHUTDOWN_GRACE_S = 0.05 if behaviour == "busy" else 5.0
client = module.Client(address, Register(
    host="here", pid=7, incarnation="i", address="127.0.0.1", versions={}, code_digest="digest"
), 5.0)
try:
    welcome = client.welcome(0.1 if behaviour == "impatient" else 5.0)
except TrainmasterError as error:
    print(type(error).__name__, error)
    sys.exit(0)
while behaviour == "busy":
    pass
order = (Lane.TRANSFER, Lane.COMPUTE) if behaviour == "transfer first" else (Lane.COMPUTE, Lane.TRANSFER)
for lane in order:
    while (asked := client.next_request(lane)) is not None:
        request, _ = asked
        outcome = Success(result=Done()) if request.id < 90 else Failure(kind="K", message="m", traceback="t")
        client.reply(
            Reply(
                run=request.run, epoch=request.epoch, id=request.id, outcome=outcome, seconds={},
                is_unasked=request.is_silent,
            )
        )
        if behaviour == "transfer first":
            break
while behaviour == "transfer first" and client.next_request(Lane.COMPUTE) is not None:
    pass
client.close()
print("over")
"""
WELCOME = welcome(orphan_s=0.1)


class Master:
    """A ROUTER socket and one worker's process."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.RCVTIMEO, 10_000)
        self.address = f"ipc://{folder}/master"
        self.wire = Wire(EPOCH)
        self.router.bind(self.address)
        self.process: subprocess.Popen[str] | None = None

    def start(self, behaviour: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, self.address, behaviour],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.route, *frames = self.router.recv_multipart()
        assert isinstance(self.wire.unpack(frames)[0], Register)

    def restart(self) -> None:
        """A new socket at the same address, that the worker finds by itself."""
        self.router.close(linger=0)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.RCVTIMEO, 10_000)
        self.router.bind(self.address)
        self.route, *frames = self.router.recv_multipart()
        assert isinstance(self.wire.unpack(frames)[0], Register)

    def send(self, message: Message, *, linked: bool | None = None) -> None:
        self.router.send_multipart([self.route, *self.wire.pack(message, linked=linked)])

    def receive(self) -> Message:
        while not (delivered := self.wire.unpack(self.router.recv_multipart()[1:])):
            pass
        return delivered[0]

    def reply(self) -> Reply:
        while not isinstance(message := self.receive(), Reply):
            assert isinstance(message, Heartbeat)
        return message

    def ended(self) -> tuple[int, str, str]:
        """Exit code, standard output and error."""
        assert self.process is not None
        out, err = self.process.communicate(timeout=10)
        return self.process.returncode, out, err


@pytest.fixture
def master(tmp_path: Path) -> Iterator[Master]:
    made = Master(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.communicate()
    made.context.destroy(linger=0)


def request(identity: int, lane: Lane = Lane.COMPUTE, run: str = RUN, epoch: int = EPOCH) -> Request:
    return Request(run=run, epoch=epoch, id=identity, lane=lane, deadline_s=60.0, submitted_s=0.0, command=HostStore())


def test_a_life_from_welcome_to_shutdown(master: Master):
    master.start()
    master.send(WELCOME)
    master.send(Ping())
    master.send(request(4))
    assert master.reply() == Reply(run=RUN, epoch=EPOCH, id=4, outcome=Success(result=Done()), seconds={})
    master.send(Shutdown(is_done=True, reason="the run is over"))
    assert master.ended()[:2] == (0, "over\n")


def test_requests_of_other_lives_garbage_and_foreign_messages_are_dropped(master: Master):
    master.start()
    master.send(WELCOME)
    master.send(request(1, epoch=EPOCH - 1))
    master.send(request(2, run="other"))
    master.router.send_multipart([master.route, b"garbage"])
    master.send(Heartbeat(run=RUN, epoch=EPOCH))
    master.send(request(4))
    assert master.reply().id == 4


def test_lanes_are_queues_of_their_own(master: Master):
    master.start("transfer first")
    master.send(WELCOME)
    master.send(request(1, Lane.COMPUTE))
    master.send(request(2, Lane.TRANSFER))
    assert [master.reply().id, master.reply().id] == [2, 1]


def test_heartbeats_go_on_while_the_process_computes(master: Master):
    master.start("busy")
    master.send(WELCOME)
    for _ in range(3):
        assert isinstance(master.receive(), Heartbeat)


def test_a_ping_is_answered_by_a_heartbeat(master: Master):
    master.start()
    master.send(WELCOME)
    assert isinstance(master.receive(), Heartbeat)
    start_s = time.monotonic()
    for _ in range(100):
        master.send(Ping())
    for _ in range(100):
        assert isinstance(master.receive(), Heartbeat)
    assert time.monotonic() - start_s < 100 * 0.05 / 2, "more come than by themselves"


def test_one_of_many_is_heard_seldom_but_acknowledges_half_a_window_at_once(master: Master):
    master.start()
    master.send(replace(WELCOME, num_workers=2**20))
    assert isinstance(master.receive(), Heartbeat)
    for identity in range(ACKNOWLEDGED):
        master.send(Cancel(run=RUN, epoch=EPOCH, id=identity))
    assert isinstance(master.receive(), Heartbeat)
    assert master.wire.link.is_idle
    assert not master.router.poll(3 * 50), "it has nothing to say of its own for a long time"


def test_a_busy_worker_leaves_after_a_shutdown(master: Master):
    master.start("busy")
    master.send(WELCOME)
    assert isinstance(master.receive(), Heartbeat)
    master.send(Shutdown(is_done=True, reason="the run is over"))
    assert master.ended()[:2] == (0, "")


def test_a_busy_worker_of_a_failed_run_says_so_by_its_exit_code(master: Master):
    master.start("busy")
    master.send(WELCOME)
    assert isinstance(master.receive(), Heartbeat)
    master.send(Shutdown(is_done=False, reason="another worker was lost"))
    assert master.ended()[0] == 4


def test_a_worker_registers_again_with_a_master_that_came_back(master: Master):
    master.start()
    master.restart()
    master.send(WELCOME)
    master.send(request(1))
    assert master.reply().id == 1
    master.send(Shutdown(is_done=True, reason="the run is over"))
    assert master.ended()[:2] == (0, "over\n")


def test_a_refusal_is_a_config_error(master: Master):
    master.start()
    master.send(Refuse(reason="the run has its 1 workers already"))
    code, out, _ = master.ended()
    assert code == 0
    assert out.startswith(f"ConfigError --master = '{master.address}': the master refused this worker: the run has its")


def test_a_shutdown_before_the_welcome_is_a_run_error(master: Master):
    master.start()
    master.send(Shutdown(is_done=False, reason="another worker was lost"), linked=False)
    assert master.ended()[:2] == (0, "RunError the master is shutting down: another worker was lost\n")


def test_a_master_that_does_not_answer_is_named(master: Master):
    master.start("impatient")
    code, out, _ = master.ended()
    assert code == 0
    assert out.startswith(f"RunError no master answered at {master.address} within 0.1 s (run.deadlines.register_s)")


def test_a_lost_master_ends_the_process(master: Master):
    master.start("busy")
    master.send(WELCOME)
    assert isinstance(master.receive(), Heartbeat)
    master.router.close(linger=0)
    code, _, err = master.ended()
    assert code == 3
    assert "the master closed its connection, or fell silent, and did not come back: this worker ends" in err


def test_a_late_welcome_of_an_older_epoch_changes_nothing(master: Master):
    master.start()
    master.send(WELCOME)
    master.send(replace(WELCOME, epoch=EPOCH - 1), linked=False)
    master.send(replace(WELCOME, run="other", epoch=EPOCH + 1), linked=False)
    master.send(request(1))
    assert master.reply().id == 1


def test_what_expired_on_its_way_is_not_begun(master: Master):
    """This master's envelopes say that its clock stands at 0."""
    master.start()
    master.send(WELCOME)
    master.send(Ping())
    master.send(replace(request(1), submitted_s=-61.0))
    master.send(replace(request(2), submitted_s=-50.0))
    assert master.reply().id == 2


def test_a_silent_request_is_begun_however_late_and_only_its_failure_is_told(master: Master):
    master.start()
    master.send(WELCOME)
    master.send(Ping())
    master.send(replace(request(1), is_silent=True))
    master.send(replace(request(91), submitted_s=-61.0, is_silent=True))
    reply = master.reply()
    assert (reply.id, reply.is_unasked) == (91, True)
