"""Attackers do what they are called, so that what defences take back is that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.learner import LearnerFactory
from ops.bench_attacks import Scale, run_bench
from ops.errors import SettingsWrong
from ops.simulator.charging import FREE_STEP
from ops.simulator.hostile import Attack, HostileLearner, with_wrong_labels
from ops.simulator.program import Meter
from tests.tiny import CLASSES, make_assignment, make_batch, make_device_data


def learner(attack: Attack) -> HostileLearner:
    factory = LearnerFactory(device="cpu", precision="fp32", memory_format="contiguous")
    hostile = HostileLearner(factory.build(make_assignment(feedback="none")), 2, Meter(), FREE_STEP)
    hostile.attack = attack
    return hostile


def trained(attack: Attack) -> tuple[dict[str, Any], dict[str, Any]]:
    """What it started from and what it says it has learnt in a step."""
    hostile = learner(attack)
    images, labels = make_batch()
    hostile.forward(0, images, labels)
    hostile.backward(0, None)
    return dict(hostile.start.state), hostile.state()


@pytest.mark.parametrize(("attack", "factor"), [("sign-flip", -1), ("sign-flip-scale", -10)])
def test_what_it_learnt_is_told_the_other_way_round(attack: Attack, factor: int) -> None:
    start, true = trained("labels")
    _, told = trained(attack)
    for name, values in true.items():
        if name.endswith(("running_var", "num_batches_tracked")):
            np.testing.assert_array_equal(told[name], values)
        else:
            expected = start[name] + factor * (values - start[name])
            np.testing.assert_allclose(told[name], expected, rtol=1e-4, atol=1e-5)


def test_garbage_is_as_loud_as_what_it_stands_for() -> None:
    images, labels = make_batch()
    true = learner("labels").forward(0, images, labels)
    noise = learner("garbage").forward(0, images, labels)
    assert noise.shape == true.shape
    assert (noise >= 0).all()
    assert torch.allclose(noise.square().mean(), true.square().mean(), rtol=0.2)
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), true.flatten()]))[0, 1]) < 0.1


def test_labels_are_another_classs() -> None:
    data = make_device_data()
    wrong = with_wrong_labels(data)
    np.testing.assert_array_equal(wrong.train.labels, CLASSES - 1 - data.train.labels)
    assert wrong.train.images is data.train.images


@pytest.mark.parametrize(
    ("attacks", "defences", "words"),
    [(["magic"], ["none"], "--attacks magic"), (["none"], ["wall"], "--defences wall")],
)
def test_what_there_is_not_is_said(attacks: list[str], defences: list[str], words: str) -> None:
    with pytest.raises(SettingsWrong, match=words):
        run_bench(attacks, defences, Scale(), append=None, quiet=True)
