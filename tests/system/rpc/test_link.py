import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.system.rpc.link import MAX_RESEND_S, RESEND_S, WINDOW, Link, MasterClock


def test_messages_are_numbered_and_kept_until_they_are_acknowledged():
    link: Link[str] = Link()
    assert link.is_idle
    link.post("a")
    link.post("b")
    assert link.due(0.0) == [(1, "a"), (2, "b")]
    assert link.due(RESEND_S - 0.1) == []
    link.acknowledge(1)
    assert link.due(RESEND_S) == [(2, "b")]
    assert not link.is_idle
    link.acknowledge(2)
    assert link.is_idle
    assert link.due(1e9) == []


def test_it_sends_again_at_growing_intervals():
    link: Link[str] = Link()
    link.post("a")
    link.due(0.0)
    times = [step / 10 for step in range(1, 1000) if link.due(step / 10)]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert gaps[:4] == pytest.approx([RESEND_S, 2 * RESEND_S, 4 * RESEND_S, 8 * RESEND_S])
    assert max(gaps) == pytest.approx(MAX_RESEND_S)


def test_where_acknowledgements_are_seldom_it_sends_again_more_seldom():
    link: Link[str] = Link(seldomness=8)
    link.post("a")
    link.due(0.0)
    assert link.due(8 * RESEND_S - 0.1) == []
    assert link.due(8 * RESEND_S) == [(1, "a")]
    link.hurry()
    assert link.due(8 * RESEND_S) == [(1, "a")], "a connection that breaks tells more than the time"


def test_after_a_reconnection_all_that_was_under_way_is_due():
    link: Link[str] = Link()
    link.post("a")
    link.due(0.0)
    link.hurry()
    assert link.due(0.1) == [(1, "a")]


def test_no_more_than_the_window_is_under_way():
    link: Link[int] = Link()
    for number in range(2 * WINDOW):
        link.post(number)
    assert len(link.due(0.0)) == WINDOW
    assert link.due(0.1) == []
    link.acknowledge(3)
    assert [order for order, _ in link.due(0.2)] == [WINDOW + 1, WINDOW + 2, WINDOW + 3]


def test_delivery_is_in_order_and_once():
    link: Link[str] = Link()
    assert link.accept(2, "b") == []
    assert link.accept(1, "a") == ["a", "b"]
    assert link.accept(1, "a") == []
    assert link.accept(2, "b") == []
    assert link.received == 2


@pytest.mark.parametrize("order", [-1, 0, WINDOW + 1, 2**63])
def test_what_is_outside_of_the_window_is_dropped(order: int):
    link: Link[str] = Link()
    assert link.accept(order, "x") == []
    assert link.accept(1, "a") == ["a"]
    assert link.received == 1


@given(st.integers(0, 2**32), st.integers(1, 600))
def test_over_any_transport_each_message_arrives_once_and_in_order(seed: int, count: int):
    draw = random.Random(seed)
    sender: Link[int] = Link()
    receiver: Link[int] = Link()
    under_way: list[tuple[int, int]] = []
    arrived: list[int] = []
    acknowledgements = [0]
    posted, now_s = 0, 0.0
    while not (posted == count and sender.is_idle):
        now_s += 0.5
        assert now_s < 1e5, "it comes to an end"
        for _ in range(min(draw.randrange(100), count - posted)):
            sender.post(posted)
            posted += 1
        for message in sender.due(now_s):
            under_way += [message] * draw.choice((0, 1, 1, 1, 2))  # lost, or repeated
        draw.shuffle(under_way)
        for _ in range(draw.randrange(len(under_way) + 1)):
            arrived += receiver.accept(*under_way.pop())
            acknowledgements.append(receiver.received)
        sender.acknowledge(draw.choice(acknowledgements))  # late, or out of order
        if draw.random() < 0.5:
            sender.acknowledge(receiver.received)
    assert arrived == list(range(count))


# -- the master's clock -----------------------------------------------------------------------------------------------


def test_the_quickest_message_tells_how_the_clocks_differ():
    clock = MasterClock()
    for sent_s, took_s in ((100.0, 0.3), (101.0, 0.001), (102.0, 7.0)):
        clock.note(sent_s, sent_s + 40.0 + took_s)
    assert clock.age(100.0, 145.0) == pytest.approx(5.0, abs=0.002)


@given(st.floats(-1e-4, 1e-4), st.lists(st.floats(0.0, 0.2), min_size=300, max_size=600))
def test_clocks_may_drift(drift: float, delays: list[float]):
    clock, pause_s = MasterClock(), 0.25
    for at, delay in enumerate([*delays, *[0.0] * 10]):
        sent_s = at * pause_s
        clock.note(sent_s, sent_s * (1 + drift) + delay)
    now_s = sent_s * (1 + drift)
    assert clock.age(sent_s, now_s) == pytest.approx(0.0, abs=256 * pause_s * abs(drift) + 1e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=700))
def test_only_the_last_messages_count(differences: list[float]):
    clock = MasterClock()
    for difference in differences:
        clock.note(0.0, difference)
    assert clock.age(0.0, 0.0) == -min(differences[-256:])


@pytest.mark.parametrize("absurd", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_none_says_nothing(absurd: float):
    clock = MasterClock()
    clock.note(absurd, 1.0)
    clock.note(100.0, 140.0)
    assert clock.age(100.0, 145.0) == 5.0
