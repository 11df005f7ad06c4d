from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_agent.errors import TrainingError
from edge_agent.trainer import DeviceTrainer
from tensors.networks import CutNetwork, build_network, read_state
from tensors.training import Compute
from tests.tiny import CPU, SPEC, Array, assert_close, assert_same, differs, make_batch

CUT = 3
RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.01


def make_half(seed: int = 0) -> CutNetwork:
    return copy.deepcopy(build_network(SPEC, seed=seed).device_half(CUT))


def make_trainer(
    half: CutNetwork,
    *,
    exit_weight: float = 1.0,
    feedback_weight: float = 1.0,
    compute: Compute = CPU,
) -> DeviceTrainer:
    trainer = DeviceTrainer(
        half,
        compute,
        exit_weight=exit_weight,
        feedback_weight=feedback_weight,
        momentum=MOMENTUM,
        weight_decay=DECAY,
    )
    trainer.set_learning_rate(RATE)
    return trainer


def gradient_for(features: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(features.shape, generator=generator)


class Reference:
    """The same learning in plain PyTorch: no functional call, deep copies instead of snapshots."""

    def __init__(self, exit_weight: float, feedback_weight: float) -> None:
        self.network = make_half().train()
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY
        )
        self.weights = exit_weight, feedback_weight

    def forward(self, images: Array) -> CutNetwork:
        """A copy with the parameters of now; BatchNorm's buffers advance in the network itself."""
        snapshot = copy.deepcopy(self.network)
        with torch.no_grad():
            features = self.network(torch.from_numpy(images))
            self.network.exit(features, CUT)
        return snapshot

    def backward(
        self, snapshot: CutNetwork, images: Array, labels: Array, gradient: Tensor | None
    ) -> None:
        """Recompute at the snapshot, apply to the weights of today."""
        features = snapshot(torch.from_numpy(images))
        loss = self.weights[0] * F.cross_entropy(
            snapshot.exit(features, CUT), torch.from_numpy(labels)
        )
        if gradient is not None:
            loss = loss + self.weights[1] * (features * gradient).sum()
        snapshot.zero_grad()
        loss.backward()
        for own, old in zip(self.network.parameters(), snapshot.parameters(), strict=True):
            own.grad = old.grad
        self.optimizer.step()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_equals_recomputation_at_the_snapshots(window: int) -> None:
    exit_weight, feedback_weight = 0.7, 1.3
    half = make_half()
    trainer = make_trainer(half, exit_weight=exit_weight, feedback_weight=feedback_weight)
    reference = Reference(exit_weight, feedback_weight)
    snapshots: dict[int, CutNetwork] = {}
    gradients: dict[int, Tensor] = {}
    batches = [make_batch(seed=i) for i in range(8)]

    def answer(batch: int) -> None:
        trainer.backward(batch, gradients[batch])
        reference.backward(snapshots.pop(batch), *batches[batch], gradients[batch])

    for number, (images, labels) in enumerate(batches):
        features = trainer.forward(number, images, labels)
        gradients[number] = gradient_for(features, number)
        snapshots[number] = reference.forward(images)
        assert len(trainer.in_flight) <= window
        if number >= window - 1:
            answer(number - window + 1)
    for batch in sorted(trainer.in_flight):
        answer(batch)

    assert_close(trainer.state(), read_state(reference.network), rtol=1e-4)
    counters = {n: v for n, v in trainer.state().items() if n.endswith("num_batches_tracked")}
    assert counters
    assert all(value == len(batches) for value in counters.values())


def test_a_window_is_not_recomputation_with_the_newer_weights() -> None:
    """The other reading of a delayed gradient; or the test above could not tell the two apart."""
    results = []
    for delayed in (True, False):
        trainer = make_trainer(make_half())
        (x0, y0), (x1, y1) = make_batch(seed=0), make_batch(seed=1)
        trainer.forward(0, x0, y0)
        if delayed:
            features = trainer.forward(1, x1, y1)
        trainer.backward(0, None)
        if not delayed:
            features = trainer.forward(1, x1, y1)
        trainer.backward(1, gradient_for(features, 1))
        results.append(trainer.state())
    weights = {name for name in results[0] if name.endswith("weight")}
    assert weights <= differs(*results)


def test_answers_in_any_order() -> None:
    trainer, reference = make_trainer(make_half()), Reference(1.0, 1.0)
    batches = [make_batch(seed=i) for i in range(3)]
    features = [trainer.forward(i, *batch) for i, batch in enumerate(batches)]
    snapshots = [reference.forward(images) for images, _ in batches]
    for batch in (2, 0, 1):
        gradient = gradient_for(features[batch], batch)
        trainer.backward(batch, gradient)
        reference.backward(snapshots[batch], *batches[batch], gradient)
    assert_close(trainer.state(), read_state(reference.network), rtol=1e-4)


def test_exit_and_feedback_make_one_optimizer_step() -> None:
    """With momentum, one step on the sum is not two steps on the parts."""
    images, labels = make_batch()
    one, reference = make_trainer(make_half(), exit_weight=0.5, feedback_weight=2.0), None
    features = one.forward(0, images, labels)
    gradient = gradient_for(features, 0)
    one.backward(0, gradient)

    plain = make_half().train()
    x = plain(torch.from_numpy(images))
    reference = torch.optim.SGD(plain.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    exit_loss = F.cross_entropy(plain.exit(x, CUT), torch.from_numpy(labels))
    (0.5 * exit_loss + 2.0 * (x * gradient).sum()).backward()
    reference.step()
    assert_close(one.state(), read_state(plain))


def test_without_a_gradient_the_exit_alone_is_followed() -> None:
    images, labels = make_batch()
    trainer, reference = make_trainer(make_half()), Reference(1.0, 1.0)
    trainer.forward(0, images, labels)
    trainer.backward(0, None)
    reference.backward(reference.forward(images), images, labels, None)
    assert_close(trainer.state(), read_state(reference.network))


def test_without_exit_weight_the_head_stays_as_it_was() -> None:
    trainer = make_trainer(make_half(), exit_weight=0.0)
    before = trainer.state()
    features = trainer.forward(0, *make_batch())
    trainer.backward(0, gradient_for(features, 0))
    changed = differs(before, trainer.state())
    assert "blocks.0.conv.weight" in changed
    assert not any(name.startswith("heads.") for name in changed)


def test_without_any_weight_nothing_is_learnt() -> None:
    trainer = make_trainer(make_half(), exit_weight=0.0, feedback_weight=0.0)
    before = trainer.state()
    features = trainer.forward(0, *make_batch())
    trainer.backward(0, gradient_for(features, 0))
    assert all(".running_" in n or n.endswith("tracked") for n in differs(before, trainer.state()))


def test_the_outcome_is_that_of_the_exit() -> None:
    images, labels = make_batch(16)
    trainer, plain = make_trainer(make_half()), make_half().train()
    trainer.forward(0, images, labels)
    outcome = trainer.backward(0, None)
    with torch.no_grad():
        logits = plain.exit(plain(torch.from_numpy(images)), CUT)
    assert outcome.images == 16
    assert outcome.correct == int((logits.argmax(1).numpy() == labels).sum())
    assert outcome.loss == pytest.approx(
        F.cross_entropy(logits, torch.from_numpy(labels)).item(), rel=1e-5
    )


# -- what cannot be learnt from -----------------------------------------------------------------


def not_a_number(features: Tensor) -> Tensor:
    gradient = torch.zeros_like(features)
    gradient.view(-1)[3] = float("nan")
    return gradient


def infinite(features: Tensor) -> Tensor:
    gradient = torch.zeros_like(features)
    gradient.view(-1)[-1] = float("-inf")
    return gradient


def of_another_shape(features: Tensor) -> Tensor:
    return torch.zeros_like(features)[:, :1]


@pytest.mark.parametrize("spoil", [not_a_number, infinite, of_another_shape])
def test_a_bad_gradient_is_refused_and_forgotten(spoil: Callable[[Tensor], Tensor]) -> None:
    trainer = make_trainer(make_half())
    features = trainer.forward(0, *make_batch())
    before = trainer.snapshot()
    with pytest.raises(TrainingError, match="batch 0"):
        trainer.backward(0, spoil(features))
    after = trainer.snapshot()
    assert_same(after.state, before.state)
    assert_same(after.momentum, before.momentum)
    assert not trainer.in_flight


def test_images_that_are_not_finite_leave_no_trace() -> None:
    trainer = make_trainer(make_half())
    trainer.forward(0, *make_batch())
    trainer.backward(0, None)
    before = trainer.snapshot()
    images, labels = make_batch(seed=1)
    images[2, 0, 3, 3] = np.nan
    trainer.forward(1, images, labels)
    with pytest.raises(TrainingError, match="loss of batch 1 is nan"):
        trainer.backward(1, None)
    after = trainer.snapshot()
    assert_same(after.state, before.state)
    assert_same(after.momentum, before.momentum)


def test_a_discarded_batch_is_not_learnt_from() -> None:
    trainer = make_trainer(make_half())
    trainer.forward(0, *make_batch())
    before = trainer.snapshot()
    trainer.discard(0)
    assert_same(trainer.snapshot().state, before.state)
    assert not trainer.in_flight


# -- snapshots ----------------------------------------------------------------------------------


def learn(trainer: DeviceTrainer, seeds: range) -> None:
    for seed in seeds:
        features = trainer.forward(seed, *make_batch(seed=seed))
        trainer.backward(seed, gradient_for(features, seed))


def test_a_restored_snapshot_learns_the_same_again() -> None:
    trainer = make_trainer(make_half())
    learn(trainer, range(2))
    start = trainer.snapshot()
    learn(trainer, range(2, 5))
    first = trainer.snapshot()
    trainer.forward(99, *make_batch())
    trainer.restore(start)
    assert not trainer.in_flight
    learn(trainer, range(2, 5))
    again = trainer.snapshot()
    assert_same(again.state, first.state)
    assert_same(again.momentum, first.momentum)


def test_a_snapshot_does_not_follow_the_trainer() -> None:
    trainer = make_trainer(make_half())
    start = trainer.snapshot()
    kept = {name: values.copy() for name, values in start.state.items()}
    learn(trainer, range(1))
    assert_same(start.state, kept)


def test_new_parameters_keep_the_momentum() -> None:
    trainer = make_trainer(make_half())
    learn(trainer, range(2))
    momentum = trainer.snapshot().momentum
    state = read_state(make_half(seed=7))
    trainer.load(state)
    assert_same(trainer.snapshot().state, state)
    assert_same(trainer.snapshot().momentum, momentum)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_way_of_computing_learns_about_the_same(bf16: bool, channels_last: bool) -> None:
    compute = Compute("cpu", bf16=bf16, channels_last=channels_last)
    start = read_state(make_half())
    moves = []
    for way in (compute, CPU):
        trainer = make_trainer(make_half(), compute=way)
        features = trainer.forward(0, *make_batch(32))
        trainer.backward(0, gradient_for(features.float(), 0))
        state = trainer.state()
        weights = [n for n in state if n.endswith(".weight")]
        moves.append(np.concatenate([(state[n] - start[n]).ravel() for n in weights]))
    one, other = moves
    cosine = one @ other / np.sqrt((one @ one) * (other @ other))
    assert cosine > (0.9 if bf16 else 0.9999)


def test_the_weight_of_the_feedback_can_change() -> None:
    states = []
    for first, then in ((0.25, 0.25), (2.0, 0.25)):
        trainer = make_trainer(make_half(), feedback_weight=first)
        trainer.set_feedback_weight(then)
        features = trainer.forward(0, *make_batch())
        trainer.backward(0, gradient_for(features, 0))
        states.append(trainer.state())
    assert_same(*states)
