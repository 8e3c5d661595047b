import logging

import pytest
from trainmaster.system.rpc.drops import INTERVAL_S, Drops


def test_a_flood_is_one_line_in_a_while(caplog: pytest.LogCaptureFixture):
    drops = Drops(logging.getLogger("here"))
    assert drops.last is None
    for at in range(1000):
        drops.note(f"reason {at}", INTERVAL_S * at / 1000)
    drops.note("the end", INTERVAL_S)
    assert [record.getMessage() for record in caplog.records] == [
        "dropped a message: reason 0",
        "dropped a message: the end (999 more before it)",
    ]
    assert drops.last == "the end"
