from trainmaster.system.rpc.commands import Echo, HostStore
from trainmaster.system.rpc.messages import Lane, Request
from trainmaster.workers.tally import Tally


class FakeClient:
    """As much of a client as a tally asks."""

    current = None
    is_connected = True

    def num_waiting(self) -> dict[Lane, int]:
        return {Lane.COMPUTE: 2}


def request(command: Echo | HostStore) -> Request:
    return Request(run="first", epoch=1, id=1, lane=Lane.COMPUTE, deadline_s=1.0, submitted_s=0.0, command=command)


def test_what_was_executed_and_what_is_under_way():
    tally = Tally(FakeClient())  # type: ignore[arg-type]
    with tally.executing(request(Echo())):
        (at,) = tally.figures().executing
        assert (at.lane, at.command) == (Lane.COMPUTE, "echo")
    try:
        with tally.executing(request(Echo())):
            raise ValueError
    except ValueError:
        pass
    with tally.executing(request(HostStore())):
        pass
    figures = tally.figures()
    assert [(each.command, each.num_requests, each.num_failed) for each in figures.executed] == [
        ("echo", 2, 1),
        ("host_store", 1, 0),
    ]
    assert figures.executing == ()
    assert (figures.rank, figures.is_connected, figures.num_waiting) == (None, True, {Lane.COMPUTE: 2})
