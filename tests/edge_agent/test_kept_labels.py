"""A device that keeps its labels and the classifier: last features in, their gradient out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from broker.envelopes import Envelope
from broker.messages import KeptClassifier
from broker.serving_messages import Prediction
from broker.training_messages import Activations, FeatureGradients, LastFeatures
from edge_agent.answers import Answers
from edge_agent.errors import TrainingError
from edge_agent.exit_policy import ExitPolicy, Limits, Policy
from edge_agent.learner import LearnerFactory
from edge_agent.offline import OfflineLimits
from edge_agent.trainer import DeviceTrainer
from tensors.codecs import encode_exact, parse_codec
from tensors.decoding import decode
from tensors.errors import NetworkError
from tensors.losses import log_prior
from tensors.networks import build_network, feature_shapes
from tests.attempt_desk import Desk, balanced
from tests.fake_device import FakePredictor
from tests.tiny import CLASSES, CPU, RUN, SPEC, Array, Clock, make_assignment, make_batch

CLASSIFIER = KeptClassifier(gradient_codec="fp32")
NETWORK = build_network(SPEC)
BLOCKS = [NETWORK.blocks[str(index)] for index in range(NETWORK.stop)]
SHAPE = feature_shapes(BLOCKS, SPEC)[-2]
ONES = encode_exact(np.ones((8, 2), np.float32))


def make_desk(**settings: Any) -> Desk:
    return Desk(classifier=CLASSIFIER, **settings)


def last_features(batch: int, tensor: bytes = ONES) -> LastFeatures:
    return LastFeatures(run=RUN, round=1, attempt=0, batch=batch, tensor=tensor)


def classify(desk: Desk, batch: int, tensor: bytes = ONES) -> list[FeatureGradients]:
    desk.attempt.features(last_features(batch, tensor))
    out: list[Envelope] = []
    while desk.attempt.can_classify:
        out += desk.attempt.classify()
    messages = [envelope.message for envelope in out]
    assert all(isinstance(message, FeatureGradients) for message in messages)
    return messages  # type: ignore[return-value]


# -- the attempt ----------------------------------------------------------------------------------


def test_no_label_leaves_the_device() -> None:
    desk = make_desk()
    sent = desk.produce()
    assert [message.labels for message in sent] == [[], []]
    (gradient,) = classify(desk, 0)
    np.testing.assert_array_equal(decode(gradient.tensor), 0.5 * np.ones((8, 2)))
    (learnt,) = desk.learner.classified
    assert learnt[0] == 0
    assert len(learnt[1]) == 8
    assert gradient.model_dump().keys() == {"run", "round", "attempt", "batch", "tensor"}


def test_the_classifier_learns_from_a_batch_once() -> None:
    desk = make_desk()
    desk.produce()
    assert len(classify(desk, 0)) == 1
    assert classify(desk, 0) == []
    assert classify(desk, 3) == []
    assert [batch for batch, _ in desk.learner.classified] == [0]


def test_what_is_said_again_is_the_last_that_was_said() -> None:
    desk = make_desk()
    desk.produce()
    (gradient,) = classify(desk, 1)
    again = [envelope.message for envelope in desk.attempt.unanswered()]
    assert isinstance(again[0], Activations)
    assert again[1] == gradient


@pytest.mark.parametrize("feedback", ["gradient", "none"])
def test_the_time_out_begins_anew_and_ends_the_wait(feedback: str) -> None:
    desk = make_desk(feedback=feedback)
    desk.produce()
    desk.clock.advance(8)
    classify(desk, 0)
    desk.clock.advance(4)
    desk.attempt.tick()
    assert desk.attempt.out == 1
    assert classify(desk, 1) == [], "it came too late"
    desk.clock.advance(8)
    desk.attempt.tick()
    assert desk.attempt.out == 0
    assert desk.report.timeouts == 2
    assert balanced(desk.report)


@pytest.mark.parametrize("tensor", [b"SFT", encode_exact(np.full((8, 2), np.nan, np.float32))])
def test_features_that_are_no_use_cost_their_batch(tensor: bytes) -> None:
    desk = make_desk()
    desk.produce()
    assert classify(desk, 0, tensor) == []
    assert desk.attempt.out == 1
    assert desk.report.discarded == {"not_finite": 1}
    assert desk.learner.learnt == [(0, False)], "at its exit alone"
    assert balanced(desk.report)


def test_kept_batches_have_their_labels_with_them() -> None:
    desk = make_desk(feedback="none", credits=4, offline=OfflineLimits(batches=4))
    desk.produce()
    (gradient,) = classify(desk, 0)
    desk.interrupt()
    desk.produce()
    desk.online = True
    sent = []
    while desk.attempt.can_produce():
        sent += [envelope.message for envelope in desk.attempt.produce()]
    assert sent[0] == gradient
    assert all(isinstance(message, Activations) for message in sent[1:])
    for batch in range(1, len(sent)):
        assert len(classify(desk, batch)) == 1
    desk.receipt(applied=[(0, 3)])
    assert desk.attempt.complete


# -- the trainer ----------------------------------------------------------------------------------


def make_trainer(**settings: Any) -> DeviceTrainer:
    fields: dict[str, Any] = {"exit_weight": 1.0, "feedback_weight": 1.0}
    fields |= {"momentum": 0.9, "weight_decay": 1e-3}
    half = build_network(SPEC).device_half(2, classifier=True)
    trainer = DeviceTrainer(half, CPU, **(fields | settings))
    trainer.set_learning_rate(0.05)
    return trainer


def features(seed: int) -> torch.Tensor:
    made = np.random.default_rng(seed).standard_normal((8, *SHAPE))
    return torch.from_numpy(np.maximum(made, 0).astype(np.float32))


@pytest.mark.parametrize("skewed", [False, True])
def test_the_classifier_makes_plain_steps(skewed: bool) -> None:
    trainer, plain = make_trainer(), build_network(SPEC).blocks[str(NETWORK.stop - 1)]
    counts = np.array([40, 1, 1, 6])
    prior = log_prior(counts) if skewed else torch.zeros(CLASSES)
    if skewed:
        trainer.calibrate(counts)
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True
    )
    before = {n: v for n, v in trainer.state().items() if not n.startswith("blocks.9")}
    for seed in range(3):
        _, labels = make_batch(seed=seed)
        leaf = features(seed).requires_grad_()
        optimizer.zero_grad()
        F.cross_entropy(plain(leaf) + prior, torch.from_numpy(labels)).backward()
        optimizer.step()
        torch.testing.assert_close(trainer.classify(seed, features(seed), labels), leaf.grad)
    state = trainer.state()
    for name, value in plain.state_dict().items():
        np.testing.assert_allclose(state[f"blocks.9.{name}"], value.numpy(), rtol=1e-6)
    for name, value in before.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


@pytest.mark.parametrize(
    "bad", [features(0) * torch.inf, features(0)[:, :, 0, 0][:, :3], features(0)[:5]]
)
def test_a_step_that_cannot_be_made_is_left_out(bad: torch.Tensor) -> None:
    trainer = make_trainer()
    before = trainer.state()
    with pytest.raises(TrainingError):
        trainer.classify(0, bad, make_batch()[1])
    for name, value in trainer.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_the_exit_is_taught_by_the_devices_own_classifier() -> None:
    taught, told = (make_trainer(distill_weight=1.0, distill_temperature=2.0) for _ in range(2))
    images, labels = make_batch()
    gradient = 0.01 * torch.ones_like(taught.forward(0, images, labels))
    told.forward(0, images, labels)
    classifier = build_network(SPEC).blocks["9"]
    logits = classifier(features(0)).detach()
    for trainer in (taught, told):
        trainer.classify(0, features(0), labels)
    told._in_flight[0].teacher = None
    taught.backward(0, gradient)
    told.backward(0, gradient, logits)
    for name, value in taught.state().items():
        np.testing.assert_allclose(value, told.state()[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_the_server_must_have_a_block() -> None:
    factory = LearnerFactory(device="cpu", precision="fp32", memory_format="contiguous")
    assignment = make_assignment(cut=9, classifier=CLASSIFIER)
    with pytest.raises(NetworkError, match="cuts 1 to 8"):
        factory.build(assignment)
    assert "blocks.9.fc.weight" in factory.build(make_assignment(classifier=CLASSIFIER)).state()


# -- answers --------------------------------------------------------------------------------------


class Classifying(FakePredictor):
    """Its classifier takes the first values of last features for logits, if they have four."""

    def classify(self, features: Array) -> Array:
        if features.ndim != 2 or features.shape[1] != CLASSES:
            raise ValueError("other features")
        powers = np.exp(features.astype(np.float64))
        answers: Array = powers / powers.sum(axis=1, keepdims=True)
        return answers


@pytest.mark.parametrize(
    ("returned", "by"),
    [
        (np.array([[0.0, 0.0, 9.0, 0.0]], np.float32), "server"),
        (np.array([[0.0, np.nan, 9.0, 0.0]], np.float32), "fallback"),
        (np.zeros((1, 3), np.float32), "fallback"),
        (np.zeros((2, CLASSES), np.float32), "fallback"),
    ],
)
def test_the_device_answers_with_its_classifier(returned: Array, by: str) -> None:
    clock = Clock()
    answers = Answers(ExitPolicy(Limits(), seed=0, clock=clock), clock=clock)
    policy = Policy(rule="max_softmax", threshold=0.9, timeout_s=5.0)
    answers.use(RUN, 1, Classifying(), policy, parse_codec("fp32"), classifies=True)
    images = np.zeros((1, 1, 8, 8), np.float32)
    images[0, 0, 0, 1] = 0.2
    answers.ask(images)
    (question,) = answers.work()
    answers.answer(Prediction(request=question.request, version=1, tensor=encode_exact(returned)))
    ((_, answer),) = answers.take()
    assert answer.by == (by,)  # type: ignore[union-attr]
    if by == "server":
        assert answer.labels.tolist() == [2]  # type: ignore[union-attr]
