"""A time limit of which the time without the broker is no part."""

from __future__ import annotations

from coordinator.deadline import Deadline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_is_over_after_its_seconds() -> None:
    clock = Clock()
    deadline = Deadline(clock)
    assert (deadline.running, deadline.due, deadline.left_s, deadline.overdue) == (
        False,
        None,
        None,
        False,
    )
    deadline.begin(10.0)
    clock.now = 109.0
    assert (deadline.running, deadline.due, deadline.left_s) == (True, 110.0, 1.0)
    assert not deadline.overdue
    clock.now = 110.0
    assert deadline.overdue
    deadline.end()
    assert not deadline.overdue


def test_it_stands_still_without_the_broker() -> None:
    clock = Clock()
    deadline = Deadline(clock)
    deadline.begin(10.0)
    clock.now = 104.0
    deadline.pause()
    clock.now = 150.0
    deadline.pause()
    assert deadline.running
    assert (deadline.due, deadline.left_s, deadline.overdue) == (None, None, False)
    clock.now = 204.0
    deadline.resume()
    assert (deadline.due, deadline.left_s) == (210.0, 6.0)
    clock.now = 205.0
    deadline.resume()
    assert deadline.due == 210.0, "only the time that the broker was away counts"
