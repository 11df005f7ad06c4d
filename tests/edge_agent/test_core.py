from __future__ import annotations

import numpy as np
import pytest

from broker.messages import Coordinator, Hello, Request, Status
from broker.topics import Topics
from broker.training_messages import Activations, DeviceParameters, Report
from edge_agent.asking import LAST_RETRY_S
from edge_agent.phases import Phase
from tensors.parameters import unpack_parameters
from tests.fake_device import (
    Harness,
    every,
    finish,
    gradients,
    make_manifest,
    make_parameters,
    only,
    pack,
    receipt_of,
    train,
)
from tests.tiny import RUN, make_assignment, make_round

# -- joining --------------------------------------------------------------------------------------


def test_a_device_introduces_itself_until_it_has_an_assignment() -> None:
    device = Harness()
    said = device.connect()
    assert only(Status, said).state == "online"
    assert every(Hello, said)
    waits = []
    for _ in range(8):
        before = device.clock.now
        while not every(Hello, device.wait(device.core.next_tick - device.clock.now)):
            pass
        waits.append(device.clock.now - before)
    assert waits == sorted(waits)
    assert waits[-1] == LAST_RETRY_S
    device.hear(make_assignment())
    said = device.wait(300)
    assert len(every(Hello, said)) == len(every(Status, said)), "with its heartbeats while it waits"
    device.hear(make_round(), make_parameters(0), receipt_of(make_round(), complete=True))
    assert not every(Hello, device.wait(300)), "not while it trains"


def test_heartbeats_go_on() -> None:
    device = Harness()
    device.join()
    said = every(Status, device.wait(100))
    assert len(said) == 3
    assert all(status.phase == "training" for status in said)


def test_it_listens_to_the_topics_of_its_cut() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(cut=2))
    assert device.filters == Topics("fleet").cut_filters(2)
    device.hear(make_assignment(cut=3))
    assert device.filters == Topics("fleet").cut_filters(3)


def test_it_fetches_what_it_lacks_then_joins_then_trains() -> None:
    device = Harness()
    device.connect()
    assert every(Request, device.hear(make_assignment())) == []
    request = only(Request, device.hear(make_round(2, attempt=1, version=5)))
    assert (request.what, request.version) == ("parameters", 5)
    assert device.core.phase is Phase.FETCHING
    request = only(Request, device.hear(make_parameters(5)))
    assert (request.what, request.run, request.round, request.attempt) == ("join", RUN, 2, 1)
    assert device.core.phase is Phase.ENTERING
    device.hear(receipt_of(make_round(2, attempt=1), complete=True))
    assert device.core.phase is Phase.TRAINING
    made = every(Activations, device.work())
    assert {m.stamp for m in made} == {(RUN, 2, 1)}
    assert {m.version for m in made} == {5}
    assert [m.batch for m in made] == [0, 1]


def test_the_round_may_be_known_before_the_assignment() -> None:
    device = Harness()
    device.connect()
    assert not every(Request, device.hear(make_round()))
    assert only(Request, device.hear(make_assignment())).what == "parameters"


def test_requests_are_said_again_until_they_are_answered() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), make_round())
    assert len(every(Request, device.wait(15))) == 3  # after 2, 4 and 8 seconds
    device.hear(make_parameters(0))
    again = every(Request, device.wait(15))
    assert [request.what for request in again] == ["join"] * 3
    device.hear(receipt_of(make_round(), complete=True))
    assert not every(Request, device.wait(100))


def test_an_assignment_that_says_the_same_changes_nothing() -> None:
    device = Harness()
    device.join()
    made = every(Activations, device.work())
    assert device.hear(make_assignment(credits=1)) == []
    assert device.core.phase is Phase.TRAINING
    device.hear(gradients(made[0]))
    assert [m.batch for m in every(Activations, device.work())] == [2]


def test_another_assignment_starts_over() -> None:
    device = Harness()
    device.join()
    device.work()
    request = only(Request, device.hear(make_assignment(window=1)))
    assert request.what in ("parameters", "join")
    assert not device.core.has_work


def test_a_coordinator_that_comes_back_is_told_who_is_there() -> None:
    device = Harness()
    device.join()
    assert device.hear(Coordinator(state="online", boot="first")) == []
    assert device.hear(Coordinator(state="online", boot="first")) == []
    said = device.hear(Coordinator(state="online", boot="second"))
    assert every(Hello, said)
    assert every(Status, said)


def test_a_device_says_hello_to_a_coordinator_that_was_away_when_it_connected() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), Coordinator(state="offline", boot="first"))  # both retained
    assert every(Hello, device.hear(Coordinator(state="online", boot="second")))


def test_a_device_that_was_there_first_says_hello_to_the_coordinator_at_once() -> None:
    device = Harness()
    device.connect()
    device.wait(100)
    assert every(Hello, device.hear(Coordinator(state="online", boot="first")))


def test_what_was_out_is_said_again_to_a_coordinator_that_lost_the_broker() -> None:
    device = Harness()
    device.join()
    device.hear(Coordinator(state="online", boot="first"))
    made = every(Activations, device.work())
    device.hear(Coordinator(state="offline", boot="first"))
    again = device.hear(Coordinator(state="online", boot="first"))
    assert every(Activations, again) == made
    assert every(Activations, device.hear(Coordinator(state="online", boot="first"))) == made, (
        "it may be back after us, from a broker that has forgotten who was subscribed"
    )


def test_without_a_coordinator_nothing_is_produced() -> None:
    device = Harness()
    device.join()
    device.hear(Coordinator(state="offline", boot="first"))
    assert not device.core.has_work
    device.hear(Coordinator(state="online", boot="first"))
    assert every(Activations, device.work())


# -- a round --------------------------------------------------------------------------------------


def test_a_whole_round() -> None:
    device = Harness()
    announced = make_round()
    device.join()
    upload = train(device, announced)
    assert upload.stamp == announced.stamp
    assert upload.produced == 4
    assert unpack_parameters(upload.state)["weight"] == [14.0]  # from 10, four steps
    assert device.core.phase is Phase.FINISHING
    final = receipt_of(announced, applied=[(0, 3)], complete=True, final=True)
    report = only(Report, device.hear(final))
    assert (report.produced, report.applied, report.expired) == (4, 4, 0)
    assert device.core.phase is Phase.WAITING
    assert not device.core.has_work
    assert not every(Request, device.wait(200))


def test_the_upload_is_said_again_until_the_final_receipt() -> None:
    device = Harness()
    device.join()
    upload = train(device, make_round())
    assert every(DeviceParameters, device.wait(7)) == [upload, upload]
    device.hear(receipt_of(make_round(), applied=[(0, 3)], complete=True, final=True))
    assert not every(DeviceParameters, device.wait(100))


def test_parameters_that_cannot_be_encoded_end_the_round_without_an_upload_of_them() -> None:
    device = Harness()
    device.join()
    device.learner.weight = np.ones(1, np.complex64)
    assert train(device, make_round()).state == b""
    device.hear(receipt_of(make_round(), applied=[(0, 3)], complete=True, final=True))
    assert device.core.phase is Phase.WAITING


def test_a_round_it_has_finished_is_not_entered_again() -> None:
    device = Harness()
    device.join()
    finish(device, make_round())
    assert device.hear(make_round()) == []
    assert device.core.phase is Phase.WAITING


def test_an_announcement_that_is_overtaken_by_the_next_does_not_hold_the_device_up() -> None:
    device = Harness()
    device.join()
    finish(device, make_round())
    for announced in (make_round(2), make_round()):
        assert only(Request, device.hear(announced)).round == announced.round
    device.hear(make_round(2), receipt_of(make_round(2), complete=True))
    assert device.core.phase is Phase.TRAINING


def test_the_next_round_starts_from_the_merged_parameters() -> None:
    device = Harness()
    device.join()
    finish(device, make_round())
    device.hear(make_manifest(1, 50.0), make_parameters(1, 50.0))
    request = only(Request, device.hear(make_round(2, version=1)))
    assert request.what == "join", "the broadcast was enough"
    device.hear(receipt_of(make_round(2), complete=True))
    upload = train(device, make_round(2))
    assert unpack_parameters(upload.state)["weight"] == [54.0]
    assert upload.version == 1


def test_a_new_attempt_returns_to_the_start_of_the_round() -> None:
    device = Harness()
    device.join()
    made = every(Activations, device.work())
    device.hear(gradients(made[0]))
    device.work()
    assert device.learner.weight == 11

    said = device.hear(make_round(attempt=1))
    assert only(Request, said).attempt == 1
    assert only(Report, said).attempt == 0
    device.hear(receipt_of(make_round(attempt=1), complete=True))
    again = every(Activations, device.work())
    assert device.learner.weight == 10
    assert [m.batch for m in again] == [0, 1]
    assert [m.tensor for m in again] == [m.tensor for m in made[:2]]
    assert {m.attempt for m in again} == {1}


def test_gradients_of_an_older_attempt_are_not_learnt_from() -> None:
    device = Harness()
    device.join()
    old = every(Activations, device.work())
    device.hear(make_round(attempt=1), receipt_of(make_round(attempt=1), complete=True))
    device.work()
    learnt = list(device.learner.learnt)
    device.hear(*(gradients(m) for m in old))
    device.work()
    assert device.learner.learnt == learnt


def test_a_gradient_that_is_late_is_counted() -> None:
    device = Harness()
    device.join(make_assignment(gradient_timeout_s=5.0))
    first, _ = every(Activations, device.work())
    device.wait(6)
    device.hear(gradients(first))
    device.work()
    said = device.hear(make_round(attempt=1))
    report = only(Report, said)
    assert (report.timeouts, report.late_gradients) == (2, 1)
    assert (0, True) not in device.learner.learnt


def test_a_receipt_of_another_attempt_ends_nothing() -> None:
    device = Harness()
    device.join(announced=make_round(attempt=1))
    device.work()
    for other in (make_round(), make_round(2), make_round(run="other", attempt=1)):
        device.hear(receipt_of(other, complete=True, final=True))
    assert device.core.phase is Phase.TRAINING


def test_a_device_that_does_not_take_part_waits_for_the_next_round() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), make_round(), make_parameters(0))
    device.hear(receipt_of(make_round(), complete=True, participant=False, credits=0))
    assert device.core.phase is Phase.WAITING
    assert not device.core.has_work
    assert only(Request, device.hear(make_round(2))).round == 2


def test_a_first_receipt_that_makes_no_sense_is_asked_for_again() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), make_round(), make_parameters(0))
    device.hear(receipt_of(make_round(), complete=True, applied=[(0, 2**40)]))
    assert every(Request, device.wait(10))
    device.hear(receipt_of(make_round(), complete=True))
    assert device.core.phase is Phase.TRAINING


def test_the_round_ends_before_the_device_does() -> None:
    device = Harness()
    device.join()
    device.work()
    report = only(Report, device.hear(make_parameters(1, 50.0)))
    assert report.produced == 2
    assert report.expired == 2
    assert not device.core.has_work
    assert only(Request, device.hear(make_round(2, version=1))).what == "join"


# -- the connection -------------------------------------------------------------------------------


def test_while_the_broker_is_away_nothing_new_is_produced() -> None:
    device = Harness()
    device.join()
    device.disconnect()
    assert not device.core.has_work


ONLINE = Coordinator(state="online", boot="coordinator")
"""Retained: every new connection begins with it, if the coordinator is there."""


def test_what_was_out_is_said_again_on_a_new_connection() -> None:
    device = Harness()
    device.join(make_assignment(gradient_timeout_s=10.0))
    made = every(Activations, device.work())
    device.disconnect()
    device.wait(8)
    assert not every(Activations, device.connect()), "nobody may be there to take them"
    assert every(Activations, device.hear(ONLINE)) == made
    device.wait(8)
    device.hear(*(gradients(m) for m in made))
    device.work()
    assert device.learner.learnt == [(0, True), (1, True)], "its time began anew"


def test_an_open_question_is_asked_on_a_new_connection() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), make_round())
    device.disconnect()
    device.connect()
    assert only(Request, device.hear(ONLINE)).what == "parameters"


# -- parameters -----------------------------------------------------------------------------------


def test_parameters_that_do_not_match_their_checksum_are_not_taken() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), make_round(), make_manifest(0, 10.0))
    assert device.hear(make_parameters(0, 11.0)) == []
    assert device.core.phase is Phase.FETCHING
    assert every(Request, device.wait(5)), "and asked for again"
    device.hear(make_parameters(0, 10.0))
    assert device.core.phase is Phase.ENTERING


@pytest.mark.parametrize("state", [b"", b"rubbish", pack(1.0)[:-2]])
def test_parameters_that_are_rubbish_are_not_taken(state: bytes) -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), make_round())
    device.hear(make_parameters(0, state=state))
    assert device.core.phase is Phase.FETCHING
    assert device.learner.weight == 0
    device.hear(make_parameters(0))
    assert device.core.phase is Phase.ENTERING


def test_parameters_for_others_are_not_taken() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), make_round(version=3))
    for changes in ({"run": "other"}, {"cut": 3}):
        device.hear(make_parameters(3, **changes))
    device.hear(make_parameters(2))
    assert device.core.phase is Phase.FETCHING
    assert device.learner.weight == 0
