from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import MessageError
from broker.training_messages import to_ranges
from edge_agent.meters import Meters
from edge_agent.offline import OfflineLimits
from tensors.codecs import parse_codec
from tests.attempt_desk import Desk, answer_to, balanced, batches, positions
from tests.fake_device import GRADIENT, FakeLearner


def test_it_begins_at_the_start_of_the_round() -> None:
    learner = FakeLearner()
    learner.weight = learner.weight + 5
    desk = Desk(learner=learner)
    assert desk.learner.weight == learner.start.state["weight"]
    assert desk.learner.rate == desk.round.learning_rate


def test_no_more_batches_are_out_than_the_window() -> None:
    desk = Desk(window=2, credits=4, receipt={"credits": 4})
    assert batches(desk.produce()) == [0, 1]
    desk.answer(0)
    assert batches(desk.produce()) == [2]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_an_answer_is_learnt_from_before_the_next_batch(window: int) -> None:
    desk = Desk(window=window, credits=4, receipt={"credits": 4})
    desk.produce()
    desk.attempt.gradient(answer_to(0))
    assert desk.produce() == []
    desk.attempt.learn()
    assert batches(desk.produce()) == [window]


def test_no_more_batches_are_out_than_the_credits() -> None:
    desk = Desk(window=4, receipt={"credits": 1})
    assert batches(desk.produce()) == [0]
    desk.receipt(credits=3)
    assert batches(desk.produce()) == [1, 2]


def test_it_is_complete_when_every_batch_of_the_quota_has_its_answer() -> None:
    desk = Desk(quota=3, window=4, receipt={"credits": 4})
    assert batches(desk.produce()) == [0, 1, 2]
    for batch in (1, 0):
        desk.answer(batch)
        assert not desk.attempt.complete
    desk.answer(2)
    assert desk.attempt.complete
    assert desk.learner.learnt == [(1, True), (0, True), (2, True)]
    assert desk.report.applied == desk.report.produced == 3


def test_every_attempt_at_a_round_sees_the_same_data_and_the_next_round_goes_on() -> None:
    fresh: dict[str, Any] = {"quota": 3, "window": 4, "receipt": {"credits": 4}}
    assert positions(Desk(number=1, **fresh).produce()) == [0, 1, 2]
    assert positions(Desk(number=1, **fresh).produce()) == [0, 1, 2]
    assert positions(Desk(number=2, **fresh).produce()) == [3, 4, 5]


def test_a_device_that_lost_its_memory_goes_on_behind_what_the_coordinator_saw() -> None:
    desk = Desk(
        quota=4,
        receipt={
            "next_batch": 3,
            "applied": [(0, 0)],
            "discarded": {"late": [(2, 2)]},
            "complete": True,
        },
    )
    made = desk.produce()
    assert batches(made) == [3]
    assert positions(made) == [3]
    desk.answer(3)
    assert desk.attempt.complete
    report = desk.report
    assert (report.produced, report.applied, report.expired) == (4, 2, 1)
    assert report.discarded == {"late": 1}


def test_everything_was_seen_already() -> None:
    desk = Desk(quota=4, receipt={"next_batch": 4, "applied": [(0, 3)]})
    assert desk.attempt.complete
    assert desk.report.applied == 4


def test_more_was_seen_than_the_quota() -> None:
    assert Desk(quota=4, receipt={"next_batch": 9}).attempt.produced == 4


@pytest.mark.parametrize("ranges", [[(3, 1)], [(0, 10_000)]])
def test_a_receipt_to_begin_with_that_makes_no_sense(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(MessageError):
        Desk(receipt={"applied": ranges})


# -- gradients ------------------------------------------------------------------------------------


def test_a_gradient_in_time_is_learnt_from_and_its_round_trip_noted() -> None:
    desk = Desk()
    desk.produce()
    desk.clock.advance(0.3)
    desk.answer(0)
    assert desk.learner.learnt == [(0, True)]
    trips = desk.meters.distribution("round_trip_seconds")
    assert sum(trips.counts) == 1
    assert trips.total == pytest.approx(0.3)
    bucket = trips.counts.index(1)
    assert trips.bounds[bucket - 1] < 0.3 <= trips.bounds[bucket]


def test_what_comes_of_batches_is_counted_on_from_attempt_to_attempt() -> None:
    desk = Desk(window=3, quota=3, receipt={"credits": 3})
    desk.produce()
    in_flight = Meters()
    desk.attempt.meter(in_flight)
    assert in_flight.gauges["batches_in_flight"] == {"": 3}
    assert in_flight.gauges["credits"] == {"": 3}
    desk.answer(0)
    desk.answer(1)
    desk.clock.advance(60)
    desk.attempt.tick()
    counters = desk.meters.counters
    assert counters["batches_made"] == {"": 3}
    assert counters["batches_lost"]["timeout"] == 1
    assert counters["activation_bytes"][""] == desk.report.activation_bytes > 0
    assert counters["activation_values"][""] == desk.report.activation_values > 0
    images = counters["exit_training_images"][""]
    assert counters["exit_training_loss"][""] / images == desk.report.exit_loss
    took = desk.meters.histograms["training_seconds"]
    parts = {part: sum(found.counts) for part, found in took.items()}
    assert parts == {"forward": 3, "encode": 3, "decode": 2, "backward": 3}
    stale = desk.meters.distribution("gradient_staleness_batches")
    assert stale.counts[:3] == [1, 1, 0]


def test_a_gradient_that_is_too_late_is_counted_and_not_learnt_from() -> None:
    desk = Desk(gradient_timeout_s=10.0)
    desk.produce()
    desk.clock.advance(10)
    desk.attempt.tick()
    assert desk.learner.learnt == [(0, False), (1, False)]
    desk.answer(0)
    assert desk.learner.learnt == [(0, False), (1, False)]
    report = desk.report
    assert (report.timeouts, report.late_gradients) == (2, 1)
    assert (report.applied, report.expired) == (1, 1), "the coordinator did train on batch 0"


def test_nothing_times_out_before_its_time() -> None:
    desk = Desk(gradient_timeout_s=10.0)
    desk.produce()
    assert desk.attempt.deadline == desk.clock.now + 10
    desk.clock.advance(9.9)
    desk.attempt.tick()
    assert desk.learner.learnt == []


def test_a_gradient_that_comes_twice_is_learnt_from_once() -> None:
    desk = Desk()
    desk.produce()
    desk.answer(0)
    desk.answer(0)
    assert desk.learner.learnt == [(0, True)]
    assert desk.report.applied == 1
    assert desk.report.late_gradients == 0


def test_a_late_gradient_that_comes_twice_is_counted_once() -> None:
    desk = Desk(gradient_timeout_s=10.0)
    desk.produce()
    desk.clock.advance(10)
    desk.attempt.tick()
    desk.answer(0)
    desk.answer(0)
    assert desk.report.late_gradients == 1


def test_a_gradient_of_a_batch_that_was_discarded_is_not_late() -> None:
    desk = Desk()
    desk.produce()
    desk.receipt(discarded={"wrong_shape": [(1, 1)]})
    desk.answer(1)
    assert desk.report.late_gradients == 0
    assert desk.learner.learnt == [(1, False)]


def test_a_gradient_for_a_batch_that_was_never_made() -> None:
    desk = Desk()
    desk.answer(3)
    assert desk.learner.learnt == []
    assert balanced(desk.report)


def test_a_gradient_that_is_rubbish_leaves_the_exit_to_learn_from() -> None:
    desk = Desk()
    desk.produce()
    desk.answer(0, b"rubbish")
    assert desk.learner.learnt == [(0, False)]
    assert batches(desk.produce()) == [2]


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    desk = Desk(quota=1)
    desk.produce()
    desk.answer(0, parse_codec("fp32").encode(np.full((8, 1), np.nan, np.float32)))
    assert desk.learner.learnt == []
    assert desk.attempt.complete
    assert balanced(desk.report)


# -- receipts -------------------------------------------------------------------------------------


def test_a_discarded_batch_is_learnt_from_at_the_exit_alone() -> None:
    desk = Desk()
    desk.produce()
    desk.receipt(discarded={"wrong_shape": [(1, 1)]})
    assert desk.learner.learnt == [(1, False)]
    assert batches(desk.produce()) == [2]
    assert desk.report.discarded == {"wrong_shape": 1}


def test_an_applied_batch_still_waits_for_its_gradient() -> None:
    desk = Desk()
    desk.produce()
    desk.receipt(applied=[(0, 1)])
    assert not desk.attempt.can_produce()
    desk.answer(0)
    assert desk.learner.learnt == [(0, True)]


def test_a_receipt_that_makes_no_sense_is_refused() -> None:
    desk = Desk()
    desk.produce()
    with pytest.raises(MessageError):
        desk.receipt(applied=[(0, 10_000)])
    assert balanced(desk.report)


def test_without_feedback_it_learns_at_once_and_receipts_make_room() -> None:
    desk = Desk(feedback="none", window=1, quota=4, receipt={"credits": 2})
    assert batches(desk.produce()) == [0, 1]
    assert desk.learner.learnt == [(0, False), (1, False)]
    desk.receipt(applied=[(0, 0)], discarded={"wrong_shape": [(1, 1)]})
    assert batches(desk.produce()) == [2, 3]
    desk.receipt(applied=[(2, 3)])
    assert desk.attempt.complete
    assert desk.learner.learnt == [(b, False) for b in range(4)]
    assert balanced(desk.report)


def test_without_feedback_a_gradient_changes_nothing() -> None:
    desk = Desk(feedback="none")
    desk.produce()
    desk.answer(0)
    assert desk.learner.learnt == [(0, False), (1, False)]
    assert desk.report.late_gradients == 0


def test_without_feedback_lost_receipts_do_not_stop_the_device() -> None:
    desk = Desk(feedback="none", quota=4, receipt={"credits": 2}, gradient_timeout_s=10.0)
    desk.produce()
    desk.clock.advance(10)
    desk.attempt.tick()
    assert batches(desk.produce()) == [2, 3]
    assert desk.learner.learnt == [(b, False) for b in range(4)]
    assert desk.report.timeouts == 2


# -- the rest -------------------------------------------------------------------------------------


def test_features_that_are_not_finite_are_not_sent() -> None:
    learner = FakeLearner()
    learner.poisoned = {0, 2}
    desk = Desk(learner=learner, activation_codec="int8", quota=3, window=4)
    assert batches(desk.produce()) == [1]
    desk.answer(1)
    assert desk.attempt.complete
    assert desk.learner.learnt == [(1, True)]
    assert not desk.learner.in_flight
    report = desk.report
    assert (report.applied, report.discarded, report.expired) == (1, {"not_finite": 2}, 0)


def test_what_is_said_again_is_the_same_and_has_a_new_deadline() -> None:
    desk = Desk(gradient_timeout_s=10.0)
    made = desk.produce()
    desk.clock.advance(8)
    again = [envelope.message for envelope in desk.attempt.unanswered()]
    assert again == made
    assert desk.attempt.deadline == desk.clock.now + 10


def test_the_report_has_the_means_of_the_exit() -> None:
    desk = Desk()
    assert desk.report.exit_loss is None
    desk.produce()
    desk.answer(0)
    desk.answer(1)
    assert desk.report.exit_loss == pytest.approx(0.5)
    assert desk.report.exit_accuracy == pytest.approx(3 / 8)


# -- the whole ------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 6)


@given(
    feedback=st.sampled_from(["gradient", "none"]),
    start=NUMBERS,
    events=st.lists(
        st.one_of(
            st.just(("produce",)),
            st.tuples(st.just("gradient"), NUMBERS, st.sampled_from([GRADIENT, b"", b"SFT"])),
            st.tuples(st.just("receipt"), st.sets(NUMBERS), st.sets(NUMBERS), st.integers(0, 4)),
            st.tuples(st.just("wait"), st.floats(0, 12)),
            st.sampled_from([("again",), ("offline",), ("online",)]),
        ),
        max_size=40,
    ),
    train_s=st.sampled_from([0.0, 5.0, 30.0]),
    kept=st.integers(0, 3),
)
def test_whatever_arrives_in_whatever_order_the_books_balance(
    feedback: str, start: int, events: list[tuple[Any, ...]], train_s: float, kept: int
) -> None:
    desk = Desk(
        feedback=feedback,
        quota=6,
        window=3,
        announced={"train_s": train_s},
        offline=OfflineLimits(batches=kept, expiry_s=8.0),
        receipt={"next_batch": start, "credits": 3},
        gradient_timeout_s=10.0,
    )
    before = desk.attempt.produced
    for event in events:
        match event:
            case ("produce",) if desk.attempt.can_produce(online=desk.online):
                desk.attempt.produce(online=desk.online)
            case ("gradient", batch, tensor):
                desk.answer(batch, tensor)
            case ("receipt", applied, discarded, credit):
                desk.receipt(
                    applied=[(b, b) for b in to_singles(applied)],
                    discarded={"late": [(b, b) for b in to_singles(discarded)]},
                    credits=credit,
                )
            case ("wait", seconds):
                desk.clock.advance(seconds)
                desk.attempt.tick()
            case ("again",):
                desk.attempt.unanswered()
            case ("offline",):
                desk.interrupt()
            case ("online",):
                desk.online = True
        assert balanced(desk.report)
        assert desk.attempt.out <= 4
        assert desk.attempt.kept <= kept
        assert not desk.attempt.complete or not desk.attempt.can_produce(online=desk.online)
        assert desk.report.produced == desk.attempt.produced <= 6
        learnt = [batch for batch, _ in desk.learner.learnt]
        assert len(set(learnt)) == len(learnt), "no batch is learnt from twice"
        assert len(learnt) + len(desk.learner.in_flight) == desk.attempt.produced - before


def to_singles(numbers: set[int]) -> list[int]:
    """As the coordinator names them: in order, and below the quota."""
    return [first for first, _ in to_ranges(n * 2 for n in numbers if n * 2 < 6)]


# -- the weight of the feedback -------------------------------------------------------------------


def test_the_round_says_how_much_the_feedback_weighs_or_the_assignment_does() -> None:
    assert Desk(feedback_weight=1.5).learner.feedback_weight == 1.5
    announced = {"feedback_weight": 0.25}
    assert Desk(announced=announced, feedback_weight=1.5).learner.feedback_weight == 0.25
    assert Desk(announced={"feedback_weight": 0.0}).learner.feedback_weight == 0
