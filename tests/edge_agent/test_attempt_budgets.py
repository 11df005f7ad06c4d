"""How many bytes an attempt's activations take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from broker.envelopes import encode_message
from broker.training_messages import Activations
from edge_agent.encoding import LINK_SHARE
from edge_agent.figures import Outcome
from tensors.format import read_header
from tensors.rate import TOLERANCE
from tests.attempt_desk import Desk
from tests.fake_device import FakeLearner
from tests.tiny import Array, Clock

STEP_S = 0.4


class BusyLearner(FakeLearner):
    """Takes its time on a clock, and has features that fill a link."""

    def __init__(self) -> None:
        super().__init__()
        self.clock: Clock | None = None
        self._noise = np.random.default_rng(0)

    def forward(self, batch: int, images: Array, labels: Array) -> Array:
        super().forward(batch, images, labels)
        self._wait()
        features = self._noise.standard_normal((len(labels), 16, 8, 8))
        return np.maximum(features, 0).astype(np.float32)

    def backward(self, batch: int, gradient: Any | None, teacher: Any | None = None) -> Outcome:
        self._wait()
        return super().backward(batch, gradient, teacher)

    def _wait(self) -> None:
        assert self.clock is not None
        self.clock.advance(STEP_S / 2)


def busy_desk(**assignment: Any) -> Desk:
    learner = BusyLearner()
    desk = Desk(learner=learner, quota=100, **({"activation_codec": "int8+zstd"} | assignment))
    learner.clock = desk.clock
    return desk


def send(desk: Desk, count: int) -> list[Activations]:
    """As many batches, each answered."""
    sent: list[Activations] = []
    while len(sent) < count:
        for message in desk.produce():
            desk.answer(message.batch)
            sent.append(message)
    return sent


def levels_of(messages: list[Activations]) -> list[int]:
    return [read_header(message.tensor).top + 1 for message in messages]


def wire_bytes(message: Activations) -> int:
    return sum(map(len, encode_message(message)))


def test_bits_follow_a_link_that_slows_down_and_recovers() -> None:
    desk = busy_desk(follow_link=True)
    assert set(levels_of(send(desk, 4))) == {256}, "nothing is known of the link yet"
    seen = {}
    for uplink in (12_000.0, 5_000.0, 12_001.0, 1e9):
        desk.uplink = uplink
        sent = send(desk, 8)
        seen[uplink] = levels_of(sent)[2:]
        if uplink < 1e9:
            for message in sent[2:]:
                assert wire_bytes(message) / uplink <= LINK_SHARE * STEP_S * (1 + TOLERANCE)
    assert max(seen[5_000.0]) < min(*seen[12_000.0], *seen[12_001.0])
    assert max(seen[12_000.0]) < 256
    assert set(seen[1e9]) == {256}, "never more than the codec's own"
    assert desk.learner.learnt == [(batch, True) for batch in range(36)]


@pytest.mark.parametrize("budget", [20.0, 250.0, 700.0])
def test_a_message_keeps_to_its_bytes_per_sample(budget: float) -> None:
    sent = send(busy_desk(bytes_per_sample=budget), 10)
    sizes = [wire_bytes(message) for message in sent]
    if budget == 20:
        assert set(levels_of(sent)) == {3}, "too small for any"
    else:
        assert max(sizes) <= 8 * budget * (1 + TOLERANCE)
        assert np.mean(sizes[2:]) > 8 * budget * 0.6


def test_the_smaller_of_two_budgets_counts() -> None:
    desk = busy_desk(bytes_per_sample=500.0, follow_link=True)
    alone, wide = send(desk, 4), send(busy_desk(bytes_per_sample=500.0), 4)
    assert levels_of(alone) == levels_of(wide), "without a known link it is the other"
    desk.uplink = 5_000.0
    assert max(levels_of(send(desk, 4))) < min(levels_of(alone))


def test_what_was_learnt_lasts_longer_than_an_attempt() -> None:
    desk = busy_desk(bytes_per_sample=300.0)
    first = levels_of(send(desk, 6))
    again = Desk(learner=desk.learner, quota=100, encoder=desk.encoder)
    again.clock = desk.clock
    assert levels_of(send(again, 1))[0] in first[-3:]


@pytest.mark.parametrize(("codec", "bits"), [("fp32", 32), ("int4", 4), ("int8+zstd", 5)])
def test_the_report_says_what_activations_took(codec: str, bits: int) -> None:
    desk = busy_desk(activation_codec=codec)
    assert desk.report.activation_levels is None
    sent = send(desk, 2)
    report = desk.report
    assert report.activation_bytes == sum(len(message.tensor) for message in sent)
    assert report.activation_values == 2 * 8 * 16 * 8 * 8
    assert 8 * report.activation_bytes / report.activation_values == pytest.approx(bits, abs=0.5)
    assert report.activation_levels == {"fp32": None, "int4": 16, "int8+zstd": 256}[codec]


def test_the_report_has_the_mean_of_the_levels() -> None:
    desk = busy_desk(bytes_per_sample=300.0)
    levels = levels_of(send(desk, 5))
    assert desk.report.activation_levels == pytest.approx(np.mean(levels))
    assert min(levels) < 256
