from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.messages import (
    Activations,
    Assignment,
    Command,
    Coordinator,
    DeviceParameters,
    Features,
    Gradients,
    Hello,
    Message,
    Prediction,
    Report,
    Request,
    Round,
    Status,
)
from broker.topics import Topics
from edge_agent.attempt import Learner
from edge_agent.core import LAST_RETRY_S, PROBE_WAIT_S, Phase
from edge_agent.errors import AssignmentError
from tensors.codecs import parse_codec
from tensors.errors import NetworkError
from tensors.parameters import unpack_parameters
from tests.fake_device import (
    FakeData,
    FakeLearner,
    Harness,
    MemorySnapshots,
    every,
    make_manifest,
    make_measurement,
    make_parameters,
    only,
    pack,
    probabilities_of,
    receipt_of,
)
from tests.tiny import RUN, SIZE, Array, make_assignment, make_hello, make_round

GRADIENT = parse_codec("fp32").encode(np.ones((8, 1), np.float32))


def gradients(activations: Activations, tensor: bytes = GRADIENT) -> Gradients:
    run, number, attempt = activations.stamp
    return Gradients(
        run=run,
        round=number,
        attempt=attempt,
        batch=activations.batch,
        loss=1.0,
        correct=1,
        tensor=tensor,
    )


def train(device: Harness, announced: Round) -> DeviceParameters:
    """Answer every batch; the upload."""
    for _ in range(20):
        said = device.work()
        uploads = every(DeviceParameters, said)
        if uploads:
            return uploads[0]
        assert every(Activations, said)
        device.hear(*(gradients(m) for m in every(Activations, said)))
    raise AssertionError("the round never ends")


def finish(device: Harness, announced: Round) -> Report:
    train(device, announced)
    said = device.hear(receipt_of(announced, applied=[(0, 3)], complete=True, final=True))
    return only(Report, said)


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
    assert not every(Hello, device.wait(300))


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


def test_a_device_that_was_there_first_says_hello_to_the_coordinator_at_once() -> None:
    device = Harness()
    device.connect()
    device.wait(100)
    assert every(Hello, device.hear(Coordinator(state="online", boot="first")))


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


def test_a_round_it_has_finished_is_not_entered_again() -> None:
    device = Harness()
    device.join()
    finish(device, make_round())
    assert device.hear(make_round()) == []
    assert device.core.phase is Phase.WAITING


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


def test_what_was_out_is_said_again_on_a_new_connection() -> None:
    device = Harness()
    device.join(make_assignment(gradient_timeout_s=10.0))
    made = every(Activations, device.work())
    device.disconnect()
    device.wait(8)
    assert every(Activations, device.connect()) == made
    device.wait(8)
    device.hear(*(gradients(m) for m in made))
    device.work()
    assert device.learner.learnt == [(0, True), (1, True)], "its time began anew"


def test_an_open_question_is_asked_on_a_new_connection() -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(), make_round())
    device.disconnect()
    assert only(Request, device.connect()).what == "parameters"


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


# -- its own memory -------------------------------------------------------------------------------


def test_a_restarted_device_needs_no_download() -> None:
    snapshots = MemorySnapshots()
    first = Harness(snapshots=snapshots)
    first.join()
    first.work()
    second = Harness(snapshots=snapshots)
    second.connect()
    second.hear(make_assignment())
    assert only(Request, second.hear(make_round())).what == "join"
    second.hear(receipt_of(make_round(), complete=True, next_batch=2, applied=[(0, 1)]))
    assert [m.batch for m in every(Activations, second.work())] == [2, 3]
    assert second.learner.weight == 10


def test_a_restarted_device_of_an_old_version_fetches_the_new_one() -> None:
    snapshots = MemorySnapshots()
    Harness(snapshots=snapshots).join()
    second = Harness(snapshots=snapshots)
    second.connect()
    second.hear(make_assignment())
    assert only(Request, second.hear(make_round(2, version=1))).what == "parameters"


def test_a_broken_disk_costs_the_memory_but_not_the_training() -> None:
    device = Harness(snapshots=MemorySnapshots(broken=True))
    device.join()
    assert finish(device, make_round()).applied == 4


# -- what cannot be done --------------------------------------------------------------------------


def refuse(error: Exception) -> Callable[[Assignment], Learner]:
    def build(assignment: Assignment) -> Learner:
        raise error

    return build


@pytest.mark.parametrize("error", [AssignmentError("not allowed"), NetworkError("no such cut")])
def test_an_assignment_it_cannot_follow_ends_the_device_with_the_reason(error: Exception) -> None:
    device = Harness(build=refuse(error), stay=True)
    device.connect()
    device.hear(make_assignment(), make_round())
    assert device.core.finished
    assert device.core.problem == str(error)


@pytest.mark.parametrize("key", ["activation_codec", "parameter_codec"])
def test_a_codec_it_does_not_know_ends_the_device_with_the_reason(key: str) -> None:
    device = Harness()
    device.connect()
    device.hear(make_assignment(**{key: "int3"}), make_round())
    assert device.core.finished
    assert "int3" in str(device.core.problem)


def test_a_device_that_is_refused_stops_with_the_reason() -> None:
    device = Harness(stay=True)
    device.connect()
    device.hear(Command(command="stop", reason="it has no training images"))
    assert device.core.finished
    assert device.core.problem == "it has no training images"


@pytest.mark.parametrize("stay", [True, False])
def test_after_the_run_a_device_stays_or_goes(stay: bool) -> None:
    device = Harness(stay=stay)
    device.join()
    finish(device, make_round())
    device.hear(make_round(3, phase="finished"))
    assert device.core.phase is Phase.FINISHED
    assert device.core.finished is not stay
    assert device.core.problem is None


def test_a_device_that_stays_takes_part_in_the_next_run() -> None:
    device = Harness(stay=True)
    device.join()
    device.hear(make_round(3, phase="finished"))
    device.hear(make_assignment(run="next"), make_round(run="next"))
    device.hear(make_parameters(0, run="next"), receipt_of(make_round(run="next"), complete=True))
    assert {m.run for m in every(Activations, device.work())} == {"next"}


# -- cut auto -------------------------------------------------------------------------------------


def test_a_device_without_a_cut_measures_itself_and_its_uplink() -> None:
    device = Harness(hello=make_hello(cut=None))
    device.connect()
    probe = only(Request, device.hear(make_assignment(cut=None)))
    assert probe.what == "probe"
    assert len(probe.padding) > 64 << 10
    assert not device.core.has_work, "the probe is still on its way"
    device.uplink = 1e6
    hello = only(Hello, device.work())
    assert hello.measurement is not None
    assert hello.measurement.uplink_bytes_per_s == 1e6
    device.hear(make_assignment(cut=4), make_round())
    assert device.core.phase is Phase.FETCHING


def test_a_probe_that_is_lost_does_not_hold_up_the_measurement() -> None:
    device = Harness(hello=make_hello(cut=None))
    device.connect()
    device.hear(make_assignment(cut=None))
    device.wait(PROBE_WAIT_S - 0.1)
    assert not device.core.has_work
    device.wait(0.2)
    hello = only(Hello, device.work())
    assert hello.measurement is not None
    assert hello.measurement.uplink_bytes_per_s == 0


def test_a_device_that_cannot_measure_says_why() -> None:
    def measure(assignment: Assignment) -> Any:
        raise AssignmentError("not allowed")

    device = Harness(measure=measure)
    device.connect()
    device.hear(make_assignment(cut=None))
    device.uplink = 1.0
    device.work()
    assert device.core.finished
    assert device.core.problem == "not allowed"


# -- answering images -----------------------------------------------------------------------------


def exam(*images: tuple[int, float, int]) -> FakeData:
    """Batches of one image: what the exit says, how sure it is of it, and the truth."""
    batches: list[tuple[Array, Array]] = []
    for answer, sure, label in images:
        pixels = np.zeros((1, 1, SIZE, SIZE), np.float32)
        pixels[0, 0, 0, :2] = answer, sure
        batches.append((pixels, np.array([label])))
    return FakeData(batches)


def start_answering(device: Harness) -> None:
    device.connect()
    device.hear(make_assignment(), make_round(3, phase="inference", version=7))
    device.hear(make_parameters(7))


def test_it_answers_by_its_exit_or_asks_and_reports_until_the_run_is_over() -> None:
    device = Harness(data=exam((1, 1.0, 1), (0, 0.0, 2), (0, 0.0, 3)))
    start_answering(device)
    first, second = every(Features, device.work())
    assert first.version == 7
    right, wrong = probabilities_of(2), probabilities_of(2)
    device.hear(Prediction(request=second.request, version=7, tensor=wrong))
    device.hear(Prediction(request=first.request, version=7, tensor=right))
    report = only(Report, device.work())
    assert report.inference is not None
    assert report.inference.images == 3
    assert (report.inference.exits, report.inference.offloads) == (1, 2)
    assert report.inference.correct == 2
    assert device.core.phase is Phase.REPORTING
    assert every(Report, device.wait(10)), "reports are not acknowledged: it says it again"
    assert device.hear(make_round(3, phase="inference", version=7)) == []
    device.hear(make_round(3, phase="finished", version=7))
    assert not every(Report, device.wait(100))
    assert device.core.finished


def test_without_an_answer_the_exits_own_counts() -> None:
    device = Harness(data=exam((2, 0.1, 2)))
    start_answering(device)
    device.work()
    device.wait(6)
    report = only(Report, device.work())
    assert report.inference is not None
    assert (report.inference.timeouts, report.inference.correct) == (1, 1)


def test_a_device_without_test_images_reports_at_once() -> None:
    device = Harness()
    start_answering(device)
    report = only(Report, device.work())
    assert report.inference is not None
    assert report.inference.images == 0


# -- anything, in any order -----------------------------------------------------------------------

ROUNDS = st.builds(
    make_round,
    st.integers(1, 2),
    attempt=st.integers(0, 1),
    version=st.integers(0, 2),
    phase=st.sampled_from(["training", "training", "gathering", "inference", "finished"]),
    run=st.sampled_from([RUN, RUN, RUN, "other"]),
)
RANGES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=2)
RECEIPTS = st.builds(
    receipt_of,
    ROUNDS,
    applied=RANGES,
    discarded=st.dictionaries(st.sampled_from(["late", "wrong_shape"]), RANGES, max_size=2),
    credits=st.integers(0, 3),
    next_batch=st.integers(0, 5),
    complete=st.booleans(),
    participant=st.booleans(),
    final=st.booleans(),
)
TENSORS = st.sampled_from(
    [GRADIENT, b"", b"rubbish", parse_codec("fp32").encode(np.full((8, 1), np.nan, np.float32))]
)
MESSAGES = st.one_of(
    st.builds(
        make_assignment,
        run=st.sampled_from([RUN, RUN, "other"]),
        cut=st.sampled_from([2, 2, None]),
        feedback=st.sampled_from(["gradient", "none"]),
        quota=st.integers(1, 4),
    ),
    ROUNDS,
    ROUNDS,
    RECEIPTS,
    RECEIPTS,
    st.builds(
        Gradients,
        run=st.just(RUN),
        round=st.integers(1, 2),
        attempt=st.integers(0, 1),
        batch=st.integers(0, 4),
        loss=st.just(1.0),
        correct=st.just(0),
        tensor=TENSORS,
    ),
    st.builds(make_parameters, st.integers(0, 2)),
    st.builds(make_parameters, st.integers(0, 2), state=TENSORS),
    st.builds(make_manifest, st.integers(0, 2), st.sampled_from([10.0, 11.0])),
    st.builds(
        Prediction,
        request=st.integers(0, 2),
        version=st.integers(0, 2),
        tensor=st.one_of(
            st.none(),
            TENSORS,
            st.just(probabilities_of(1)),
            st.just(parse_codec("fp32").encode(np.ones(1, np.float32))),
        ),
    ),
    st.builds(
        Coordinator, state=st.sampled_from(["online", "offline"]), boot=st.sampled_from("ab")
    ),
)


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(
        st.one_of(
            MESSAGES,
            st.sampled_from(["connect", "disconnect", "work", "work", "uplink"]),
            st.floats(0, 40),
        ),
        max_size=50,
    ),
    ready=st.booleans(),
)
def test_whatever_arrives_in_whatever_order_the_books_balance(
    events: list[Message | str | float], ready: bool
) -> None:
    device = Harness(stay=True, data=exam((1, 0.0, 1), (0, 0.9, 2), (0, 0.0, 3)))
    if ready:
        device.join()
    for event in events:
        if isinstance(event, Message):
            device.hear(event)
        elif isinstance(event, float):
            device.wait(event)
        elif event == "work":
            device.work()
        elif event == "uplink":
            device.uplink = 1e6
        else:
            getattr(device, event)()
    device.hear(make_round(2, phase="finished"))
    for report in every(Report, device.said):
        if report.inference is None:
            assert report.produced == (
                report.applied + sum(report.discarded.values()) + report.expired
            )
        else:
            inference = report.inference
            assert inference.images == inference.exits + inference.offloads == 3
            assert inference.offloads == (
                inference.answered + inference.refused + inference.timeouts
            )
    made = [(m.stamp, m.batch) for m in every(Activations, device.said)]
    assert all(batch < 4 for _, batch in made)


def test_the_fakes_are_what_the_state_machine_takes() -> None:
    learner: Learner = FakeLearner()
    assert learner.state().keys() == {"weight"}
    assert make_measurement().cores == 1
