"""An exit that also learns from what the whole network answered."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from broker.training_messages import Gradients
from edge_agent.errors import TrainingError
from edge_agent.trainer import DeviceTrainer
from tensors.codecs import parse_codec
from tensors.networks import CutNetwork, build_network, read_state
from tests.attempt_desk import Desk, answer_to
from tests.tiny import CLASSES, CPU, SPEC, assert_close, assert_same, make_batch

CUT = 3
WEIGHT, TEMPERATURE = 0.7, 2.5


def make_half() -> CutNetwork:
    return copy.deepcopy(build_network(SPEC, seed=0).device_half(CUT))


def make_trainer(weight: float = WEIGHT, *, exit_weight: float = 0.5) -> DeviceTrainer:
    trainer = DeviceTrainer(
        make_half(),
        CPU,
        exit_weight=exit_weight,
        feedback_weight=1.5,
        momentum=0.9,
        weight_decay=0.01,
        distill_weight=weight,
        distill_temperature=TEMPERATURE,
    )
    trainer.set_learning_rate(0.1)
    return trainer


def answers(seed: int) -> Tensor:
    return torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(seed))


def gradient_of(features: Tensor, seed: int) -> Tensor:
    return 0.01 * torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))


def test_all_three_losses_make_one_step_at_the_snapshot() -> None:
    """Two batches are out; the reference keeps a copy of the network for each."""
    trainer, network = make_trainer(), make_half().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batches = [make_batch(seed=seed) for seed in range(4)]
    snapshots: dict[int, CutNetwork] = {}
    features: dict[int, Tensor] = {}

    def learn(batch: int) -> None:
        trainer.backward(batch, gradient_of(features[batch], batch), answers(batch))
        snapshot = snapshots.pop(batch)
        images, labels = map(torch.from_numpy, batches[batch])
        at_cut = snapshot(images)
        logits = snapshot.exit(at_cut, CUT)
        wanted = (answers(batch) / TEMPERATURE).softmax(1)
        given = (logits / TEMPERATURE).log_softmax(1)
        distance = (wanted * (wanted.log() - given)).sum(1).mean()
        loss = 0.5 * F.cross_entropy(logits, labels)
        loss = loss + 1.5 * (at_cut * gradient_of(at_cut, batch)).sum()
        (loss + WEIGHT * TEMPERATURE**2 * distance).backward()
        for own, old in zip(network.parameters(), snapshot.parameters(), strict=True):
            own.grad = old.grad
        optimizer.step()

    for number, (images, labels) in enumerate(batches):
        features[number] = trainer.forward(number, images, labels)
        snapshots[number] = copy.deepcopy(network)
        with torch.no_grad():  # BatchNorm's buffers advance once a batch
            network.exit(network(torch.from_numpy(images)), CUT)
        if number:
            learn(number - 1)
    learn(3)
    assert_close(trainer.state(), read_state(network), rtol=1e-4)


def test_with_no_other_loss_the_exit_comes_to_answer_as_the_whole_network() -> None:
    trainer = make_trainer(1.0, exit_weight=0.0)
    images, labels = make_batch()
    teacher = 3 * F.one_hot((torch.from_numpy(labels) + 1) % CLASSES, CLASSES).float()
    outcomes = []
    for batch in range(60):
        trainer.forward(batch, images, labels)
        outcomes.append(trainer.backward(batch, None, teacher))
    assert outcomes[-1].correct == 0, "it answers what it was taught, not the labels"


def test_without_a_weight_answers_change_nothing() -> None:
    states = []
    for teacher in (None, answers(0)):
        trainer = make_trainer(0.0)
        trainer.forward(0, *make_batch())
        trainer.backward(0, None, teacher)
        states.append(trainer.state())
    assert_same(*states)


@pytest.mark.parametrize(
    ("teacher", "word"),
    [(torch.zeros(8, CLASSES + 1), "shape"), (torch.full((8, CLASSES), np.inf), "not finite")],
)
def test_answers_that_cannot_be_learnt_from_leave_the_step_out(teacher: Tensor, word: str) -> None:
    trainer = make_trainer()
    trainer.forward(0, *make_batch())
    before = trainer.state()
    with pytest.raises(TrainingError, match=word):
        trainer.backward(0, None, teacher)
    assert_same(trainer.state(), before)
    assert not trainer.in_flight


# -- from the message to the learner --------------------------------------------------------------


def answer_with(logits: bytes | None) -> Gradients:
    return answer_to(0).model_copy(update={"logits": logits})


def taught(desk: Desk, logits: bytes | None) -> np.ndarray | None:
    desk.produce()
    desk.attempt.gradient(answer_with(logits))
    desk.attempt.learn()
    (teacher,) = desk.learner.taught
    return teacher


def test_answers_on_the_wire_reach_the_learner() -> None:
    sent = answers(1).numpy()
    teacher = taught(Desk(distill_weight=1.0), parse_codec("fp16").encode(sent))
    assert teacher is not None
    np.testing.assert_allclose(teacher, sent, rtol=1e-3)


def test_they_are_not_looked_at_where_nothing_is_to_be_learnt_from_them() -> None:
    assert taught(Desk(), b"rubbish") is None
    assert taught(Desk(distill_weight=1.0), None) is None


def test_an_answer_that_cannot_be_read_leaves_the_exits_own_loss() -> None:
    desk = Desk(distill_weight=1.0)
    assert taught(desk, b"rubbish") is None
    assert desk.learner.learnt == [(0, False)]
