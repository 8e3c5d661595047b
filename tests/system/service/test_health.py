import contextlib
import http.client
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from trainmaster.api.errors import ConfigError
from trainmaster.system.rpc.inquiries import RunStatus, WorkerState, WorkerStatus
from trainmaster.system.rpc.messages import Lane
from trainmaster.system.service import health as module
from trainmaster.system.service.figures import (
    AtRequest,
    Executed,
    WorkerFigures,
    health_of,
    health_of_worker,
    metrics_of,
    metrics_of_worker,
)
from trainmaster.system.service.health import (
    Health,
    HealthServer,
    Kind,
    Latest,
    Metric,
    Sample,
    prometheus_text,
)

GOOD = Health(is_well=True, is_ready=True)
WAITS = Health(is_well=True, is_ready=False, reason="starting for 3 s")
BAD = Health(is_well=False, is_ready=False, reason="failed for 2 s")


class Asked:
    """A server on a free port of the loopback address, and one who asks it."""

    def __init__(self, server: HealthServer) -> None:
        self.server = server
        self.port = int(server.address.rpartition(":")[2])

    def __call__(self, path: str, method: str = "GET", body: bytes = b"") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body)
        response = connection.getresponse()
        self.text = response.read().decode()
        connection.close()
        return response

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@pytest.fixture(autouse=True)
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SWEEP_S", 0.02)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[], Health]], Asked]]:
    with contextlib.ExitStack() as stack:
        yield lambda snapshot: Asked(stack.enter_context(HealthServer("127.0.0.1", 0, snapshot)))


def status(**changes: object) -> RunStatus:
    given: dict[str, object] = {
        "run": "first",
        "state": "running",
        "state_s": 4.0,
        "up_s": 60.5,
        "epoch": 1763700000000,
        "host": "node0",
        "pid": 7,
        "num_workers": 2,
        "workers": (
            WorkerStatus(rank=0, host="node0", pid=8, state="busy", call="train", call_s=2.5, heard_s=0.5),
            WorkerStatus(rank=1, host="node1", pid=9, state="unresponsive", heard_s=12.0),
        ),
        "step": 3,
        "num_steps": 10,
        "values": {"train/loss": math.nan, "seconds/step": 4.0, "seconds/train": 3.0, "seconds/train/save": 1.0},
    }
    return RunStatus(**(given | changes))  # type: ignore[arg-type]


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "path", "code", "text"),
    [
        (GOOD, "/healthz", 200, "ok\n"),
        (GOOD, "/readyz", 200, "ok\n"),
        (GOOD, "/readyz?verbose", 200, "ok\n"),
        (WAITS, "/healthz", 200, "ok\n"),
        (WAITS, "/readyz", 503, "starting for 3 s\n"),
        (BAD, "/healthz", 503, "failed for 2 s\n"),
        (BAD, "/readyz", 503, "failed for 2 s\n"),
        (Health(is_well=False, is_ready=True), "/readyz", 503, "it does not say why\n"),
    ],
)
def test_how_the_service_is(serve, health: Health, path: str, code: int, text: str):
    ask = serve(lambda: health)
    assert ask(path).status == code
    assert ask.text == text


def test_metrics_are_there_also_of_a_service_that_is_not_well(serve):
    ask = serve(lambda: health_of(status(state="failed")))
    response = ask("/metrics")
    assert (response.status, response.getheader("Content-Type")) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'trainmaster_step{run="first"} 3\n' in ask.text


def test_other_paths_are_not_found(serve):
    ask = serve(lambda: GOOD)
    assert [ask(path).status for path in ("/", "/metrics/", "/../etc/passwd")] == [404] * 3


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_there_is_nothing_to_write(serve, method: str):
    ask = serve(lambda: GOOD)
    response = ask("/healthz", method, body=b"x" * 10_000)
    assert (response.status, response.getheader("Allow")) == (405, "GET, HEAD")


def test_a_head_is_a_get_without_its_text(serve):
    ask = serve(lambda: BAD)
    response = ask("/healthz", "HEAD")
    assert (response.status, response.getheader("Content-Length"), ask.text) == (503, "15", "")


def test_other_methods_are_unknown(serve):
    assert serve(lambda: GOOD)("/healthz", "BREW").status == 501


def test_a_snapshot_that_raises_is_not_well(serve, caplog: pytest.LogCaptureFixture):
    def fail() -> Health:
        raise RuntimeError("dictionary changed size during iteration")

    ask = serve(fail)
    assert ask("/healthz").status == 503
    assert ask.text == "cannot say how it is: dictionary changed size during iteration\n"
    assert "the service cannot say how it is" in caplog.text


def test_requests_are_not_logged(serve, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    ask = serve(lambda: GOOD)
    for path in ("/healthz", "/nothing"):
        ask(path)
    with ask.connect() as raw:
        raw.sendall(b"no HTTP at all\r\n\r\n")
        assert b"Bad request" in raw.recv(4096)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# -- connections ------------------------------------------------------------------------------------------------------


def ended(connection: socket.socket) -> bool:
    """Waits until the other side closes."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return True


def test_an_idle_connection_is_closed(serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_CONNECTION_S", 0.1)
    ask = serve(lambda: GOOD)
    with ask.connect() as idle:
        assert ended(idle)


def test_a_request_that_trickles_in_is_given_up(serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_CONNECTION_S", 0.2)
    ask = serve(lambda: GOOD)
    is_over = threading.Event()
    with ask.connect() as slow:

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not is_over.wait(0.02):
                    slow.sendall(b"G")

        sender = threading.Thread(target=trickle)
        sender.start()
        assert ended(slow)
        is_over.set()
        sender.join()


def test_idle_connections_keep_nobody_out(serve):
    ask = serve(lambda: GOOD)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(ask.connect()) for _ in range(100)]
        assert ask("/healthz").status == 200
        assert ended(idle[0])
        assert sum("process_request" in thread.name for thread in threading.enumerate()) <= 2 * module._MAX_CONNECTIONS


def test_closing_frees_the_port_and_ends_connections():
    server = HealthServer("127.0.0.1", 0, lambda: GOOD)
    ask = Asked(server)
    with ask.connect() as idle:
        server.close()
        assert ended(idle)
    with pytest.raises(ConnectionRefusedError):
        ask.connect()
    HealthServer("127.0.0.1", ask.port, lambda: GOOD).close()
    server.close()


def test_a_port_that_is_taken_is_named(serve):
    port = serve(lambda: GOOD).port
    with pytest.raises(
        ConfigError, match=rf"--health-port = {port}: the port is taken on 127\.0\.0\.1\. Choose another"
    ):
        HealthServer("127.0.0.1", port, lambda: GOOD)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_named(port: int):
    with pytest.raises(ConfigError, match=rf"--health-port = {port}: must be a port"):
        HealthServer("127.0.0.1", port, lambda: GOOD)


def test_a_host_that_is_another_machine_is_named():
    with pytest.raises(ConfigError, match=r"--health-host = '192\.0\.2\.1': cannot be bound"):
        HealthServer("192.0.2.1", 0, lambda: GOOD)


def test_a_host_that_is_unknown_is_named(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConfigError, match=r"--health-host = 'hots': the host cannot be found: .*not known"):
        HealthServer("hots", 0, lambda: GOOD)


def test_version_six_of_the_protocol_too():
    try:
        server = HealthServer("::1", 0, lambda: GOOD)
    except ConfigError:
        pytest.skip("this machine has no ::1")
    with server, socket.create_connection(("::1", int(server.address.rpartition(":")[2])), timeout=10) as raw:
        assert server.address.startswith("http://[::1]:")
        raw.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.0 200")


def test_latest_is_what_was_posted_last():
    now_s = 100.0
    latest = Latest(stale_s=10, clock=lambda: now_s)
    assert latest() == Health(is_well=True, is_ready=False, reason="it starts")
    latest.post(health_of(status()))
    now_s = 110.0
    assert latest() == health_of(status())
    now_s = 111.0
    assert (latest().is_well, latest().is_ready) == (False, False)
    assert latest().reason == "it hangs: it has posted nothing for 11 s"
    assert latest().metrics == metrics_of(status())
    latest.post(GOOD)
    assert latest() == GOOD


def test_a_scrape_takes_milliseconds(serve):
    many = tuple(
        WorkerStatus(rank=rank, host=f"node{rank // 8}", pid=rank, state="idle", heard_s=0) for rank in range(64)
    )
    ask = serve(lambda: health_of(status(workers=many)))
    start_s = time.monotonic()
    for _ in range(5):
        ask("/metrics")
    assert time.monotonic() - start_s < 2.5


# -- metrics ----------------------------------------------------------------------------------------------------------

LABEL = r'[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*"'
LINE = re.compile(rf"(?P<name>[a-zA-Z_:][\w:]*)(?:\{{(?P<labels>{LABEL}(?:,{LABEL})*)\}})? (?P<value>\S+)")


def read(metrics: tuple[Metric, ...]) -> dict[str, float]:
    """Reads the text as Prometheus does: every sample follows the type of its metric, and none comes twice."""
    found: dict[str, float] = {}
    typed: list[str] = []
    for line in prometheus_text(metrics).splitlines():
        if line.startswith("# HELP "):
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in typed
            assert kind == ("counter" if name.endswith("_total") else "gauge")
            typed.append(name)
            continue
        match = LINE.fullmatch(line)
        assert match is not None, line
        assert match["name"] == typed[-1]
        key = f"{match['name'].removeprefix('trainmaster_')} {match['labels'] or ''}".strip()
        assert key not in found
        found[key] = float(match["value"])
    return found


def test_text_is_escaped_and_numbers_are_whole():
    values = (1.0, 0.1, 1e300, float(2**60), math.nan, math.inf, -math.inf, -2.0)
    metric = Metric(
        name="x_total",
        help="one\\two\nthree",
        kind=Kind.COUNTER,
        samples=(*(Sample(value=value) for value in values), Sample(value=0, labels={"a": 'q"u\\o\nte', "b": ""})),
    )
    assert prometheus_text([metric]).splitlines() == [
        r"# HELP x_total one\\two\nthree",
        "# TYPE x_total counter",
        *(f"x_total {value}" for value in ("1", "0.1", "1e+300", "1.152921504606847e+18", "NaN", "+Inf", "-Inf", "-2")),
        r'x_total{a="q\"u\\o\nte",b=""} 0',
    ]


@pytest.mark.parametrize("name", ["1x", "a-b", "a b", "", "ä"])
def test_a_name_that_is_none_is_refused(name: str):
    with pytest.raises(ConfigError, match=r"Metric\.name"):
        Metric(name=name, help="", samples=())
    with pytest.raises(ConfigError, match=r"Sample\.labels"):
        Sample(value=1, labels={name: "x"})


def test_a_masters_figures():
    found = read(metrics_of(status(), num_tokens=5000, num_waiting={0: 2, 1: 0}, num_refused=3))
    assert math.isnan(found.pop('last_step_value run="first",name="train/loss"'))
    first, second = 'run="first",worker="0",host="node0"', 'run="first",worker="1",host="node1"'
    states = ("starting", "ready", "running", "paused", "stopping", "stopped", "failed")
    assert found == {
        'up_seconds run="first"': 60.5,
        'state_seconds run="first"': 4,
        'epoch run="first"': 1763700000000,
        'workers run="first"': 2,
        'workers_needed run="first"': 2,
        'step run="first"': 3,
        'num_steps run="first"': 10,
        'tokens_total run="first"': 5000,
        'connections_refused_total run="first"': 3,
        **{f'state run="first",state="{state}"': state == "running" for state in states},
        'last_step_seconds run="first",part="step"': 4,
        'last_step_seconds run="first",part="train"': 3,
        'last_step_seconds run="first",part="train/save"': 1,
        **{f'worker_state {first},state="{state}"': state == "busy" for state in WorkerState},
        **{f'worker_state {second},state="{state}"': state == "unresponsive" for state in WorkerState},
        f"worker_heard_seconds {first}": 0.5,
        f"worker_heard_seconds {second}": 12,
        f"worker_call_seconds {first}": 2.5,
        f"worker_call_seconds {second}": 0,
        f"worker_waiting {first}": 2,
        f"worker_waiting {second}": 0,
    }


def test_what_a_status_does_not_say_is_left_out():
    names = {metric.name for metric in metrics_of(status())}
    unsaid = ("tokens_total", "worker_waiting", "connections_refused_total")
    assert not names & {f"trainmaster_{name}" for name in unsaid}


def test_workers_without_a_rank_are_told_apart():
    workers = tuple(WorkerStatus(rank=None, host="node0", pid=pid, state="idle", heard_s=0) for pid in (8, 9))
    found = read(metrics_of(status(state="starting", workers=workers), num_waiting={0: 1}))
    assert 'worker_heard_seconds run="first",worker="pid 9",host="node0"' in found
    assert not [name for name in found if name.startswith("worker_waiting")]


@pytest.mark.parametrize(
    ("state", "is_well", "is_ready", "reason"),
    [
        ("starting", True, False, "starting for 4 s, 2 of 2 workers are there"),
        ("ready", True, True, "ready for 4 s"),
        ("running", True, True, ""),
        ("paused", True, True, "paused for 4 s"),
        ("stopping", True, False, "stopping for 4 s"),
        ("stopped", True, False, "stopped for 4 s"),
        ("failed", False, False, "failed for 4 s"),
    ],
)
def test_a_masters_health(state: str, is_well: bool, is_ready: bool, reason: str):
    health = health_of(status(state=state), num_tokens=1)
    assert (health.is_well, health.is_ready, health.reason) == (is_well, is_ready, reason)
    assert health.metrics == metrics_of(status(state=state), num_tokens=1)


def test_a_workers_figures():
    figures = WorkerFigures(
        run="first",
        rank=1,
        epoch=12,
        is_connected=True,
        up_s=9,
        executed=(
            Executed(lane=Lane.COMPUTE, command="train_step", num_requests=3, num_failed=1, seconds=7.5),
            Executed(lane=Lane.TRANSFER, command="fetch", num_requests=4, seconds=0.5),
        ),
        executing=(AtRequest(lane=Lane.COMPUTE, command="train_step", seconds=1.5),),
        num_waiting={Lane.COMPUTE: 2, Lane.TRANSFER: 0},
    )
    own = 'run="first",worker="1"'
    train, fetch = f'{own},lane="compute",command="train_step"', f'{own},lane="transfer",command="fetch"'
    assert read(metrics_of_worker(figures)) == {
        f"up_seconds {own}": 9,
        f"connected {own}": 1,
        f"epoch {own}": 12,
        f"requests_total {train}": 3,
        f"requests_total {fetch}": 4,
        f"requests_failed_total {train}": 1,
        f"requests_failed_total {fetch}": 0,
        f"request_seconds_total {train}": 7.5,
        f"request_seconds_total {fetch}": 0.5,
        f"executing_seconds {train}": 1.5,
        f'waiting {own},lane="compute"': 2,
        f'waiting {own},lane="transfer"': 0,
    }
    assert health_of_worker(figures) == Health(is_well=True, is_ready=True, metrics=metrics_of_worker(figures))


@pytest.mark.parametrize(
    ("rank", "is_connected", "reason"),
    [(None, False, "hears no master"), (None, True, "waits for its master's welcome"), (0, False, "hears no master")],
)
def test_a_worker_without_its_master_is_well_but_not_ready(rank: int | None, is_connected: bool, reason: str):
    health = health_of_worker(WorkerFigures(rank=rank, is_connected=is_connected, up_s=1))
    assert (health.is_well, health.is_ready, health.reason) == (True, False, reason)
