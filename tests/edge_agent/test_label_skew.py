"""A device whose exit accounts for which labels it has many of."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from edge_agent.meters import Meters
from edge_agent.offline import OfflineLimits
from edge_agent.trainer import DeviceTrainer
from edge_agent.workplace import Workplace
from tensors.networks import build_network, read_state
from tests.fake_device import DEVICE, FakeData, FakeLearner, MemorySnapshots
from tests.tiny import (
    CLASSES,
    CPU,
    SPEC,
    Clock,
    assert_close,
    make_assignment,
    make_batch,
    make_device_data,
)

COUNTS = np.array([50, 0, 3, 10])


def test_a_step_is_on_the_calibrated_loss() -> None:
    half = build_network(SPEC, seed=0).device_half(3)
    reference = copy.deepcopy(half).train()
    trainer = DeviceTrainer(
        half, CPU, exit_weight=1.0, feedback_weight=1.0, momentum=0.0, weight_decay=0.0
    )
    trainer.calibrate(COUNTS)
    trainer.set_learning_rate(0.1)
    images, labels = make_batch()
    trainer.forward(0, images, labels)
    outcome = trainer.backward(0, None)
    logits = reference.exit(reference(torch.from_numpy(images)), 3)
    shares = torch.from_numpy((COUNTS + 1) / (COUNTS + 1).sum()).float()
    loss = F.cross_entropy(logits + shares.log(), torch.from_numpy(labels))
    loss.backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    assert_close(trainer.state(), read_state(reference), rtol=1e-4)
    assert abs(outcome.loss - loss.item()) < 1e-5
    assert outcome.correct == int((logits.argmax(1).numpy() == labels).sum()), "plain logits answer"


def test_a_device_counts_its_own_labels() -> None:
    data = make_device_data(16)
    mine = replace(data, train_rows=np.flatnonzero(data.train.labels != 1))
    np.testing.assert_array_equal(mine.label_counts(CLASSES + 1), [4, 0, 4, 4, 0])


def learner_under(**assignment: object) -> FakeLearner:
    learner = FakeLearner()
    Workplace(
        DEVICE,
        make_assignment(**assignment),
        learner,
        FakeData(),
        uplink=lambda: 0.0,
        snapshots=MemorySnapshots(),
        clock=Clock(),
        offline=OfflineLimits(),
        meters=Meters(),
        cpu_clock=Clock(),
    )
    return learner


def test_the_assignment_says_whether_it_is_accounted_for() -> None:
    assert learner_under().counts is None
    counts = learner_under(label_skew="calibrated").counts
    np.testing.assert_array_equal(counts, FakeData().label_counts(CLASSES))
