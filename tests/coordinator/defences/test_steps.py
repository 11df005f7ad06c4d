"""What the server learns from a batch has bounds: on its loss, and on its gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from coordinator.cascade import Cascade
from coordinator.defences.steps import ENOUGH, OF_A_DEVICE, StepLimits
from coordinator.engines import Averaging, Engine, Entry, Sequential, Step, make_engine
from coordinator.errors import BatchRefused
from tensors.networks import State, read_state
from tests.server_side import NETWORK, START, features_at
from tests.tiny import CLASSES, CPU, assert_same

CUT = 2


def entry(device: str, seed: int = 0, scale: float = 1.0) -> Entry:
    features = torch.from_numpy(scale * features_at(CUT, seed))
    return Entry(device, CUT, features, torch.arange(8) % CLASSES)


def seen(limits: StepLimits, losses: list[float]) -> StepLimits:
    for number, loss in enumerate(losses):
        limits.note(f"d{number % 5}", loss)
    return limits


# -- losses ---------------------------------------------------------------------------------------


def test_a_loss_far_above_the_others_stands_out() -> None:
    limits = seen(StepLimits(loss_mads=6.0), [0.9, 1.0, 1.1, 1.0] * 5)
    assert limits.is_outlier(1.7)
    assert not limits.is_outlier(1.5)
    assert not limits.is_outlier(0.0), "a low one is no harm"


def test_devices_that_are_unlike_make_the_bound_wider() -> None:
    alike = seen(StepLimits(loss_mads=6.0), [1.0] * 40)
    unlike = seen(StepLimits(loss_mads=6.0), [0.2, 0.6, 1.0, 1.4, 1.8] * 8)
    assert alike.is_outlier(2.5)
    assert not unlike.is_outlier(2.5)


def test_without_the_rule_or_before_enough_are_known_none_does() -> None:
    assert not seen(StepLimits(), [1.0] * 40).is_outlier(1e9)
    assert not seen(StepLimits(loss_mads=1.0), [1.0] * (ENOUGH - 1)).is_outlier(1e9)


def test_no_device_outvotes_the_others_by_sending_more() -> None:
    limits = seen(StepLimits(loss_mads=6.0), [1.0] * (5 * OF_A_DEVICE))
    for _ in range(10_000):
        limits.note("liar", 50.0)
    assert limits.is_outlier(50.0)


def test_what_is_refused_counts_so_that_a_harder_task_is_got_used_to() -> None:
    limits = seen(StepLimits(loss_mads=6.0), [0.1] * 40)
    assert limits.is_outlier(2.3)
    seen(limits, [2.3] * 40)
    assert not limits.is_outlier(2.3)


def test_of_so_many_devices_losses_are_known() -> None:
    limits = seen(StepLimits(loss_mads=6.0, devices=2), [1.0] * 40)
    assert len(limits._losses) == 2


@pytest.mark.parametrize("strategy", ["averaging", "sequential", "cascade"])
def test_a_batch_that_stands_out_leaves_no_trace(strategy: str) -> None:
    limits = seen(StepLimits(loss_mads=6.0), [1e-6] * 40)
    engine, untouched = (
        make_engine(
            strategy, copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0, limits=judge
        )
        for judge in (limits, StepLimits())
    )
    for each in (engine, untouched):
        each.begin(START, 0.05)
    with pytest.raises(BatchRefused, match="outlier_loss"):
        engine.step(entry("a"), want_gradient=True)
    limits.loss_mads = None
    steps = [each.step(entry("a", seed=1), want_gradient=True) for each in (engine, untouched)]
    assert steps[0].loss == steps[1].loss
    assert_same(_trained(engine), _trained(untouched))


def _trained(engine: Engine) -> State:
    if isinstance(engine, Averaging):
        return engine.finish("a")[0]
    assert isinstance(engine, Sequential | Cascade)
    return read_state(engine._shared.network)


def test_in_a_joint_step_only_the_batch_that_stands_out_is_refused() -> None:
    limits = StepLimits()
    engines = [
        Cascade(copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0, limits=each)
        for each in (limits, None)
    ]
    for engine in engines:
        engine.begin(START, 0.05)
    probe = Cascade(copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0)
    probe.begin(START, 0.0)
    usual = probe.step(entry("a"), want_gradient=False)
    assert usual.logits is not None
    liar = Entry("c", CUT, entry("a").features, usual.logits.argmin(1))
    odd = probe.step(liar, want_gradient=False).loss
    assert odd > 1.15 * usual.loss
    limits.loss_mads = 5 * (odd / usual.loss - 1)  # half way between the two
    seen(limits, [usual.loss] * 40)
    outcomes = engines[0].step_together([entry("a"), liar, entry("b")], want_gradients=True)
    assert [isinstance(outcome, Step) for outcome in outcomes] == [True, False, True]
    refused = outcomes[1]
    assert isinstance(refused, BatchRefused)
    assert refused.reason == "outlier_loss"
    engines[1].step_together([entry("a"), entry("b")], want_gradients=True)
    assert_same(_trained(engines[0]), _trained(engines[1]))


# -- gradients ------------------------------------------------------------------------------------


def test_a_step_is_no_longer_than_so_many_times_the_usual_one() -> None:
    limits = StepLimits(gradient_clip=2.0)
    weight = torch.nn.Parameter(torch.zeros(4))
    for _ in range(ENOUGH):
        weight.grad = torch.full((4,), 0.5)  # of length 1
        limits.clip(CUT, [weight], batches=1)
        assert weight.grad.norm() == 1
    weight.grad = torch.full((4,), 50.0)
    limits.clip(CUT, [weight], batches=1)
    assert weight.grad.norm().item() == pytest.approx(2.0)
    weight.grad = torch.full((4,), 50.0)
    limits.clip(CUT + 1, [weight], batches=1)
    assert weight.grad.norm() == 100, "cuts have norms of their own"


def test_of_a_joint_step_the_mean_is_measured() -> None:
    limits = StepLimits(gradient_clip=2.0)
    weight = torch.nn.Parameter(torch.zeros(4))
    for _ in range(ENOUGH):
        weight.grad = torch.full((4,), 0.5)
        limits.clip(CUT, [weight], batches=1)
    weight.grad = torch.full((4,), 2.0)  # four batches of length 1 each
    limits.clip(CUT, [weight], batches=4)
    assert weight.grad.norm() == 4


def test_engines_clip_and_without_the_rule_do_not() -> None:
    states = []
    for clip in (None, 1e6, 0.5):
        limits = StepLimits(gradient_clip=clip)
        engine = Sequential(
            copy.deepcopy(NETWORK), CPU, momentum=0.0, weight_decay=0.0, limits=limits
        )
        engine.begin(START, 0.05)
        for seed in range(ENOUGH + 4):
            engine.step(entry("a", seed), want_gradient=False)
        states.append(_trained(engine))
    assert_same(states[0], states[1])
    names = [name for name in states[0] if name.startswith("blocks.9.")]
    assert any(not np.array_equal(states[0][name], states[2][name]) for name in names)
