from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coordinator.aggregation import Aggregation, Model, block_of
from coordinator.contribution import Contribution
from coordinator.engines import Averaging, Engine, Entry, Sequential, Step
from coordinator.errors import BatchRefused
from tensors.networks import CutNetwork, State, read_state
from tensors.training import Compute
from tests.server_side import NETWORK, SHAPES, START, trained_half
from tests.tiny import CLASSES, CPU, assert_close, assert_same, differs

RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.01
KINDS = (Sequential, Averaging)
each_strategy = pytest.mark.parametrize("kind", KINDS)


class Trained:
    """An engine, and how many images it was given of each device."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.samples: Counter[str] = Counter()

    def begin(self, model: Model, rate: float) -> None:
        self.engine.begin(model, rate)
        self.samples.clear()

    def step(self, batch: Entry, *, want_gradient: bool) -> Step:
        step = self.engine.step(batch, want_gradient=want_gradient)
        self.samples[batch.device] += step.images
        return step


def make_engine(
    kind: type[Sequential | Averaging], model: Model = START, compute: Compute = CPU
) -> Trained:
    engine = Trained(kind(copy.deepcopy(NETWORK), compute, momentum=MOMENTUM, weight_decay=DECAY))
    engine.begin(model, RATE)
    return engine


def batch_at(cut: int, seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * cut + seed)
    features = torch.randn((size, *SHAPES[cut - 1]), generator=generator).relu()
    return features, torch.randint(0, CLASSES, (size,), generator=generator)


def feed(engine: Trained, device: str, cut: int, *seeds: int) -> None:
    for seed in seeds:
        engine.step(Entry(device, cut, *batch_at(cut, seed)), want_gradient=True)


def close(
    engine: Trained,
    first: int,
    *,
    start: Model = START,
    devices: Mapping[tuple[str, int], State] | None = None,
    device_copies: bool = True,
) -> Model:
    aggregation = Aggregation(start, first_server_block=first, device_copies=device_copies)
    for (_, samples), state in (devices or {}).items():
        aggregation.add_device(state, samples)
    for name, samples in engine.samples.items():
        server, momentum = engine.engine.finish(name)
        brought = Contribution(name, first, 0, start, samples, {}, server, momentum)
        brought.fold(aggregation, start, 0)
    engine.engine.close(aggregation)
    return aggregation.result()


def blocks_of(names: set[str]) -> set[int]:
    return {block for name in names if (block := block_of(name)) is not None}


class Reference:
    """Training the blocks from ``cut`` on, in plain PyTorch."""

    def __init__(self, cut: int) -> None:
        self.network: CutNetwork = copy.deepcopy(NETWORK.server_half(cut)).train()
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY
        )

    def step(self, cut: int, features: Tensor, labels: Tensor) -> tuple[float, Tensor, int]:
        x = features.detach().clone().requires_grad_()
        logits = self.network(x, start=cut)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        assert x.grad is not None
        return loss.item(), x.grad, int((logits.argmax(1) == labels).sum())


# -- a step ---------------------------------------------------------------------------------------


@each_strategy
def test_a_step_is_that_of_plain_pytorch(kind: type[Sequential | Averaging]) -> None:
    engine, reference = make_engine(kind), Reference(3)
    for seed in range(3):
        features, labels = batch_at(3, seed)
        step = engine.step(Entry("d", 3, features, labels), want_gradient=True)
        loss, gradient, correct = reference.step(3, features, labels)
        assert step.loss == pytest.approx(loss, rel=1e-5)
        assert (step.correct, step.images) == (correct, 8)
        assert step.gradient is not None
        torch.testing.assert_close(step.gradient, gradient, rtol=1e-4, atol=1e-6)
    merged = close(engine, 3)
    expected = read_state(reference.network)
    assert_close({n: merged.state[n] for n in expected}, expected, rtol=1e-4)


@each_strategy
def test_without_feedback_no_gradient_is_computed_and_the_learning_is_the_same(
    kind: type[Sequential | Averaging],
) -> None:
    results = []
    for want_gradient in (True, False):
        engine = make_engine(kind)
        step = engine.step(Entry("d", 3, *batch_at(3)), want_gradient=want_gradient)
        assert (step.gradient is not None) is want_gradient
        results.append(close(engine, 3))
    assert_close(results[0].state, results[1].state)


@each_strategy
@pytest.mark.parametrize("bf16", [False, True])
def test_every_way_of_computing_learns_about_the_same(
    kind: type[Sequential | Averaging], bf16: bool
) -> None:
    moves = []
    for compute in (CPU, Compute("cpu", bf16=bf16, channels_last=True)):
        engine = make_engine(kind, compute=compute)
        engine.step(Entry("d", 3, *batch_at(3, size=32)), want_gradient=True)
        merged = close(engine, 3).state
        weights = [n for n in merged if n.endswith(".weight")]
        moves.append(np.concatenate([(merged[n] - START.state[n]).ravel() for n in weights]))
    one, other = moves
    assert one @ other / np.sqrt((one @ one) * (other @ other)) > (0.9 if bf16 else 0.9999)


@each_strategy
def test_the_momentum_of_one_round_is_carried_into_the_next(
    kind: type[Sequential | Averaging],
) -> None:
    engine, reference = make_engine(kind), Reference(3)
    feed(engine, "d", 3, 0, 1)
    between = close(engine, 3)
    assert np.abs(between.momentum["blocks.9.fc.weight"]).max() > 0
    engine.begin(between, RATE)
    feed(engine, "d", 3, 2, 3)
    merged = close(engine, 3, start=between)
    for seed in range(4):
        reference.step(3, *batch_at(3, seed))
    expected = read_state(reference.network)
    assert_close({n: merged.state[n] for n in expected}, expected, rtol=1e-4)


@each_strategy
def test_a_round_begins_with_what_it_is_given(kind: type[Sequential | Averaging]) -> None:
    engine = make_engine(kind)
    feed(engine, "d", 3, 0, 1)
    engine.begin(START, RATE)  # as after a round that was abandoned
    feed(engine, "d", 3, 2)
    fresh = make_engine(kind)
    feed(fresh, "d", 3, 2)
    once, again = close(engine, 3), close(fresh, 3)
    assert_same(once.state, again.state)
    assert_same(once.momentum, again.momentum)


# -- sharing --------------------------------------------------------------------------------------


def test_averaging_gives_every_device_its_own_replica() -> None:
    engine = make_engine(Averaging)
    feed(engine, "a", 2, 0)
    alone, together = Reference(2), engine.step(Entry("b", 2, *batch_at(2, 1)), want_gradient=True)
    loss, *_ = alone.step(2, *batch_at(2, 1))
    assert together.loss == pytest.approx(loss, rel=1e-5)


def test_sequential_gives_all_devices_one_network_in_the_order_of_arrival() -> None:
    engine, shared = make_engine(Sequential), Reference(2)
    for device, cut, seed in (("a", 2, 0), ("b", 5, 0), ("a", 2, 1), ("c", 4, 0)):
        step = engine.step(Entry(device, cut, *batch_at(cut, seed)), want_gradient=True)
        loss, *_ = shared.step(cut, *batch_at(cut, seed))
        assert step.loss == pytest.approx(loss, rel=1e-4)
    merged = close(engine, 2)
    expected = read_state(shared.network)
    assert_close({n: merged.state[n] for n in expected}, expected, rtol=1e-3)


@each_strategy
@pytest.mark.parametrize(("trains", "other"), [(2, 5), (5, 2)])
def test_a_device_at_cut_2_and_one_at_cut_5_share_blocks(
    kind: type[Sequential | Averaging], trains: int, other: int
) -> None:
    """One of them trains; every block of the other's device half and server half has moved."""
    engine = make_engine(kind)
    feed(engine, "busy", trains, 0, 1)
    devices = {
        ("busy", 16): trained_half(trains),
        ("idle", 0): read_state(NETWORK.device_half(other)),
    }
    moved = differs(close(engine, 2, devices=devices).state, START.state)
    device_half = read_state(NETWORK.device_half(other))
    assert blocks_of(moved & device_half.keys()) == set(range(other))
    assert blocks_of(moved - device_half.keys()) == set(range(other, 10))
    assert not any(name.startswith(f"heads.{other}.") for name in moved), "heads are by cut"


@each_strategy
@pytest.mark.parametrize("device_copies", [True, False])
def test_blocks_between_two_cuts_are_the_mean_of_replica_and_deeper_device(
    kind: type[Sequential | Averaging], device_copies: bool
) -> None:
    """Blocks 2 to 4 live on the server for the device at cut 2, on the device for that at 5."""
    engine = make_engine(kind)
    feed(engine, "a", 2, 0, 1, 2)  # 24 samples
    feed(engine, "b", 5, 0)  # 8 samples
    only_a = make_engine(kind)
    feed(only_a, "a", 2, 0, 1, 2)
    replica = close(only_a, 2).state
    a, b = trained_half(2), trained_half(5)
    merged = close(
        engine, 2, devices={("a", 24): a, ("b", 8): b}, device_copies=device_copies
    ).state
    for block in (2, 3, 4):
        name = f"blocks.{block}.conv1.weight"
        expected = (24 * replica[name] + 8 * b[name]) / 32 if device_copies else replica[name]
        np.testing.assert_allclose(merged[name], expected, rtol=1e-4, atol=1e-6)
    for block in (0, 1):
        name = f"blocks.{block}.{'conv' if block == 0 else 'conv1'}.weight"
        np.testing.assert_allclose(merged[name], (24 * a[name] + 8 * b[name]) / 32, rtol=1e-5)


def test_averaging_weighs_replicas_by_their_samples() -> None:
    engine = make_engine(Averaging)
    feed(engine, "a", 2, 0, 1, 2)
    feed(engine, "b", 2, 7)
    parts = []
    for seeds in ((0, 1, 2), (7,)):
        reference = Reference(2)
        for seed in seeds:
            reference.step(2, *batch_at(2, seed))
        parts.append(read_state(reference.network))
    merged = close(engine, 2).state
    for name in ("blocks.2.conv1.weight", "blocks.9.fc.bias"):
        np.testing.assert_allclose(
            merged[name], (24 * parts[0][name] + 8 * parts[1][name]) / 32, rtol=1e-3, atol=1e-6
        )
    counter = "blocks.2.bn1.num_batches_tracked"
    assert merged[counter] == START.state[counter] + 4


def test_sequentials_shared_copy_weighs_what_entered_at_or_below_a_block() -> None:
    """16 samples enter at 2 and 8 at 5: blocks 2 to 4 weigh 16, blocks from 5 on weigh 24."""
    engine = make_engine(Sequential)
    feed(engine, "a", 2, 0, 1)
    feed(engine, "b", 5, 0)
    shared = close(engine, 2).state
    deepest = trained_half(9)
    engine = make_engine(Sequential)
    feed(engine, "a", 2, 0, 1)
    feed(engine, "b", 5, 0)
    merged = close(engine, 2, devices={("c", 8): deepest}).state
    for block, entered in ((2, 16), (4, 16), (5, 24), (8, 24)):
        name = f"blocks.{block}.conv1.weight"
        expected = (entered * shared[name] + 8 * deepest[name]) / (entered + 8)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-4, atol=1e-6)
    assert_same(
        {"x": merged["blocks.9.fc.weight"]}, {"x": shared["blocks.9.fc.weight"]}
    )  # no device holds the last block


@each_strategy
def test_blocks_below_every_entry_are_not_the_servers(kind: type[Sequential | Averaging]) -> None:
    engine = make_engine(kind)
    feed(engine, "a", 4, 0)
    assert blocks_of(differs(close(engine, 4).state, START.state)) == set(range(4, 10))


@each_strategy
def test_a_round_in_which_nothing_was_applied_changes_nothing(
    kind: type[Sequential | Averaging],
) -> None:
    merged = close(make_engine(kind), 2, devices={("a", 0): trained_half(2)})
    assert_same(merged.state, START.state)
    assert_same(merged.momentum, START.momentum)


def test_a_replica_that_was_taken_out_begins_anew() -> None:
    engine, fresh = make_engine(Averaging), make_engine(Averaging)
    feed(engine, "a", 2, 0)
    assert engine.engine.finish("a")[0]
    assert engine.engine.finish("a") == ({}, {})
    steps = [
        each.step(Entry("a", 2, *batch_at(2, 1)), want_gradient=False) for each in (engine, fresh)
    ]
    assert steps[0].loss == steps[1].loss


# -- what cannot be trained on --------------------------------------------------------------------


def not_finite(features: Tensor) -> Tensor:
    features[0, 0] = float("nan")
    return features


def far_too_large(features: Tensor) -> Tensor:
    return features * 3e38


def of_one_image(features: Tensor) -> Tensor:
    return features[:1]


@each_strategy
@pytest.mark.parametrize("spoil", [not_finite, far_too_large, of_one_image])
@pytest.mark.parametrize("want_gradient", [True, False])
def test_a_refused_batch_leaves_no_trace(
    kind: type[Sequential | Averaging], spoil: Callable[[Tensor], Tensor], want_gradient: bool
) -> None:
    """Buffers and momentum included; one image makes BatchNorm fail on a map of one pixel."""
    engine, untouched = make_engine(kind), make_engine(kind)
    for each in (engine, untouched):
        feed(each, "d", 3, 0, 1)
    features, labels = batch_at(3, 2)
    features = spoil(features.clone())
    with pytest.raises(BatchRefused) as caught:
        engine.step(Entry("d", 3, features, labels[: len(features)]), want_gradient=want_gradient)
    assert caught.value.reason.isidentifier()
    for each in (engine, untouched):
        feed(each, "d", 3, 4)
    one, other = close(engine, 3), close(untouched, 3)
    assert_same(one.state, other.state)
    assert_same(one.momentum, other.momentum)


@each_strategy
def test_a_first_batch_that_is_refused_is_no_holder(kind: type[Sequential | Averaging]) -> None:
    engine = make_engine(kind)
    features, labels = batch_at(3)
    with pytest.raises(BatchRefused):
        engine.step(Entry("d", 3, not_finite(features), labels), want_gradient=True)
    assert_same(close(engine, 3).state, START.state)


@each_strategy
def test_a_server_copy_that_has_diverged_is_left_out(kind: type[Sequential | Averaging]) -> None:
    engine = make_engine(kind)
    engine.begin(START, 1e38)
    for seed in range(4):
        try:
            engine.step(Entry("d", 3, *batch_at(3, seed)), want_gradient=False)
        except BatchRefused:
            break
    else:
        raise AssertionError("it should have diverged")
    merged = close(engine, 3)
    assert all(np.isfinite(values).all() for values in merged.state.values())
    assert all(np.isfinite(values).all() for values in merged.momentum.values())
