"""Admission, turns and batches of questions (``coordinator.answering``)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.answering import Pace, Question, Refusal, Waiting
from tests.tiny import Clock

BATCH, QUEUE, LARGEST = 8, 20, 6
DEVICES = ("a", "b", "c", "d")


def waiting(clock: Clock, **changes: Any) -> Waiting:
    fields: dict[str, Any] = {"batch_images": BATCH, "queue_images": QUEUE, "wait_s": 0.5}
    return Waiting(**(fields | changes), clock=clock)


class Desk:
    """A queue and the questions that are put to it."""

    def __init__(self, **changes: Any) -> None:
        self.clock = Clock()
        self.waiting = waiting(self.clock, **changes)
        self.asked = 0

    def question(self, device: str = "a", images: int = 1, **changes: Any) -> Question:
        self.asked += 1
        fields: dict[str, Any] = {
            "device": device,
            "request": self.asked,
            "version": 1,
            "cut": 2,
            "images": images,
            "tensor": b"",
            "arrived": self.clock.now,
            "deadline": self.clock.now + changes.pop("within", 1000.0),
        }
        return Question(**(fields | changes))

    def ask(self, device: str = "a", images: int = 1, **changes: Any) -> list[tuple[int, str]]:
        return told(self.waiting.admit(self.question(device, images, **changes)))

    def take(self) -> list[int]:
        batch, refused = self.waiting.take()
        assert not refused
        return [question.request for question in batch]


def told(refused: list[Refusal]) -> list[tuple[int, str]]:
    return [(refusal.question.request, refusal.reason) for refusal in refused]


# -- when -----------------------------------------------------------------------------------------


def test_who_finds_the_machine_idle_waits_for_company_and_no_longer() -> None:
    desk = Desk()
    assert desk.waiting.due is None
    desk.ask("a")
    due = desk.waiting.due
    desk.clock.advance(0.3)
    desk.ask("b")
    assert desk.waiting.due == due == desk.clock.now + 0.5 - 0.3
    assert not desk.waiting.ready
    desk.clock.advance(0.2)
    assert desk.waiting.ready
    assert sorted(desk.take()) == [1, 2]
    assert desk.waiting.due is None


def test_a_full_batch_does_not_wait() -> None:
    desk = Desk()
    desk.ask("a", 4)
    assert not desk.waiting.ready
    desk.ask("b", 4)
    assert desk.waiting.ready


def test_what_is_left_over_does_not_wait_again() -> None:
    desk = Desk()
    for _ in range(3):
        desk.ask("a", 6)
    desk.take()
    assert desk.waiting.ready


# -- whose turn -----------------------------------------------------------------------------------


def test_of_one_device_the_newest_is_first() -> None:
    desk = Desk(batch_images=2)
    for _ in range(5):
        desk.ask("a")
    assert [desk.take() for _ in range(3)] == [[5, 4], [3, 2], [1]]


def test_a_device_that_floods_does_not_keep_others_waiting() -> None:
    desk = Desk(batch_images=2, queue_images=100)
    for _ in range(50):
        desk.ask("a")
    desk.take()
    desk.ask("b")
    assert 51 in desk.take()


def test_turns_are_counted_in_images() -> None:
    """One sends questions of six images, the other single ones: both get the same."""
    desk = Desk(batch_images=6, queue_images=1000)
    for _ in range(20):
        desk.ask("large", 6)
    for _ in range(100):
        desk.ask("small", 1)
    had: Counter[str] = Counter()
    for _ in range(20):
        batch, _ = desk.waiting.take()
        for question in batch:
            had[question.device] += question.images
    assert abs(had["large"] - had["small"]) <= 12


def test_a_batch_is_of_one_version_and_the_others_are_next() -> None:
    desk = Desk()
    desk.ask("a", version=1)
    desk.ask("b", version=2)
    desk.ask("c", version=1)
    first, second = desk.take(), desk.take()
    assert sorted([sorted(first), sorted(second)]) == [[1, 3], [2]]


def test_a_question_larger_than_a_batch_is_computed_alone() -> None:
    desk = Desk(batch_images=2)
    desk.ask("a", 6)
    desk.ask("b", 1)
    assert [desk.take(), desk.take()] == [[1], [2]]


# -- the bounds -----------------------------------------------------------------------------------


def test_in_a_full_queue_the_greediest_loses_its_oldest() -> None:
    desk = Desk()
    desk.ask("b", 4)
    for _ in range(4):
        desk.ask("a", 4)
    assert desk.waiting.images == QUEUE
    assert desk.ask("b", 4) == [(2, "overloaded")]
    assert desk.ask("a", 4) == [(3, "overloaded")]
    assert desk.waiting.images == QUEUE


def test_small_questions_do_not_shut_out_a_large_one() -> None:
    desk = Desk(queue_images=6)
    for device in "abcdef":
        desk.ask(device)
    assert [reason for _, reason in desk.ask("large", 5)] == ["overloaded"] * 5
    assert desk.waiting.images == 6


def test_what_is_too_late_is_not_computed() -> None:
    desk = Desk()
    desk.ask("a", within=0.2)
    desk.ask("a", within=5)
    desk.clock.advance(0.5)
    batch, refused = desk.waiting.take()
    assert [question.request for question in batch] == [2]
    assert told(refused) == [(1, "expired")]


def test_who_cannot_be_answered_in_time_is_refused_at_once() -> None:
    desk = Desk(queue_images=1000)
    desk.waiting.pace.measured(8, 0.8)
    for device in ("b", "c", "d"):
        assert desk.ask(device, 6, within=10) == []
    assert desk.ask("a", 1, within=1.8) == [(4, "overloaded")], "18 images are before it"
    assert desk.ask("a", 1, within=2) == []


def test_the_only_question_is_never_refused_for_the_pace() -> None:
    """Else one slow batch would end all answering: nothing would be measured any more."""
    desk = Desk()
    desk.waiting.pace.measured(1, 1000.0)
    assert desk.ask("a", 1, within=0.1) == []


def test_what_others_have_waiting_counts_only_as_far_as_it_is_before() -> None:
    desk = Desk(queue_images=1000)
    desk.waiting.pace.measured(8, 0.8)
    for _ in range(100):
        desk.ask("a", 1)
    assert desk.ask("b", 1, within=0.5) == [], "one of the hundred is before it at most"


# -- the pace -------------------------------------------------------------------------------------


def test_pace_is_unknown_at_first_then_proportional_then_a_line() -> None:
    pace = Pace()
    assert pace.seconds(100, batch=8) == 0
    pace.measured(4, 0.4)
    assert pace.seconds(8, batch=8) == pytest.approx(0.8)
    for _ in range(100):
        pace.measured(4, 0.4)
        pace.measured(8, 0.5)
    assert pace.seconds(8, batch=8) == pytest.approx(0.5)
    assert pace.seconds(24, batch=8) == pytest.approx(1.5)


def test_pace_follows_what_changes() -> None:
    pace = Pace()
    for _ in range(50):
        pace.measured(8, 10.0)
    for _ in range(100):
        pace.measured(8, 1.0)
    assert pace.seconds(8, batch=8) == pytest.approx(1.0, rel=1e-3)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(0, 1000)), min_size=1, max_size=30),
    st.integers(1, 1000),
)
def test_pace_is_never_negative_and_grows_with_the_images(
    measured: list[tuple[int, float]], images: int
) -> None:
    pace = Pace()
    for count, seconds in measured:
        pace.measured(count, seconds)
    assert 0 <= pace.seconds(images, batch=16) <= pace.seconds(images + 1, batch=16) + 1e-6


# -- everything at once ---------------------------------------------------------------------------


class Admission(RuleBasedStateMachine):
    """Whatever comes: nothing is lost or told twice, the bounds hold, nobody starves."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.open: dict[int, Question] = {}
        self.passed_over: Counter[str] = Counter()

    @rule(
        device=st.sampled_from(DEVICES),
        images=st.integers(1, LARGEST),
        version=st.integers(1, 2),
        within=st.floats(0.001, 5),
    )
    def ask(self, device: str, images: int, version: int, within: float) -> None:
        question = self.desk.question(device, images, version=version, within=within)
        before = self.desk.waiting.images
        self.open[question.request] = question
        refused = self.desk.waiting.admit(question)
        self._close(refused)
        if refused and question.request in self.open:
            assert before + images > QUEUE, "others make room only in a full queue"

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        self.desk.clock.advance(seconds)

    @rule(images=st.integers(1, BATCH), seconds=st.floats(0, 1))
    def measure(self, images: int, seconds: float) -> None:
        self.desk.waiting.pace.measured(images, seconds)

    @precondition(lambda self: self.desk.waiting.due is not None)
    @rule()
    def take(self) -> None:
        batch, refused = self.desk.waiting.take()
        now = self.desk.clock.now
        assert all(r.reason == "expired" and r.question.deadline <= now for r in refused)
        self._close(refused)
        assert len({question.version for question in batch}) <= 1
        assert sum(question.images for question in batch) <= BATCH or len(batch) == 1
        assert all(question.deadline > now for question in batch)
        waited = {question.device for question in self.open.values()}
        assert bool(batch) == bool(waited)
        for question in batch:
            newer = [
                other
                for other in self.open.values()
                if (other.device, other.version) == (question.device, question.version)
            ]
            assert question.request == max(other.request for other in newer), "newest first"
            del self.open[question.request]
        for device in DEVICES:
            served = any(question.device == device for question in batch)
            self.passed_over[device] = (
                0 if served or device not in waited else self.passed_over[device] + 1
            )
            # In every batch that passes it over, at least one of the others has more than it.
            assert self.passed_over[device] <= len(DEVICES) * LARGEST

    def _close(self, refused: list[Refusal]) -> None:
        for refusal in refused:
            del self.open[refusal.question.request]  # a KeyError: refused twice, or after an answer

    @invariant()
    def the_books_agree(self) -> None:
        assert len(self.desk.waiting) == len(self.open)
        images = sum(question.images for question in self.open.values())
        assert self.desk.waiting.images == images <= QUEUE
        assert (self.desk.waiting.due is None) == (not self.open)


TestAdmission = Admission.TestCase
