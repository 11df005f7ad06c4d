"""The whole network's answers, on their way to the exits."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from broker.config import load_settings
from broker.errors import ConfigError
from broker.messages import Assignment
from broker.training_messages import Activations, Gradients
from coordinator import replies
from coordinator.cascade import Cascade
from coordinator.engines import Averaging, Engine, Sequential
from coordinator.gradients import GradientEncoder
from coordinator.orders import assignment
from coordinator.registry import Device
from coordinator.server_copy import Entry, Step
from coordinator.settings import CoordinatorSettings
from tensors.codecs import parse_codec
from tensors.decoding import decode
from tensors.format import CodecId, read_header
from tests.server_side import NETWORK, START, features_at, make_activations
from tests.tiny import CLASSES, CPU, make_hello, make_settings

STAMP = ("run", 1, 0)
KINDS: list[type[Sequential | Averaging | Cascade]] = [Sequential, Averaging, Cascade]


def engine_of(kind: type[Sequential | Averaging | Cascade]) -> Engine:
    engine = kind(copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0)
    engine.begin(START, 0.05)
    return engine


def expected_logits(cut: int, features: np.ndarray) -> np.ndarray:
    network = copy.deepcopy(NETWORK).train()
    with torch.no_grad():
        logits: np.ndarray = network(torch.from_numpy(features), start=cut).numpy()
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_answers_from_before_it(kind: type[Sequential | Averaging]) -> None:
    features = features_at(3)
    batch = Entry("d", 3, torch.from_numpy(features), torch.arange(8) % CLASSES)
    step = engine_of(kind).step(batch, want_gradient=True)
    assert step.logits is not None
    assert not step.logits.requires_grad
    np.testing.assert_allclose(step.logits.numpy(), expected_logits(3, features), rtol=1e-4)


def test_in_a_joint_step_everybody_gets_the_answers_to_its_own_images() -> None:
    entries = [
        Entry(name, cut, torch.from_numpy(features_at(cut, seed, size)), torch.arange(size) % 4)
        for name, cut, seed, size in (("a", 5, 0, 8), ("b", 2, 1, 4), ("c", 5, 2, 6))
    ]
    engine = engine_of(Cascade)
    outcomes = engine.step_together(entries, want_gradients=True)
    for entry, outcome in zip(entries, outcomes, strict=True):
        assert isinstance(outcome, Step)
        assert outcome.logits is not None
        hits = int((outcome.logits.argmax(1) == entry.labels).sum())
        assert (len(outcome.logits), hits) == (len(entry.labels), outcome.correct)
        loss = torch.nn.functional.cross_entropy(outcome.logits, entry.labels)
        assert loss.item() == pytest.approx(outcome.loss, rel=1e-5)


def sent(answers: torch.Tensor, **encoder: Any) -> tuple[Gradients, Activations]:
    activations = make_activations(STAMP, 0, cut=2, version=0)
    gradient = 0.01 * torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = Step(1.0, 2, 8, gradient, answers)
    options = {"masked": False} | encoder
    encoder_ = GradientEncoder(parse_codec("int8+zstd"), **options)
    message = replies.gradients(STAMP, "a", activations, gradient, encoder_, step).message
    assert isinstance(message, Gradients)
    return message, activations


def test_they_go_with_the_gradient_as_float16() -> None:
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
    message, _ = sent(logits, logits=True)
    assert message.logits is not None
    assert read_header(message.logits).codec is CodecId.FP16
    np.testing.assert_allclose(decode(message.logits), logits, rtol=1e-3, atol=1e-6)


def test_answers_too_large_for_float16_go_as_float32() -> None:
    logits = torch.full((8, CLASSES), 1e6)
    message, _ = sent(logits, logits=True)
    assert message.logits is not None
    np.testing.assert_array_equal(decode(message.logits), logits)


def test_they_stay_away_if_nobody_wants_them() -> None:
    assert sent(torch.zeros(8, CLASSES))[0].logits is None


def test_they_count_in_the_budget() -> None:
    with_them, _ = sent(torch.zeros(8, CLASSES), logits=True, bytes_per_sample=60)
    alone, _ = sent(torch.zeros(8, CLASSES), bytes_per_sample=60)
    assert with_them.logits is not None
    assert len(alone.tensor) <= 1.05 * 8 * 60
    assert len(with_them.tensor) <= 1.05 * (8 * 60 - len(with_them.logits))


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"distill_weight": 1, "feedback": "none"}, ["distill_weight = 1", "feedback = gradient"]),
        ({"distill_weight": -1}, ["distill_weight", "greater than or equal to 0"]),
        ({"distill_temperature": 0}, ["distill_temperature", "greater than 0"]),
        ({"exit_weight": 0, "feedback_weight": 0}, ["exit_weight", "distill_weight", "nothing"]),
    ],
)
def test_settings_that_cannot_be(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(CoordinatorSettings, section="coordinator", flags=flags)
    for word in words:
        assert word in str(caught.value)


def test_an_exit_can_learn_from_the_whole_network_alone() -> None:
    make_settings(exit_weight=0, feedback_weight=0, distill_weight=1)


def test_devices_are_told() -> None:
    device = Device("a", cut=2, hello=make_hello())
    settings = make_settings(distill_weight=0.5, distill_temperature=4)
    message = assignment(settings, "run", device, 2).message
    assert isinstance(message, Assignment)
    assert (message.distill_weight, message.distill_temperature) == (0.5, 4)
    assert {"distill_weight", "distill_temperature"} <= settings.identity().keys()
