"""How much there is to do in an attempt, by number or by time, and on which data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import MessageError
from edge_agent.quota import MAX_QUOTA, stream_position
from tests.attempt_desk import Desk, batches


def test_the_answer_to_the_join_says_how_many_batches_there_are() -> None:
    desk = Desk(quota=4, window=9, receipt={"quota": 2, "credits": 9})
    assert batches(desk.produce()) == [0, 1]
    desk.answer(0)
    desk.answer(1)
    assert desk.attempt.complete


def test_a_quota_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(MessageError):
        Desk(receipt={"quota": MAX_QUOTA + 1})


def test_another_leg_goes_on_with_the_numbers_and_has_data_of_its_own() -> None:
    first = Desk(quota=2, window=9, receipt={"credits": 9})
    second = Desk(
        quota=2,
        window=9,
        receipt={"credits": 9, "quota": 4, "next_batch": 2, "applied": [(0, 1)]},
    )
    later = Desk(number=2, quota=2, window=9, receipt={"credits": 9})
    assert [batches(desk.produce()) for desk in (first, second, later)] == [[0, 1], [2, 3], [0, 1]]
    seen = first.stream.asked + second.stream.asked + later.stream.asked
    assert len(set(seen)) == 6
    for batch in (2, 3):
        second.answer(batch)
    assert second.attempt.complete
    assert (second.report.produced, second.report.applied) == (4, 4)


@given(
    quota=st.integers(1, 70_000),
    one=st.tuples(st.integers(1, 10**6), st.integers(0, MAX_QUOTA)),
    other=st.tuples(st.integers(1, 10**6), st.integers(0, MAX_QUOTA)),
)
def test_no_two_batches_share_their_data(
    quota: int, one: tuple[int, int], other: tuple[int, int]
) -> None:
    position = stream_position(*one, quota)
    assert 0 <= position < 2**62
    assert (position == stream_position(*other, quota)) == (one == other)
    if one[1] < quota:
        assert position == (one[0] - 1) * quota + one[1]


def test_a_round_by_time_ends_with_the_time() -> None:
    desk = Desk(quota=100, announced={"train_s": 30.0})
    made = 0
    while desk.clock.now < 1030:
        assert desk.attempt.deadline is not None
        assert desk.attempt.deadline <= 1030
        for message in desk.produce():
            desk.answer(message.batch)
            made += 1
        desk.clock.advance(4)
        desk.attempt.tick()
    assert desk.produce() == []
    for batch in range(made, desk.attempt.produced):
        desk.answer(batch)
    assert desk.attempt.complete
    assert desk.report.produced == made > 8


@pytest.mark.parametrize("start", [0, 3])
def test_a_round_by_time_has_at_least_one_batch(start: int) -> None:
    desk = Desk(quota=8, window=4, announced={"train_s": 5.0}, receipt={"next_batch": start})
    desk.clock.advance(60)
    assert not desk.attempt.complete
    assert batches(desk.produce()) == [start]
    desk.answer(start)
    assert desk.attempt.complete


def test_a_round_by_time_ends_with_the_quota_if_that_is_sooner() -> None:
    desk = Desk(quota=2, announced={"train_s": 1e6})
    for message in desk.produce():
        desk.answer(message.batch)
    assert desk.attempt.complete


def test_an_attempt_that_was_joined_at_its_end_is_complete_whatever_the_time() -> None:
    assert Desk(quota=4, announced={"train_s": 9.0}, receipt={"next_batch": 4}).attempt.complete
