from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.serving_messages import Features, Prediction
from edge_agent.answer_counts import Counts
from edge_agent.answer_meters import enter_counts
from edge_agent.answers import Answer, Answers, Bounds
from edge_agent.errors import AgentError, InputError, NotReady, Overloaded, Unanswered
from edge_agent.exit_policy import ExitPolicy, Limits, Policy
from edge_agent.meters import Meters
from edge_agent.tickets import STAGES
from tensors.codecs import parse_codec
from tensors.decoding import decode
from tests.fake_device import FakePredictor, probabilities_of
from tests.tiny import CLASSES, SIZE, Array, Clock

TIMEOUT_S = 2.0
SURE, UNSURE = 0.9, 0.1


def images_of(*images: tuple[int, float]) -> Array:
    """Images as the exit's answer, and how sure it is of it."""
    pixels = np.zeros((len(images), 1, SIZE, SIZE), np.float32)
    pixels[:, 0, 0, :2] = np.reshape(images, (-1, 2))
    return pixels


class Failing(FakePredictor):
    def predict(self, images: Array) -> tuple[Array, Array]:
        raise RuntimeError("out of memory")


class Diverged(FakePredictor):
    """Knows nothing finite of images of class 3."""

    def predict(self, images: Array) -> tuple[Array, Array]:
        features, probabilities = super().predict(images)
        probabilities[images[:, 0, 0, 0] == 3] = np.nan
        return features, probabilities


class Desk:
    def __init__(
        self, *, limits: Limits | None = None, bounds: Bounds | None = None, **policy: Any
    ) -> None:
        self.clock = Clock()
        self.policy = ExitPolicy(limits or Limits(), seed=0, clock=self.clock)
        self.answers = Answers(
            self.policy,
            clock=self.clock,
            bounds=bounds or Bounds(waiting_images=8, batch_images=4, message_images=3, messages=3),
            first_message=100,
        )
        fields: dict[str, Any] = {"rule": "max_softmax", "threshold": 0.5, "timeout_s": TIMEOUT_S}
        self.served = Policy(**(fields | policy))
        self.use(1)

    def use(self, version: int, run: str = "run", predictor: Any = None) -> None:
        self.answers.use(
            run,
            version,
            predictor or FakePredictor(),
            self.served,
            parse_codec("fp32"),
            shape=(1, SIZE, SIZE),
        )

    def ask(self, *images: tuple[int, float], **options: Any) -> int:
        return self.answers.ask(images_of(*images), **options)

    def work(self) -> list[Features]:
        sent: list[Features] = []
        while self.answers.has_work:
            sent += self.answers.work()
        return sent

    def reply(self, features: Features, *labels: int, **changes: Any) -> None:
        fields = {
            "request": features.request,
            "version": features.version,
            "tensor": probabilities_of(*labels) if labels else None,
        }
        self.answers.answer(Prediction(**(fields | changes)))

    def done(self) -> dict[int, Answer | AgentError]:
        return dict(self.answers.take())

    def only(self) -> Answer:
        ((_, answer),) = self.answers.take()
        assert isinstance(answer, Answer)
        return answer

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.answers.tick()


def total(counts: Counts, answers: Answers) -> int:
    return (
        answers.waiting
        + answers.open
        + counts.exits
        + counts.answered
        + counts.fallbacks
        + counts.overloaded
        + counts.cancelled
        + counts.failed
    )


def assert_balanced(answers: Answers) -> None:
    counts = answers.counts
    assert counts.images == total(counts, answers), counts
    assert counts.offloads == (
        answers.open + counts.answered + counts.lost.total() + counts.offloads_cancelled
    ), counts
    assert counts.audits >= counts.audits_answered + counts.audits_lost
    assert counts.audits_answered >= counts.audits_agreed
    meters = Meters()
    enter_counts(meters, counts)
    told = {name: sum(values.values()) for name, values in meters.counters.items()}
    assert told["predictions"] == counts.exits + counts.answered + counts.fallbacks
    assert told["offloads"] == counts.offloads - answers.open
    assert told["offloads_held"] == counts.held.total()
    assert counts.messages >= counts.replies
    assert counts.correct <= counts.labelled <= counts.images
    assert counts.exit_correct <= counts.labelled


def test_a_round_trip_says_what_of_it_was_the_servers() -> None:
    desk = Desk()
    desk.ask((2, UNSURE))
    (asked,) = desk.work()
    desk.clock.advance(0.25)
    desk.reply(asked, 3, queue_ms=50.0, forward_ms=1e9)  # longer than it can have been
    seconds = desk.only().seconds
    assert seconds["server_queue"] == 0.05
    assert seconds["server_forward"] == seconds["round_trip"] == 0.25


def test_sure_and_unsure_images_of_a_request_are_one_answer() -> None:
    desk = Desk()
    ticket = desk.ask((1, SURE), (2, UNSURE), (0, SURE), labels=np.array([1, 3, 2]))
    (asked,) = desk.work()
    assert desk.done() == {}
    np.testing.assert_array_equal(decode(asked.tensor)[:, :2], [[2, np.float32(UNSURE)]])
    desk.clock.advance(0.25)
    desk.reply(asked, 3)
    ((number, answer),) = desk.answers.take()
    assert number == ticket
    assert isinstance(answer, Answer)
    assert answer.labels.tolist() == [1, 3, 0]
    assert (answer.labels.dtype, answer.probabilities.dtype) == (np.int64, np.float32)
    assert answer.probabilities.shape == (3, CLASSES)
    assert answer.by == ("exit", "server", "exit")
    assert answer.reasons == (None, None, None)
    np.testing.assert_allclose(answer.confidence, [SURE, UNSURE, SURE], rtol=1e-6)
    assert (answer.run, answer.version) == ("run", 1)
    assert answer.seconds.keys() == set(STAGES)
    assert answer.seconds["round_trip"] == answer.seconds["total"] == 0.25
    counts = desk.answers.counts
    assert (counts.exits, counts.offloads, counts.answered) == (2, 1, 1)
    assert (counts.labelled, counts.exit_correct, counts.correct) == (3, 1, 2)
    assert_balanced(desk.answers)


def test_several_requests_are_computed_and_asked_together() -> None:
    desk = Desk()
    first, second = desk.ask((1, UNSURE)), desk.ask((2, UNSURE), (3, SURE))
    (asked,) = desk.answers.work()
    assert not desk.answers.has_work
    desk.reply(asked, 0, 3)
    labels = {
        ticket: answer.labels.tolist()
        for ticket, answer in desk.done().items()
        if isinstance(answer, Answer)
    }
    assert labels == {first: [0], second: [3, 3]}
    assert sum(desk.answers.counts.seconds["exit"].counts) == 1


def test_a_message_holds_no_more_than_it_may() -> None:
    desk = Desk()
    desk.ask(*[(1, UNSURE)] * 4)
    first, second = desk.work()
    assert (len(decode(first.tensor)), len(decode(second.tensor))) == (3, 1)
    assert (first.request, second.request) == (100, 101)
    desk.reply(second, 2)
    assert desk.done() == {}
    desk.reply(first, 0, 1, 2)
    assert desk.only().labels.tolist() == [0, 1, 2, 2]


def test_the_oldest_give_way_when_there_is_too_much() -> None:
    desk = Desk()
    tickets = [desk.ask((1, SURE), (1, SURE)) for _ in range(6)]
    done = desk.done()
    assert list(done) == tickets[:2]
    assert all(isinstance(error, Overloaded) for error in done.values())
    desk.work()
    assert list(desk.done()) == tickets[2:]
    assert desk.answers.counts.overloaded == 4
    assert_balanced(desk.answers)


def test_without_an_answer_in_time_the_exits_own_is_given_and_a_late_one_changes_nothing() -> None:
    desk = Desk()
    desk.ask((1, UNSURE))
    (asked,) = desk.work()
    assert desk.answers.deadline == desk.clock.now + TIMEOUT_S
    desk.wait(TIMEOUT_S)
    answer = desk.only()
    assert (answer.by, answer.reasons, answer.labels.tolist()) == (("fallback",), ("timeout",), [1])
    before = repr(desk.answers.counts)
    desk.reply(asked, 2)
    assert desk.done() == {}
    assert desk.answers.counts.late == 1
    desk.answers.counts.late = 0
    assert repr(desk.answers.counts) == before
    assert desk.answers.deadline is None


def test_a_late_answer_is_late_even_if_nobody_looked_at_the_clock() -> None:
    desk = Desk()
    desk.ask((1, UNSURE))
    (asked,) = desk.work()
    desk.clock.advance(TIMEOUT_S)
    desk.reply(asked, 2)
    assert desk.only().by == ("fallback",)
    assert desk.answers.counts.late == 1


def test_predictions_for_somebody_else_are_not_even_late() -> None:
    desk = Desk()
    desk.ask((1, UNSURE))
    (asked,) = desk.work()
    desk.reply(asked, 2, request=99)
    desk.reply(asked, 2, request=101)
    assert desk.answers.counts.late == 0
    desk.reply(asked, 2)
    desk.reply(asked, 3)
    assert desk.answers.counts.late == 1, "the second time"
    assert desk.only().labels.tolist() == [2]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"tensor": None, "refused": "overloaded"}, "refused:overloaded"),
        ({"tensor": None, "refused": "because " * 9}, "refused:other"),
        ({"tensor": None}, "refused:other"),
        ({"version": 2}, "refused:version"),
        ({"tensor": b"rubbish"}, "refused:nonsense"),
        ({"tensor": b""}, "refused:nonsense"),
        ({"tensor": probabilities_of(1, 1)}, "refused:nonsense"),
        ({"tensor": parse_codec("fp32").encode(np.full((1, CLASSES), np.inf, np.float32))},) * 1
        + ("refused:nonsense",),
        (
            {"tensor": parse_codec("fp32").encode(np.full((1, CLASSES), 9, np.float32))},
            "refused:nonsense",
        ),
        (
            {"tensor": parse_codec("fp32").encode(np.array([[2, -1, 0, 0]], np.float32))},
            "refused:nonsense",
        ),
        (
            {"tensor": parse_codec("fp32").encode(np.full((1, 2), 0.5, np.float32))},
            "refused:nonsense",
        ),
    ],
)
def test_a_refusal_and_nonsense_leave_the_exits_answer(reply: dict[str, Any], reason: str) -> None:
    desk = Desk()
    desk.ask((1, UNSURE))
    (asked,) = desk.work()
    desk.reply(asked, 2, **reply)
    answer = desk.only()
    assert (answer.by, answer.reasons, answer.labels.tolist()) == (("fallback",), (reason,), [1])
    assert desk.answers.counts.refused == 1
    assert desk.answers.counts.answered == 0
    assert_balanced(desk.answers)


def test_a_request_has_its_own_deadline() -> None:
    desk = Desk()
    desk.ask((1, UNSURE), deadline_s=0.5)
    desk.ask((2, UNSURE))
    (asked,) = desk.work()
    assert asked.deadline_ms == 2000, "as long as any of them waits"
    desk.wait(0.5)
    assert desk.only().reasons == ("timeout",)
    desk.reply(asked, 3, 3)
    assert desk.only().labels.tolist() == [3]
    assert_balanced(desk.answers)


def test_what_waits_past_its_deadline_fails() -> None:
    desk = Desk()
    ticket = desk.ask((1, SURE), deadline_s=0.5)
    assert desk.answers.deadline == desk.clock.now + 0.5
    desk.wait(0.5)
    assert isinstance(desk.done()[ticket], Overloaded)
    assert not desk.answers.has_work


def test_cancelled_requests_are_not_answered_at_any_stage() -> None:
    desk = Desk()
    waiting = desk.ask((1, UNSURE))
    desk.answers.cancel(waiting)
    assert not desk.answers.has_work
    out = desk.ask((1, UNSURE), (1, SURE))
    (asked,) = desk.work()
    desk.answers.cancel(out)
    desk.reply(asked, 2)
    ready = desk.ask((1, SURE))
    desk.work()
    desk.answers.cancel(ready)
    desk.answers.cancel(ready)
    desk.answers.cancel(77)
    assert desk.done() == {}
    counts = desk.answers.counts
    assert (counts.cancelled, counts.offloads_cancelled, counts.answered) == (2, 1, 0)
    assert_balanced(desk.answers)


def test_without_a_connection_the_exit_answers_and_says_so() -> None:
    desk = Desk(audit_share=1.0)
    desk.ask((1, UNSURE))
    desk.work()
    desk.answers.disconnected()
    assert desk.only().reasons == ("offline",)
    desk.ask((1, UNSURE), (2, SURE))
    assert desk.work() == []
    assert desk.only().by == ("fallback", "exit")
    desk.answers.connected()
    desk.ask((1, UNSURE))
    assert len(desk.work()) == 1
    assert desk.answers.counts.lost == desk.answers.counts.held == {"offline": 1}


def test_over_its_budget_a_device_answers_by_itself() -> None:
    desk = Desk(limits=Limits(requests_per_h=60, burst_s=60))
    for _ in range(2):
        desk.ask((1, UNSURE))
        desk.work()
    assert desk.only().reasons == ("budget",)
    desk.wait(60)
    desk.done()
    desk.ask((1, UNSURE))
    assert len(desk.work()) == 1


def test_bytes_of_messages_are_what_a_budget_is_spent_on() -> None:
    desk = Desk(limits=Limits(bytes_per_h=36_000, burst_s=1))
    desk.ask((1, UNSURE))
    (asked,) = desk.work()
    desk.wait(len(asked.tensor) / 10)
    desk.ask((1, UNSURE))
    assert desk.work() == []
    desk.wait(160 / 10)
    desk.ask((1, UNSURE))
    assert len(desk.work()) == 1


def test_a_latency_objective_bounds_the_wait() -> None:
    desk = Desk(limits=Limits(latency_s=0.5))
    desk.ask((1, UNSURE))
    desk.clock.advance(0.1)
    (asked,) = desk.work()
    assert asked.deadline_ms == 400
    desk.wait(0.4)
    assert desk.only().reasons == ("timeout",)
    desk.wait(10)
    sent = []
    for _ in range(3):
        desk.ask((1, UNSURE))
        sent.append(len(desk.work()))
        desk.wait(0.5)
    assert sent == [1, 1, 0], "as long as it may fit, once to see, and then no more"
    assert desk.answers.counts.held == {"latency": 1}


def test_no_more_messages_are_out_than_allowed() -> None:
    desk = Desk()
    for _ in range(4):
        desk.ask((1, UNSURE))
        desk.work()
    assert desk.only().reasons == ("busy",)


def test_an_audited_image_is_answered_at_once_and_asked_about_all_the_same() -> None:
    desk = Desk(audit_share=1.0, agreement=0.9)
    desk.ask((1, SURE), (2, SURE))
    (asked,) = desk.work()
    assert desk.only().by == ("exit", "exit")
    desk.reply(asked, 1, 3)
    assert desk.done() == {}
    counts = desk.answers.counts
    assert (counts.exits, counts.offloads, counts.answered) == (2, 0, 0)
    assert (counts.audits, counts.audits_answered, counts.audits_agreed) == (2, 2, 1)
    assert (desk.policy.drift.audits, desk.policy.drift.agreed) == (2, 1)
    desk.ask((1, SURE))
    desk.work()
    desk.wait(TIMEOUT_S)
    assert counts.audits_lost == 1
    assert desk.policy.drift.audits == 2, "no answer is no evidence"
    assert_balanced(desk.answers)


def test_an_exit_that_drifts_is_asked_about_although_it_is_sure() -> None:
    desk = Desk(audit_share=1.0, agreement=0.95)
    while not desk.policy.drift.drifting:
        desk.ask((1, 0.6))
        (asked,) = desk.work()
        desk.reply(asked, 2)
        assert desk.only().by == ("exit",)
    desk.ask((1, 0.6))
    (asked,) = desk.work()
    desk.reply(asked, 2)
    assert desk.only().by == ("server",)


def test_a_new_version_answers_from_then_on_and_what_is_out_may_still_come() -> None:
    desk = Desk()
    desk.ask((1, UNSURE))
    (old,) = desk.work()
    desk.use(2)
    assert desk.answers.version == ("run", 2)
    desk.ask((1, UNSURE))
    (new,) = desk.work()
    assert (old.version, new.version) == (1, 2)
    desk.reply(old, 3)
    assert (first := desk.only()).labels.tolist() == [3]
    assert first.version == 1
    desk.reply(new, 2)
    assert desk.only().version == 2


def test_another_run_supersedes_what_is_out() -> None:
    desk = Desk()
    desk.ask((1, UNSURE))
    desk.work()
    desk.use(1, run="another")
    assert desk.only().reasons == ("superseded",)


def test_images_that_no_longer_fit_fail() -> None:
    desk = Desk()
    ticket = desk.ask((1, SURE))
    desk.answers.use(
        "another", 1, FakePredictor(), desk.served, parse_codec("fp32"), shape=(3, 9, 9)
    )
    assert isinstance(desk.done()[ticket], InputError)
    assert_balanced(desk.answers)


def test_before_there_are_parameters_nothing_is_taken() -> None:
    clock = Clock()
    answers = Answers(ExitPolicy(Limits(), seed=0, clock=clock), clock=clock)
    with pytest.raises(NotReady, match="no trained parameters"):
        answers.ask(images_of((1, SURE)))


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (images_of(), {}),
        (images_of(*[(1, SURE)] * 9), {}),
        (images_of((1, SURE))[0], {}),
        (np.zeros((1, 1, SIZE, SIZE + 1), np.float32), {}),
        (images_of((1, SURE)), {"labels": np.array([1, 2])}),
        (images_of((1, SURE)), {"labels": np.array([math.nan])}),
        (images_of((1, SURE)), {"labels": np.array([None])}),
        (images_of((1, SURE)), {"labels": np.array(["dress"])}),
        (images_of((1, SURE)), {"deadline_s": 0.0}),
        (images_of((1, SURE)), {"deadline_s": math.nan}),
    ],
)
def test_what_cannot_be_answered_is_refused(images: Array, options: dict[str, Any]) -> None:
    desk = Desk()
    with pytest.raises(InputError):
        desk.answers.ask(images, **options)
    assert desk.answers.counts.images == 0


def test_a_network_that_fails_fails_the_request_and_nothing_else() -> None:
    desk = Desk()
    desk.use(2, predictor=Failing())
    ticket = desk.ask((1, SURE))
    desk.work()
    error = desk.done()[ticket]
    assert isinstance(error, Unanswered)
    assert "out of memory" in str(error)
    desk.use(3)
    desk.ask((1, SURE))
    desk.work()
    assert desk.only().by == ("exit",)
    assert_balanced(desk.answers)


@pytest.mark.parametrize("threshold", [0.5, -1.0])
def test_an_exit_that_knows_nothing_is_never_sure_and_its_features_spoil_no_others(
    threshold: float,
) -> None:
    desk = Desk(threshold=threshold)
    desk.use(2, predictor=Diverged())
    desk.ask((3, SURE))
    desk.ask((1, UNSURE))
    asked = desk.work()
    for each in asked:
        assert len(decode(each.tensor)) == 1
        desk.reply(each, 0)
    broken, other = (answer for answer in desk.done().values() if isinstance(answer, Answer))
    assert broken.reasons == ("refused:not_finite",)
    np.testing.assert_array_equal(broken.probabilities, np.full((1, CLASSES), 1 / CLASSES))
    assert other.by == (("server",) if asked else ("exit",))


IMAGE = st.tuples(st.integers(0, CLASSES - 1), st.sampled_from([0.0, UNSURE, 0.6, SURE]))


class Asking(RuleBasedStateMachine):
    """Every request gets one answer or one error, every image is in one account."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(
            limits=Limits(requests_per_h=7200, bytes_per_h=2_000_000, burst_s=4, latency_s=3),
            audit_share=0.5,
            agreement=0.9,
        )
        self.version = 1
        self.asked: dict[int, int] = {}
        self.cancelled: set[int] = set()
        self.done: dict[int, Answer | AgentError] = {}
        self.sent: list[Features] = []

    def collect(self) -> None:
        for ticket, answer in self.desk.answers.take():
            assert ticket in self.asked
            assert ticket not in self.done, "answered twice"
            assert ticket not in self.cancelled, "answered to nobody"
            self.done[ticket] = answer
            if isinstance(answer, Answer):
                count = self.asked[ticket]
                assert answer.labels.shape == answer.confidence.shape == (count,)
                assert answer.probabilities.shape == (count, CLASSES)
                assert len(answer.by) == len(answer.reasons) == count
                assert np.isfinite(answer.probabilities).all()
                for by, reason in zip(answer.by, answer.reasons, strict=True):
                    assert (reason is not None) == (by == "fallback")
                assert all(seconds >= 0 for seconds in answer.seconds.values())

    @rule(
        images=st.lists(IMAGE, min_size=1, max_size=5),
        labelled=st.booleans(),
        deadline_s=st.sampled_from([None, 0.5, 5.0]),
    )
    def ask(
        self, images: list[tuple[int, float]], deadline_s: float | None, *, labelled: bool
    ) -> None:
        labels = np.zeros(len(images), np.int64) if labelled else None
        ticket = self.desk.ask(*images, labels=labels, deadline_s=deadline_s)
        assert ticket not in self.asked
        self.asked[ticket] = len(images)

    @precondition(lambda self: self.desk.answers.has_work)
    @rule()
    def work(self) -> None:
        self.sent += self.desk.answers.work()

    @precondition(lambda self: self.sent)
    @rule(
        data=st.data(),
        what=st.sampled_from(["answer", "answer", "refuse", "nonsense", "other version"]),
    )
    def reply(
        self,
        data: st.DataObject,
        what: Literal["answer", "refuse", "nonsense", "other version"],
    ) -> None:
        features = data.draw(st.sampled_from(self.sent))
        labels = [number % CLASSES for number in range(len(decode(features.tensor)))]
        match what:
            case "answer":
                self.desk.reply(features, *labels)
            case "refuse":
                self.desk.reply(features, refused="expired")
            case "nonsense":
                self.desk.reply(features, *labels, 0)
            case "other version":
                self.desk.reply(features, *labels, version=features.version + 1)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.asked)))
        self.collect()
        self.desk.answers.cancel(ticket)
        if ticket not in self.done:
            self.cancelled.add(ticket)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.desk.wait(seconds)

    @rule()
    def lose_connection(self) -> None:
        self.desk.answers.disconnected()

    @rule()
    def connect(self) -> None:
        self.desk.answers.connected()

    @rule(another_run=st.booleans())
    def new_version(self, *, another_run: bool) -> None:
        self.version += 1
        self.desk.use(self.version, f"run{self.version}" if another_run else "run")

    @invariant()
    def balanced(self) -> None:
        self.collect()
        assert_balanced(self.desk.answers)
        assert self.desk.answers.waiting <= 8
        deadline = self.desk.answers.deadline
        if self.desk.answers.open:
            assert deadline is not None, "nobody waits without end"

    def teardown(self) -> None:
        self.sent += self.desk.work()
        self.desk.wait(10)
        self.collect()
        assert self.done.keys() | self.cancelled == self.asked.keys()
        answers = self.desk.answers
        assert answers.open == answers.waiting == 0
        assert answers.deadline is None
        assert answers.counts.audits == answers.counts.audits_answered + answers.counts.audits_lost
        assert_balanced(answers)


TestAsking = Asking.TestCase
TestAsking.settings = settings(max_examples=60, stateful_step_count=30)
