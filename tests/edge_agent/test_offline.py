"""Training on while nobody can be reached, without feedback."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.envelopes import up
from broker.messages import Coordinator, Request
from broker.training_messages import Activations, DeviceParameters, Report
from edge_agent.offline import Kept, OfflineLimits, OfflineQueue
from edge_agent.phases import Phase
from tests.attempt_desk import Desk, balanced, batches
from tests.fake_device import (
    Harness,
    every,
    make_parameters,
    only,
    receipt_of,
)
from tests.tiny import Clock, make_assignment, make_hello, make_round

# -- the queue ------------------------------------------------------------------------------------


def kept(batch: int, made: float) -> Kept:
    return Kept(batch, up("d1", make_hello()), made)


@given(
    limit=st.integers(1, 5),
    events=st.lists(
        st.one_of(st.just("keep"), st.just("take"), st.floats(0, 4), st.sets(st.integers(0, 9)))
    ),
)
def test_the_newest_win_and_what_is_too_old_goes(
    limit: int, events: list[str | float | set[int]]
) -> None:
    clock = Clock()
    queue = OfflineQueue(OfflineLimits(batches=limit, expiry_s=10.0), clock)
    model: dict[int, float] = {}
    number = 0
    for event in events:
        if event == "keep":
            model[number] = clock.now
            gone = queue.keep(kept(number, clock.now))
            assert gone == sorted(model)[: len(model) - limit] if len(model) > limit else not gone
            number += 1
        elif event == "take":
            if not model:
                continue
            assert queue.take().batch == min(model)
            gone = [min(model)]
        elif isinstance(event, set):
            queue.drop(event)
            gone = sorted(event)
        else:
            assert isinstance(event, float)
            clock.advance(event)
            gone = queue.expire()
            assert gone == [batch for batch, made in model.items() if clock.now >= made + 10]
        for batch in gone:
            model.pop(batch, None)
        assert len(queue) == len(model) <= limit
        assert queue.deadline == min((made + 10 for made in model.values()), default=None)


# -- an attempt -----------------------------------------------------------------------------------


def offline_desk(limit: int = 3, **changes: Any) -> Desk:
    fields: dict[str, Any] = {
        "feedback": "none",
        "quota": 10,
        "receipt": {"credits": 2},
        "offline": OfflineLimits(batches=limit, expiry_s=60.0),
    }
    return Desk(**(fields | changes))


def test_it_learns_on_within_its_quota_and_keeps_the_newest() -> None:
    desk = offline_desk()
    desk.interrupt()
    assert desk.produce() == []
    assert desk.learner.learnt == [(batch, False) for batch in range(10)]
    report = desk.report
    assert (report.produced, report.discarded, report.expired) == (10, {"superseded": 7}, 3)
    assert not desk.attempt.complete


def test_on_return_the_rest_goes_out_oldest_first_within_the_credits() -> None:
    desk = offline_desk()
    desk.interrupt()
    desk.produce()
    desk.online = True
    assert batches(desk.produce()) == [7, 8]
    desk.receipt(applied=[(7, 7)], credits=2)
    assert batches(desk.produce()) == [9]
    desk.receipt(applied=[(8, 9)], credits=2)
    assert desk.attempt.complete
    assert desk.report.applied == 3


def test_what_was_out_waits_with_the_rest_and_is_said_again() -> None:
    desk = offline_desk(limit=8)
    assert batches(desk.produce()) == [0, 1]
    desk.interrupt()
    desk.clock.advance(30)
    desk.attempt.tick()
    desk.produce()
    assert desk.report.timeouts == 0
    desk.online = True
    assert batches(desk.produce()) == [2, 3], "eight are kept: 0 and 1 had to go"
    desk.receipt(applied=[(0, 3)], credits=2)
    assert desk.report.discarded == {}, "they had arrived after all"
    assert balanced(desk.report)


def test_a_receipt_for_what_is_kept_spares_sending_it() -> None:
    desk = offline_desk(limit=8, quota=4)
    desk.produce()
    desk.interrupt()
    desk.online = True
    desk.receipt(applied=[(0, 0)], credits=2)
    assert batches(desk.produce()) == [1, 2]


def test_what_waits_too_long_is_discarded() -> None:
    desk = offline_desk(quota=2)
    desk.interrupt()
    desk.produce()
    assert desk.attempt.deadline == desk.clock.now + 60
    desk.clock.advance(60)
    desk.attempt.tick()
    assert desk.report.discarded == {"expired_offline": 2}
    assert desk.attempt.complete


def test_a_round_by_time_ends_offline_too() -> None:
    desk = offline_desk(quota=1000, announced={"train_s": 30.0})
    desk.interrupt()
    while desk.attempt.can_produce(online=False):
        desk.attempt.produce(online=False)
        desk.clock.advance(3)
    assert desk.attempt.produced == 10


def test_with_feedback_nothing_is_made_and_what_is_out_is_awaited() -> None:
    desk = offline_desk(feedback="gradient", window=2)
    desk.produce()
    desk.interrupt()
    assert not desk.attempt.can_produce(online=False)
    assert (desk.attempt.out, desk.attempt.kept) == (2, 0)


def test_a_device_that_keeps_nothing_makes_nothing() -> None:
    desk = offline_desk(limit=0)
    desk.interrupt()
    assert not desk.attempt.can_produce(online=False)


# -- the device -----------------------------------------------------------------------------------

LIMITS = OfflineLimits(batches=2, expiry_s=100.0)


def offline_device(**assignment: Any) -> Harness:
    device = Harness(offline=LIMITS)
    device.join(make_assignment(feedback="none", **assignment))
    return device


@pytest.mark.parametrize("gone", ["broker", "coordinator"])
def test_a_device_without_feedback_works_on_alone_and_sends_the_rest_later(gone: str) -> None:
    device = offline_device(quota=6)
    device.hear(Coordinator(state="online", boot="first"))
    first = every(Activations, device.work())
    device.hear(receipt_of(make_round(), applied=[(0, 1)]))
    if gone == "broker":
        device.disconnect()
    else:
        device.hear(Coordinator(state="offline", boot="first"))
    assert not every(Activations, device.work())
    assert device.learner.learnt == [(batch, False) for batch in range(6)]
    assert not every(Activations, device.wait(50))

    if gone == "broker":
        device.connect()
    else:
        device.hear(Coordinator(state="online", boot="first"))
    rest = every(Activations, device.work())
    assert [m.batch for m in first + rest] == [0, 1, 4, 5]
    device.hear(receipt_of(make_round(), applied=[(4, 5)]))
    upload = only(DeviceParameters, device.work())
    assert upload.produced == 6
    final = receipt_of(
        make_round(), applied=[(0, 1), (4, 5)], complete=True, final=True, next_batch=6
    )
    report = only(Report, device.hear(final))
    assert (report.produced, report.applied, report.expired) == (6, 4, 0)
    assert report.discarded == {"superseded": 2}


def test_what_was_kept_for_a_round_that_is_over_has_expired() -> None:
    device = offline_device()
    device.disconnect()
    device.work()
    device.connect()
    said = device.hear(make_round(2, version=1))
    report = only(Report, said)
    assert (report.produced, report.applied, report.expired) == (4, 0, 2)
    assert report.discarded == {"superseded": 2}
    device.hear(make_parameters(1), receipt_of(make_round(2), complete=True))
    made = every(Activations, device.work())
    assert {m.stamp for m in made} == {make_round(2).stamp}


def test_a_device_that_wakes_a_week_later_first_takes_the_current_parameters() -> None:
    device = Harness()
    device.join()
    device.work()
    device.disconnect()
    device.wait(3600)
    device.clock.advance(7 * 86_400)
    device.connect()
    device.wait(1)
    week_later = make_round(1000, version=999)
    said = device.hear(Coordinator(state="online", boot="another"), week_later)
    assert only(Request, said).what == "parameters"
    assert device.core.phase is Phase.FETCHING
    for _ in range(5):
        said = device.work() + device.wait(40)
        assert not every(Activations, said)
        assert not every(DeviceParameters, said)
    device.hear(make_parameters(998))
    assert device.core.phase is Phase.FETCHING
    device.hear(make_parameters(999, 77.0), receipt_of(week_later, complete=True))
    made = every(Activations, device.work())
    assert {(m.stamp, m.version) for m in made} == {(week_later.stamp, 999)}
    assert device.learner.start.state["weight"] == [77.0]


def test_a_device_that_was_off_for_a_week_holds_its_version_to_be_old() -> None:
    first = Harness()
    first.join()
    second = Harness(snapshots=first.snapshots)
    second.connect()
    said = second.hear(make_assignment(), make_round(1000, version=999))
    assert only(Request, said).what == "parameters"
    assert not every(Activations, second.work())
