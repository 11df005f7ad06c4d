from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.fields import Message
from broker.messages import Coordinator, Request
from broker.serving_messages import Prediction
from broker.training_messages import Activations, DeviceParameters, Gradients, Report
from edge_agent.learning import Learner
from edge_agent.offline import OfflineLimits
from tensors.codecs import parse_codec
from tests.fake_device import (
    GRADIENT,
    FakeLearner,
    Harness,
    every,
    exam,
    gradients,
    make_manifest,
    make_measurement,
    make_parameters,
    probabilities_of,
    receipt_of,
)
from tests.tiny import RUN, make_assignment, make_round

MOST_CREDITS = 3
ROUNDS = st.builds(
    make_round,
    st.integers(1, 2),
    attempt=st.integers(0, 1),
    version=st.integers(0, 2),
    phase=st.sampled_from(["training", "training", "gathering", "inference", "finished"]),
    run=st.sampled_from([RUN, RUN, RUN, "other"]),
    train_s=st.sampled_from([0.0, 0.0, 5.0]),
    barrier=st.sampled_from([True, False]),
)
RANGES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=2)
RECEIPTS = st.builds(
    receipt_of,
    ROUNDS,
    applied=RANGES,
    discarded=st.dictionaries(st.sampled_from(["late", "wrong_shape"]), RANGES, max_size=2),
    credits=st.integers(0, MOST_CREDITS),
    next_batch=st.integers(0, 5),
    quota=st.sampled_from([None, None, 0, 2, 4, 8, 2**53]),
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
        window=st.integers(1, 3),
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


@settings(max_examples=200)
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
    feedback=st.sampled_from(["gradient", "none"]),
    barrier=st.booleans(),
    kept=st.integers(0, 3),
)
def test_whatever_arrives_in_whatever_order_the_books_balance_and_it_can_go_on(
    events: list[Message | str | float], ready: bool, feedback: str, barrier: bool, kept: int
) -> None:
    device = Harness(
        stay=True,
        data=exam((1, 0.0, 1), (0, 0.9, 2), (0, 0.0, 3)),
        offline=OfflineLimits(batches=kept, expiry_s=20.0),
    )
    if ready:
        device.join(make_assignment(feedback=feedback), make_round(barrier=barrier))
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
        if device.core.attempt is not None:
            assert device.core.attempt.out <= MOST_CREDITS
            assert device.core.attempt.kept <= kept
    assert_it_trains(device, barrier=barrier)
    device.hear(make_round(9, phase="finished"))
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
    assert all(activations.batch < 8 for activations in every(Activations, device.said))


def assert_it_trains(device: Harness, *, barrier: bool) -> None:
    """Whatever was before, with a coordinator that does its part a whole round is made."""
    announced = make_round(8, version=7, barrier=barrier)
    device.connect()
    device.hear(Coordinator(state="online", boot="new"), make_assignment(run=RUN, seed=1))
    said = device.hear(announced)
    if not said:
        said = device.wait(35)
    applied: list[Any] = []
    for _ in range(100):
        answers: list[Message] = []
        for message in said:
            match message:
                case Request(what="parameters"):
                    answers += [make_manifest(7), make_parameters(7)]
                case Request(what="join") if message.round == 8:
                    answers.append(receipt_of(announced, complete=True))
                case Activations() if message.stamp == announced.stamp:
                    applied.append((message.batch, message.batch))
                    answers += [gradients(message), receipt_of(announced, applied=applied)]
                case DeviceParameters() if message.stamp == announced.stamp:
                    assert message.produced == 4
                    assert applied == [(batch, batch) for batch in range(4)]
                    device.hear(receipt_of(announced, complete=True, final=True, next_batch=4))
                    return
                case _:
                    pass
        said = device.hear(*answers) + device.work()
    raise AssertionError("the round never ends")


def test_the_fakes_are_what_the_state_machine_takes() -> None:
    learner: Learner = FakeLearner()
    assert learner.state().keys() == {"weight"}
    assert make_measurement().cores == 1
