"""The server network accounts for which labels each device sends many of."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from broker.training_messages import Activations
from coordinator.cascade import Cascade
from coordinator.engines import Averaging, Sequential
from coordinator.gradients import GradientEncoder
from coordinator.intake import Intake
from coordinator.label_counts import LabelCounts
from coordinator.observer import Observer
from coordinator.registry import Registry
from coordinator.rounds import Work
from coordinator.server_copy import Entry, Step
from coordinator.training import RoundInProgress
from tensors.codecs import parse_codec
from tensors.losses import log_prior
from tests.server_side import NETWORK, SHAPES, START, features_at, make_activations
from tests.tiny import CLASSES, CPU, Clock, make_hello

STAMP = ("run", 1, 0)
KINDS: dict[str, type[Sequential | Averaging | Cascade]] = {
    "sequential": Sequential,
    "averaging": Averaging,
    "cascade": Cascade,
}
SKEWED = log_prior(np.array([80, 1, 0, 3]))


def expected_loss(cut: int, seed: int, labels: torch.Tensor, prior: torch.Tensor | None) -> float:
    network = copy.deepcopy(NETWORK).train()
    logits = network(torch.from_numpy(features_at(cut, seed)), start=cut)
    return F.cross_entropy(logits if prior is None else logits + prior, labels).item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_on_the_calibrated_loss(kind: str) -> None:
    labels = torch.arange(8) % CLASSES
    for prior in (None, SKEWED):
        engine = KINDS[kind](copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0)
        engine.begin(START, 0.05)
        features = torch.from_numpy(features_at(3))
        step = engine.step(Entry("d", 3, features, labels, prior), want_gradient=True)
        assert step.loss == pytest.approx(expected_loss(3, 0, labels, prior), rel=1e-5)


def test_in_a_joint_step_every_batch_has_its_own() -> None:
    engine = Cascade(copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0)
    engine.begin(START, 0.05)
    labels = torch.arange(8) % CLASSES
    priors = [SKEWED, None, SKEWED.flip(0)]
    entries = [
        Entry(str(i), cut, torch.from_numpy(features_at(cut, i)), labels, prior)
        for i, (cut, prior) in enumerate(zip((5, 2, 4), priors, strict=True))
    ]
    outcomes = engine.step_together(entries, want_gradients=True)
    for prior, outcome in zip(priors, outcomes, strict=True):
        assert isinstance(outcome, Step)
        assert outcome.logits is not None
        calibrated = outcome.logits if prior is None else outcome.logits + prior
        assert outcome.loss == pytest.approx(F.cross_entropy(calibrated, labels).item(), rel=1e-5)


# -- what it counts -------------------------------------------------------------------------------


class Desk:
    """A round of device ``a`` at cut 2."""

    def __init__(self, kind: str = "averaging", labels: LabelCounts | None = None) -> None:
        self.round = RoundInProgress(
            KINDS[kind](copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0),
            START,
            0.05,
            intake=Intake(SHAPES, classes=CLASSES, batch_size=8, channels_last=False),
            gradients=GradientEncoder(parse_codec("fp32"), masked=True),
            device_copies=True,
            barrier=True,
            kept=2,
            grant=lambda cut, devices: 2,
            observer=Observer(),
            clock=Clock(),
        )
        self.round.open(STAMP, 0, {"a": Work(2, 9, labels)}, first_server_block=2)

    def send(self, batch: int, labels: list[int], **changes: Any) -> None:
        self.round.activations("a", self.batch(batch, labels, **changes))
        while self.round.gathered:
            self.round.train_gathered()

    def batch(self, number: int, labels: list[int], **changes: Any) -> Activations:
        return make_activations(STAMP, number, cut=2, version=0, labels=labels, **changes)

    @property
    def loss(self) -> float:
        (loss,) = self.round.record(0.0)["train_loss"].values()
        return float(loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_calibrated_by_what_came_before_and_itself(kind: str) -> None:
    seen = LabelCounts([10, 0, 0, 0])
    desk = Desk(kind, seen)
    labels = [0, 0, 0, 0, 0, 0, 1, 1]
    desk.send(0, labels)
    prior = log_prior(np.array([16, 2, 0, 0]))
    assert desk.loss == pytest.approx(expected_loss(2, 0, torch.tensor(labels), prior), rel=1e-5)
    assert seen.dump() == [16, 2, 0, 0]


def test_only_what_is_trained_on_is_counted_and_once() -> None:
    seen = LabelCounts([0] * CLASSES)
    desk = Desk(labels=seen)
    for _ in range(2):
        desk.send(0, [3] * 8)
    desk.send(1, [0] * 8, tensor=b"rubbish")
    desk.send(2, [CLASSES] * 8)
    assert seen.dump() == [0, 0, 0, 8]


def test_without_counts_the_loss_is_plain() -> None:
    desk = Desk()
    labels = [0, 0, 0, 0, 0, 0, 1, 1]
    desk.send(0, labels)
    assert desk.loss == pytest.approx(expected_loss(2, 0, torch.tensor(labels), None), rel=1e-5)


def test_counts_survive_in_the_checkpoint() -> None:
    registry, restored = Registry(2), Registry(2)
    one, other = registry.get("a"), registry.get("b")
    assert one is not None
    assert other is not None
    one.labels, one.hello = LabelCounts([3, 0, 1, 7]), make_hello()
    restored.restore(registry.dump())
    labels = restored.devices["a"].labels
    assert labels is not None
    assert labels.dump() == [3, 0, 1, 7]
    assert restored.devices["b"].labels is None
