from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coordinator.defences.steps import StepLimits
from coordinator.engines import Averaging, Sequential
from coordinator.errors import BatchRefused
from coordinator.server_copy import ServerCopy
from tensors.networks import CutNetwork
from tests.server_side import NETWORK, START, features_at
from tests.tiny import CLASSES, CPU

CUT, RATE = 2, 0.05
LAST = str(NETWORK.stop - 1)


def make_copy(cut: int = CUT) -> ServerCopy:
    half = copy.deepcopy(NETWORK.server_half(cut, classifier=False))
    made = ServerCopy(half, CPU, 0.9, 1e-3, StepLimits())
    made.load(START, RATE)
    return made


def features(seed: int, cut: int = CUT) -> Tensor:
    return torch.from_numpy(features_at(cut, seed))


def gradient_of(last: Tensor) -> Tensor:
    """By a classifier that stays as it is."""
    leaf = last.clone().requires_grad_()
    labels = torch.arange(len(last)) % CLASSES
    F.cross_entropy(NETWORK.blocks[LAST](leaf), labels).backward()
    assert leaf.grad is not None
    return leaf.grad


def parameters(network: CutNetwork) -> list[Tensor]:
    return [each.detach().clone() for each in network.parameters()]


def test_a_step_in_two_parts_is_one_step_of_the_blocks() -> None:
    made = make_copy()
    plain = copy.deepcopy(NETWORK.server_half(CUT, classifier=False)).train()
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-3, fused=True
    )
    for seed in range(3):
        last = made.open.forward(("a", seed), CUT, features(seed), want_gradient=True)
        leaf = features(seed).requires_grad_()
        expected = plain(leaf)
        torch.testing.assert_close(last, expected.detach())
        gradient = gradient_of(last)
        found = made.open.backward(("a", seed), gradient)
        optimizer.zero_grad()
        expected.backward(gradient)
        optimizer.step()
        assert found is not None
        torch.testing.assert_close(found, leaf.grad)
    for own, wanted in zip(made.network.state_dict().values(), plain.state_dict().values()):  # noqa: B905
        torch.testing.assert_close(own, wanted)


def test_the_second_part_goes_through_the_parameters_of_the_first() -> None:
    made = make_copy()
    made.pace(RATE)
    before = copy.deepcopy(made.network)
    first = made.open.forward(("a", 0), CUT, features(0), want_gradient=True)
    second = made.open.forward(("b", 0), CUT, features(1), want_gradient=True)
    made.open.backward(("b", 0), gradient_of(second))
    middle = parameters(made.network)
    momentum = [
        made.optimizer.state[p]["momentum_buffer"].clone() for p in made.network.parameters()
    ]
    leaf = features(0).requires_grad_()
    before.train()(leaf).backward(gradient_of(first))
    found = made.open.backward(("a", 0), gradient_of(first))
    assert found is not None
    torch.testing.assert_close(found, leaf.grad)
    steps = [p.grad for p in before.parameters()]
    for now, was, step, moved in zip(
        made.network.parameters(), middle, steps, momentum, strict=True
    ):
        assert step is not None
        torch.testing.assert_close(now.detach(), was - RATE * (0.9 * moved + step + 1e-3 * was))


def test_batches_between_two_steps_share_their_parameters() -> None:
    made = make_copy()
    for batch in range(3):
        made.open.forward(("a", batch), CUT, features(batch), want_gradient=False)
    opened = [made.open._open["a", batch].parameters for batch in range(3)]
    assert opened[0] is opened[1] is opened[2]
    assert made.open.backward(("a", 0), torch.zeros_like(made.open._open["a", 0].last)) is None
    made.open.forward(("a", 3), CUT, features(3), want_gradient=False)
    assert made.open._open["a", 3].parameters is not opened[0]


def test_what_is_refused_leaves_no_trace() -> None:
    made = make_copy()
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    with pytest.raises(BatchRefused, match="diverged"):
        made.open.forward(("a", 0), CUT, features(0) * torch.inf, want_gradient=True)
    assert len(made.open) == 0
    for name, value in made.network.state_dict().items():
        torch.testing.assert_close(value, before[name])
    last = made.open.forward(("a", 0), CUT, features(0), want_gradient=True)
    weights = parameters(made.network)
    with pytest.raises(BatchRefused, match="diverged"):
        made.open.backward(("a", 0), torch.full_like(last, 3e38))
    assert len(made.open) == 0
    for now, was in zip(made.network.parameters(), weights, strict=True):
        torch.testing.assert_close(now.detach(), was)


@pytest.mark.parametrize("kind", [Averaging, Sequential])
def test_engines_without_a_classifier(kind: type[Averaging | Sequential]) -> None:
    engine = kind(copy.deepcopy(NETWORK), CPU, momentum=0.9, weight_decay=0.0, classifier=False)
    engine.begin(START, RATE)
    last = engine.forward("a", 0, CUT, features(0), want_gradient=True)
    other = engine.forward("b", 0, 5, features(0, 5), want_gradient=False)
    found = engine.backward("a", 0, gradient_of(last), images=8)
    assert found is not None
    assert found.shape == features(0).shape
    assert float(found.abs().max()) > 0
    assert engine.backward("b", 0, gradient_of(other), images=8) is None
    engine.forward("a", 1, CUT, features(1), want_gradient=True)
    engine.forget("a", 1)
    with pytest.raises(KeyError):
        engine.backward("a", 1, gradient_of(last), images=8)
    state, _ = engine.finish("a")
    assert not any(name.startswith(f"blocks.{LAST}.") for name in state)
    assert bool(state) is (kind is Averaging)
    assert all(np.isfinite(values).all() for values in state.values())
