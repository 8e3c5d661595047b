import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from trainmaster.api.errors import ConfigError, RunError
from trainmaster.system.control import Control
from trainmaster.system.rpc.inquiries import Inquire, Order, RunStatus
from trainmaster.system.rpc.server import Server
from trainmaster.system.service.claims import claim
from trainmaster.system.service.health import Latest
from trainmaster.system.service.inquiry import ask, way_to
from trainmaster.system.service.lifecycle import Life, State

ended: list[str] = []


def with_control(directory: Path, scenario: Callable[[Control, str], Awaitable[None]]) -> None:
    async def main() -> None:
        server = Server(f"ipc://{directory}/s", "first", 1, 2, "digest", 10.0, directory)
        with claim(directory):
            async with asyncio.timeout(5), server:
                life = Life(directory, "first", server.address)
                life.enter(State.READY)
                await scenario(Control(life, server, 2, lambda: ended.append("now")), server.address)

    ended.clear()
    asyncio.run(main())


def order(control: Control, what: Order) -> RunStatus:
    return control.answer(Inquire(order=what))


def test_a_pause_lasts_until_it_is_over(tmp_path: Path):
    async def scenario(control: Control, _: str) -> None:
        assert await control.begin(1, 10)
        assert order(control, Order.PAUSE).state == "running", "the step that is under way goes on"
        beginning = asyncio.create_task(control.begin(2, 10))
        await asyncio.sleep(0)
        assert order(control, Order.STATUS).state == "paused"
        assert not beginning.done()
        order(control, Order.UNPAUSE)
        assert await beginning
        found = order(control, Order.STATUS)
        assert (found.state, found.step, found.num_steps) == ("running", 2, 10)

    with_control(tmp_path, scenario)


def test_a_stop_ends_a_pause_too(tmp_path: Path):
    async def scenario(control: Control, _: str) -> None:
        order(control, Order.PAUSE)
        beginning = asyncio.create_task(control.begin(1, 10))
        await asyncio.sleep(0)
        order(control, Order.STOP)
        assert not await beginning
        assert not await control.begin(1, 10)
        assert ended == []
        order(control, Order.STOP_NOW)
        assert ended == ["now"]

    with_control(tmp_path, scenario)


def test_a_status_over_the_wire(tmp_path: Path):
    async def scenario(control: Control, address: str) -> None:
        await control.begin(3, 10)
        control.finished({"train/loss": float("nan"), "seconds/step": 0.5, "performance/tokens": 7})
        found = await asyncio.to_thread(ask, address, Order.STATUS)
        assert (found.run, found.state, found.step, found.num_workers, found.workers) == ("first", "running", 3, 2, ())
        assert found.values["seconds/step"] == 0.5
        assert str(found.values["train/loss"]) == "nan"
        assert way_to(str(tmp_path), Path("runs")) == (address, None)
        assert way_to(tmp_path.name, tmp_path.parent) == (address, None)
        assert way_to(address, Path("runs")) == (address, None)

    with_control(tmp_path, scenario)


def test_a_report_has_what_only_the_server_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Server, "num_refused", 3)

    async def scenario(control: Control, _: str) -> None:
        latest = Latest()
        reporting = asyncio.create_task(control.report(latest))
        await asyncio.sleep(0)
        reporting.cancel()
        found = {metric.name: [sample.value for sample in metric.samples] for metric in latest().metrics}
        assert found["trainmaster_connections_refused_total"] == [3]

    with_control(tmp_path, scenario)


def test_who_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(RunError, match=r"no master answered at ipc:.* within 0\.1 s"):
        ask(f"ipc://{tmp_path}/nobody", Order.STATUS, answer_s=0.1)
    with pytest.raises(ConfigError, match=r"RUN = 'first': no run by that name is in .*`trainmaster ps`"):
        way_to("first", tmp_path)
    (tmp_path / "first").mkdir()
    Life(tmp_path / "first", "first", "")
    with pytest.raises(ConfigError, match=r"RUN = 'first': it is lost\. Look into .*logs"):
        way_to("first", tmp_path)
