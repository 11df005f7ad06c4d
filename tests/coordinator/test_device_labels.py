"""A round in which devices keep the labels: open batches, their gradients, and the books."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.fields import Message
from broker.training_messages import FeatureGradients, Gradients, LastFeatures, Receipt, from_ranges
from coordinator.aggregation import Aggregation, block_of, half_of
from coordinator.device_labels import RoundWithDeviceLabels
from coordinator.engines import Averaging, Sequential
from coordinator.errors import BatchRefused, DeviceRefused
from coordinator.gradients import GradientEncoder
from coordinator.intake import Intake
from coordinator.placement import Placement
from coordinator.rounds import Work
from tensors.codecs import encode_exact, parse_codec
from tensors.decoding import decode
from tensors.networks import read_state
from tensors.parameters import pack_parameters
from tests.coordinator.test_training import Counting
from tests.server_side import NETWORK, SHAPES, START, STATE, make_activations, make_upload
from tests.tiny import CLASSES, CPU, RUN, Clock, assert_same, make_hello, make_settings

STAMP, VERSION, QUOTA = (RUN, 3, 1), 2, 6
LAST = NETWORK.stop - 1
CUT = {"a": 2, "b": 5}


class Desk:
    """A round of device ``a`` at cut 2 and device ``b`` at cut 5; ``credits_`` each."""

    def __init__(
        self,
        *,
        strategy: type[Averaging | Sequential] = Averaging,
        feedback: bool = True,
        credits_: int = 2,
    ) -> None:
        self.clock, self.observer = Clock(), Counting()
        self.round = RoundWithDeviceLabels(
            strategy(copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0, classifier=False),
            START,
            0.05,
            codec=parse_codec("fp32"),
            intake=Intake(
                SHAPES, classes=CLASSES, batch_size=9, channels_last=False, classifier=LAST
            ),
            gradients=GradientEncoder(parse_codec("fp32"), masked=True) if feedback else None,
            device_copies=True,
            barrier=True,
            kept=2,
            grant=lambda cut, devices: credits_,
            observer=self.observer,
            clock=self.clock,
        )
        work = {name: Work(cut, QUOTA) for name, cut in CUT.items()}
        self.round.open(STAMP, VERSION, work, first_server_block=2)

    def send(self, batch: int, device: str = "a", **changes: Any) -> list[Message]:
        fields = {"labels": []} | changes
        message = make_activations(STAMP, batch, cut=CUT[device], version=VERSION, **fields)
        return [envelope.message for envelope in self.round.activations(device, message)]

    def answer(self, batch: int, device: str = "a", tensor: bytes | None = None) -> list[Message]:
        message = gradient_of(batch, tensor)
        return [envelope.message for envelope in self.round.gradients(device, message)]

    def upload(self, device: str = "a", produced: int = QUOTA) -> list[Message]:
        state = read_state(NETWORK.device_half(CUT[device], classifier=True))
        grown = {n: v if v.dtype.kind == "i" else v + np.float32(0.25) for n, v in state.items()}
        message = make_upload(
            STAMP,
            cut=CUT[device],
            version=VERSION,
            produced=produced,
            state=pack_parameters(grown),
        )
        brought, out = self.round.parameters(device, message)
        if brought is not None:
            self.round.add(brought)
        return [envelope.message for envelope in out]

    def account(self, device: str = "a") -> dict[str, Any]:
        account: dict[str, Any] = self.round.entry(device)["account"]
        assert account["produced"] == (
            account["applied"] + sum(account["discarded"].values()) + account["expired"]
        )
        return account


def gradient_of(batch: int, tensor: bytes | None = None) -> FeatureGradients:
    if tensor is None:
        rng = np.random.default_rng(batch)
        tensor = encode_exact(0.01 * rng.standard_normal((8, *SHAPES[-1])).astype(np.float32))
    run, number, attempt = STAMP
    return FeatureGradients(run=run, round=number, attempt=attempt, batch=batch, tensor=tensor)


def test_activations_are_answered_with_last_features_and_their_gradient_with_one() -> None:
    desk = Desk()
    (found,) = desk.send(0)
    assert isinstance(found, LastFeatures)
    assert decode(found.tensor).shape == (8, *SHAPES[-1])
    assert desk.observer.applied == 0
    assert desk.account() == {"produced": 1, "applied": 0, "discarded": {}, "expired": 1}
    (back,) = desk.answer(0)
    assert isinstance(back, Gradients)
    assert (back.batch, back.loss, back.correct, back.logits) == (0, None, None, None)
    assert decode(back.tensor).shape == (8, *SHAPES[1])
    assert desk.account() == {"produced": 1, "applied": 1, "discarded": {}, "expired": 0}


@pytest.mark.parametrize("strategy", [Averaging, Sequential])
def test_what_comes_twice_is_answered_alike_and_counts_once(
    strategy: type[Averaging | Sequential],
) -> None:
    twice, once = Desk(strategy=strategy), Desk(strategy=strategy)
    for desk, times in ((twice, 2), (once, 1)):
        features = [desk.send(0) for _ in range(times)]
        gradients = [desk.answer(0) for _ in range(times)]
        assert all(each == features[0] for each in features)
        assert all(each == gradients[0] for each in gradients)
        assert desk.send(0) == gradients[0]
        desk.upload()
    assert twice.observer.applied == 1
    assert_same(twice.round.merge().state, once.round.merge().state)


def test_without_feedback_a_receipt_says_that_it_was_applied() -> None:
    desk = Desk(feedback=False, credits_=1)
    desk.send(0)
    (receipt,) = desk.answer(0)
    assert isinstance(receipt, Receipt)
    assert from_ranges(receipt.applied, limit=QUOTA) == {0}
    (again,) = desk.send(0)
    assert isinstance(again, Receipt)


def test_of_more_than_its_credits_the_oldest_is_given_up() -> None:
    desk = Desk()
    desk.send(0)
    desk.send(1)
    features, receipt = desk.send(2)
    assert isinstance(features, LastFeatures)
    assert isinstance(receipt, Receipt)
    assert list(receipt.discarded) == ["unanswered"]
    (late,) = desk.answer(0)
    assert isinstance(late, Receipt)
    assert desk.account()["discarded"] == {"unanswered": 1}
    desk.answer(1)
    desk.answer(2)
    assert desk.account() == {
        "produced": 3,
        "applied": 2,
        "discarded": {"unanswered": 1},
        "expired": 0,
    }


@pytest.mark.parametrize("strategy", [Averaging, Sequential])
def test_what_is_open_at_the_upload_and_at_the_end_is_given_up(
    strategy: type[Averaging | Sequential],
) -> None:
    desk = Desk(strategy=strategy)
    for device in CUT:
        desk.send(0, device)
        desk.answer(0, device)
        desk.send(1, device)
    (final,) = desk.upload(produced=2)
    assert isinstance(final, Receipt)
    assert final.final
    assert list(final.discarded) == ["unanswered"]
    desk.round.merge()
    for device in CUT:
        assert desk.account(device) == {
            "produced": 2,
            "applied": 1,
            "discarded": {"unanswered": 1},
            "expired": 0,
        }


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (encode_exact(np.zeros((7, *SHAPES[-1]), np.float32)), "wrong_shape"),
        (encode_exact(np.full((8, *SHAPES[-1]), np.nan, np.float32)), "not_finite"),
        (b"SFT", "truncated"),
    ],
)
def test_a_bad_gradient_costs_its_batch(tensor: bytes, reason: str) -> None:
    desk, other = Desk(), Desk()
    for each in (desk, other):
        each.send(0)
    (receipt,) = desk.answer(0, tensor=tensor)
    assert isinstance(receipt, Receipt)
    assert desk.account()["discarded"] == {reason: 1}
    assert desk.observer.applied == 0


def test_labels_come_where_the_coordinator_has_the_classifier_and_nowhere_else() -> None:
    desk = Desk()
    (receipt,) = desk.send(0, labels=[0] * 8)
    assert isinstance(receipt, Receipt)
    assert desk.account()["discarded"] == {"bad_labels": 1}
    intake = Intake(SHAPES, classes=CLASSES, batch_size=9, channels_last=False)
    message = make_activations(STAMP, 0, cut=2, version=VERSION, labels=[])
    with pytest.raises(BatchRefused, match="bad_labels"):
        intake.features(message, 2, VERSION)


def test_a_gradient_that_nobody_asked_for_is_dropped() -> None:
    desk = Desk()
    assert all(isinstance(each, Receipt) for each in desk.answer(4))
    (stranger,) = desk.round.gradients("stranger", gradient_of(0))
    assert isinstance(stranger.message, Receipt)
    assert not stranger.message.participant
    assert desk.observer.applied == 0


@pytest.mark.parametrize("copies", [True, False])
def test_the_classifier_is_the_mean_of_the_devices(copies: bool) -> None:
    aggregation = Aggregation(START, first_server_block=2, device_copies=copies, classifier=LAST)
    for device, weight, value in (("a", 1, 1.0), ("b", 3, 5.0)):
        half = half_of(STATE, CUT[device], classifier=LAST)
        filled = {
            name: v if v.dtype.kind == "i" else np.full_like(v, value) for name, v in half.items()
        }
        aggregation.add_device(filled, weight)
    merged = aggregation.result().state
    names = [name for name in STATE if block_of(name) == LAST]
    assert names
    for name in names:
        np.testing.assert_allclose(merged[name], 4.0, rtol=1e-6)


def test_the_server_must_have_a_block_and_every_device_trains() -> None:
    shapes = [tuple(shape) for shape in SHAPES]
    placement = Placement(make_settings(labels="device"), shapes, chunk_bytes=2**16)
    assert placement.deepest == LAST - 1
    assert placement.cut_of(None, make_hello(cut=LAST - 1)) == LAST - 1
    with pytest.raises(DeviceRefused, match="labels = device"):
        placement.cut_of(None, make_hello(cut=LAST))
    with pytest.raises(DeviceRefused, match="labels = server"):
        placement.cut_of(None, make_hello(frozen=True))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"strategy": "cascade"}, "averaging"), ({"loss_mads": 6.0}, "loss_mads")],
)
def test_settings_that_do_not_go_with_it(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_settings(labels="device", **changes)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("sgu"), st.integers(0, QUOTA)), max_size=25))
def test_in_whatever_order_things_come_the_books_add_up(script: list[tuple[str, int]]) -> None:
    """``s`` activations, ``g`` a gradient, ``u`` the upload; batches may repeat or be missing."""
    desk = Desk(credits_=2)
    applied: set[int] = set()
    for what, batch in script:
        before = desk.observer.applied
        if what == "s":
            desk.send(batch)
        elif what == "g":
            desk.answer(batch)
        else:
            desk.upload(produced=0)
        if desk.observer.applied > before:
            assert what == "g"
            assert batch not in applied
            applied.add(batch)
        account = desk.account()
        assert account["applied"] == len(applied)
        assert account["expired"] <= QUOTA
    desk.round.merge()
    assert desk.round.entry("a")["samples"] == 8 * len(applied)
