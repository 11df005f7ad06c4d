"""Work for a round that the fleet has left behind, and rounds without a barrier."""

from __future__ import annotations

from typing import Any

import pytest

from broker.fields import Message
from broker.messages import Coordinator, Request
from broker.training_messages import Activations, DeviceParameters, Report, Round
from edge_agent.phases import Phase
from tensors.parameters import unpack_parameters
from tests.fake_device import (
    Harness,
    every,
    gradients,
    make_parameters,
    only,
    receipt_of,
    train,
)
from tests.tiny import make_assignment, make_round


def learn_one(device: Harness) -> Activations:
    """Make two batches and learn from the first; the other."""
    first, second = every(Activations, device.work())
    device.hear(gradients(first))
    device.core.work()
    return second


def kinds(messages: list[Message]) -> list[str]:
    return [type(message).__name__ for message in messages]


# -- with a barrier -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "later",
    [
        make_round(2, version=1),
        make_round(2),
        make_round(5, version=7, attempt=2),
        make_round(1, version=1, phase="gathering"),
    ],
    ids=["next", "same version", "far ahead", "gathering"],
)
def test_what_was_learnt_goes_up_late_when_the_fleet_has_gone_on(later: Round) -> None:
    device = Harness()
    device.join()
    learn_one(device)
    said = device.hear(later)
    assert kinds(said)[:2] == ["DeviceParameters", "Report"], "before anything of the new round"
    upload = only(DeviceParameters, said)
    assert (upload.stamp, upload.version, upload.produced) == (make_round().stamp, 0, 2)
    assert unpack_parameters(upload.state)["weight"] == [11.0]
    report = only(Report, said)
    assert report.stamp == upload.stamp
    assert (report.produced, report.applied, report.expired) == (2, 1, 1)
    assert not every(DeviceParameters, device.wait(100)), "it is not asked for again"


def test_the_next_parameters_say_too_that_the_round_is_over() -> None:
    device = Harness()
    device.join()
    learn_one(device)
    said = device.hear(make_parameters(1, 50.0))
    assert unpack_parameters(only(DeviceParameters, said).state)["weight"] == [11.0]
    assert device.core.phase is Phase.WAITING
    said = device.hear(make_round(2, version=1))
    assert only(Request, said).what == "join"
    assert not every(DeviceParameters, said)
    device.hear(receipt_of(make_round(2), complete=True))
    device.work()
    assert device.learner.start.state["weight"] == [50.0]


def test_an_upload_that_had_no_answer_goes_once_more() -> None:
    device = Harness()
    device.join()
    upload = train(device, make_round())
    said = device.hear(make_round(2, version=1))
    assert only(DeviceParameters, said) == upload
    assert not every(DeviceParameters, device.wait(100))


@pytest.mark.parametrize(
    "announced",
    [
        make_round(attempt=1),
        make_round(2, run="other"),
        make_round(2, version=1, phase="inference"),
        make_round(2, version=1, phase="finished"),
    ],
    ids=["attempt", "run", "inference", "finished"],
)
def test_what_nobody_wants_is_not_sent(announced: Round) -> None:
    device = Harness()
    device.join()
    learn_one(device)
    assert not every(DeviceParameters, device.hear(announced))


def test_nothing_learnt_nothing_sent() -> None:
    device = Harness()
    device.join()
    device.work()
    said = device.hear(make_round(2, version=1))
    assert not every(DeviceParameters, said)
    assert only(Report, said).expired == 2


def test_the_answer_to_late_work_does_not_disturb_the_new_round() -> None:
    device = Harness()
    device.join()
    learn_one(device)
    device.hear(make_round(2, version=1), make_parameters(1))
    device.hear(receipt_of(make_round(), complete=True, final=True))
    assert device.core.phase is Phase.ENTERING
    device.hear(receipt_of(make_round(), complete=True, final=True, participant=False))
    device.hear(receipt_of(make_round(2), complete=True))
    device.work()
    device.hear(receipt_of(make_round(), complete=True, final=True))
    assert device.core.phase is Phase.TRAINING


def test_a_device_that_loses_its_part_waits_for_the_next_round() -> None:
    device = Harness()
    device.join()
    device.work()
    said = device.hear(receipt_of(make_round(), complete=True, participant=False, final=True))
    assert every(Report, said)
    assert device.core.phase is Phase.WAITING
    assert not device.core.has_work


def test_an_assignment_that_ends_an_attempt_does_not_lose_its_books() -> None:
    device = Harness()
    device.join()
    device.work()
    report = only(Report, device.hear(make_assignment(cut=1)))
    assert (report.produced, report.expired) == (2, 2)


# -- by time --------------------------------------------------------------------------------------


def test_a_round_by_time_ends_with_the_time_and_the_device_notices_by_itself() -> None:
    device = Harness()
    timed = make_round(train_s=20.0)
    device.join(make_assignment(quota=100), timed)
    made = every(Activations, device.work())
    device.hear(*(gradients(m) for m in made))
    device.wait(19)
    made += every(Activations, device.work())
    device.hear(*(gradients(m) for m in made[2:]))
    device.core.work()
    assert device.core.has_work
    device.wait(1)
    upload = only(DeviceParameters, device.work())
    assert upload.produced == len(made) > 2
    assert len(device.learner.learnt) == len(made)


def test_time_that_ends_between_two_looks_does_no_harm() -> None:
    device = Harness()
    device.join(make_assignment(quota=100), make_round(train_s=20.0))
    device.core.work()
    assert device.core.has_work
    device.clock.advance(20)
    assert device.core.work() == []


# -- without a barrier ----------------------------------------------------------------------------


def free(number: int = 1, **changes: Any) -> Round:
    return make_round(number, **({"barrier": False} | changes))


def free_device() -> Harness:
    device = Harness()
    device.join(announced=free())
    device.hear(Coordinator(state="online", boot="first"))
    return device


def final(announced: Round, total: int = 4) -> Any:
    return receipt_of(
        announced,
        applied=[(0, total - 1)],
        complete=True,
        final=True,
        next_batch=total,
        quota=total,
    )


def test_the_fleet_goes_on_and_the_device_finishes_first() -> None:
    device = free_device()
    waiting = learn_one(device)
    for later in (free(2, version=1), free(3, version=2)):
        assert device.hear(make_parameters(later.version), later) == []
    device.hear(gradients(waiting))
    upload = train(device, free())
    assert (upload.stamp, upload.version, upload.produced) == (free().stamp, 0, 4)
    assert unpack_parameters(upload.state)["weight"] == [14.0]
    assert device.hear(free(4, version=3)) == []
    assert every(DeviceParameters, device.wait(3)) == [upload], "until it has its receipt"

    said = device.hear(final(free()))
    assert only(Report, said).applied == 4
    request = only(Request, said)
    assert (request.what, request.version) == ("parameters", 3)
    request = only(Request, device.hear(make_parameters(3, 30.0)))
    assert (request.what, request.round) == ("join", 4)
    device.hear(receipt_of(free(4), complete=True, quota=4))
    assert {m.version for m in every(Activations, device.work())} == {3}


def test_the_same_round_is_entered_for_another_leg() -> None:
    device = free_device()
    train(device, free())
    request = only(Request, device.hear(final(free())))
    assert (request.what, request.round) == ("join", 1)
    device.hear(receipt_of(free(), applied=[(0, 3)], complete=True, next_batch=4, quota=8))
    assert device.core.phase is Phase.TRAINING
    made = every(Activations, device.work())
    assert [m.batch for m in made] == [4, 5]
    assert device.learner.weight == 10, "from the start of the version"
    device.hear(*(gradients(m) for m in made))
    upload = train(device, free())
    assert upload.produced == 8
    assert unpack_parameters(upload.state)["weight"] == [14.0]
    report = only(Report, device.hear(final(free(), 8)))
    assert (report.produced, report.applied, report.expired) == (8, 8, 0)


@pytest.mark.parametrize("answer", [{"participant": False}, {"next_batch": 4, "quota": 4}])
def test_without_another_leg_it_waits(answer: dict[str, Any]) -> None:
    device = free_device()
    train(device, free())
    device.hear(final(free()))
    device.hear(receipt_of(free(), complete=True, **answer))
    assert device.core.phase is Phase.WAITING
    assert not every(Request, device.wait(300))
    assert device.hear(free()) == []
    assert only(Request, device.hear(free(2))).round == 2


def test_a_leg_that_is_offered_later_is_taken() -> None:
    device = free_device()
    train(device, free())
    device.hear(final(free()))
    device.hear(receipt_of(free(), complete=True, next_batch=4, quota=4))
    device.hear(receipt_of(free(), complete=True, next_batch=4, quota=8))
    assert [m.batch for m in every(Activations, device.work())] == [4, 5]


def test_a_final_receipt_that_comes_twice_is_no_answer_to_the_join() -> None:
    device = free_device()
    train(device, free())
    device.hear(final(free()), final(free()))
    assert device.core.phase is Phase.ENTERING
    device.hear(receipt_of(free(), complete=True, next_batch=4, quota=8))
    assert device.core.phase is Phase.TRAINING


@pytest.mark.parametrize("announced", [free(attempt=1), free(attempt=1, version=0)])
def test_a_new_attempt_makes_the_work_void(announced: Round) -> None:
    device = free_device()
    learn_one(device)
    said = device.hear(announced)
    assert not every(DeviceParameters, said)
    assert only(Request, said).attempt == 1


def test_another_life_of_the_coordinator_makes_the_work_void() -> None:
    device = free_device()
    learn_one(device)
    device.hear(free(2, version=1))
    said = device.hear(Coordinator(state="online", boot="second"))
    assert not every(DeviceParameters, said)
    assert only(Report, said).produced == 2
    device.hear(free(2, attempt=1, version=1), make_parameters(1))
    device.hear(receipt_of(free(2, attempt=1), complete=True))
    assert {m.stamp for m in every(Activations, device.work())} == {free(2, attempt=1).stamp}


@pytest.mark.parametrize("phase", ["inference", "finished"])
def test_the_end_of_the_run_ends_the_attempt(phase: str) -> None:
    device = free_device()
    learn_one(device)
    said = device.hear(free(3, phase=phase))
    assert only(Report, said).produced == 2
    assert not every(DeviceParameters, said)


def test_an_attempt_nobody_knows_any_more_ends_with_the_refusal() -> None:
    device = free_device()
    learn_one(device)
    device.hear(free(9, version=8))
    refusal = receipt_of(free(), complete=True, final=True, participant=False)
    said = device.hear(refusal)
    assert only(Report, said).produced == 2
    assert only(Request, said).version == 8


def test_parameters_are_taken_only_when_they_are_wanted() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), free())
    device.hear(make_parameters(0))
    assert device.core.phase is Phase.ENTERING
    assert device.hear(make_parameters(1)) == []
    assert device.core.phase is Phase.ENTERING
