"""What a cascade does with batches that cannot be trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coordinator.errors import BatchRefused
from coordinator.server_copy import Entry, Step
from tests.cascade import close, entry_at, make_cascade, plain_entry, plain_network, start_of, train
from tests.server_side import START
from tests.tiny import assert_same


class RootOfSize(nn.Module):
    """Has a finite value everywhere and no finite gradient at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def spoilt(entry: Entry, spoil: Callable[[Tensor], Tensor]) -> Entry:
    features = spoil(entry.features.clone())
    return Entry("bad", entry.cut, features, entry.labels[: len(features)])


def not_finite(features: Tensor) -> Tensor:
    features[0] = float("nan")
    return features


def far_too_large(features: Tensor) -> Tensor:
    return features * 3e38


def of_wrong_shape(features: Tensor) -> Tensor:
    return features[:, :-1]


def results(outcomes: Sequence[Step | BatchRefused]) -> list[Any]:
    return [o.loss if isinstance(o, Step) else o.reason for o in outcomes]


@pytest.mark.parametrize("spoil", [not_finite, far_too_large])
@pytest.mark.parametrize("want_gradients", [True, False])
@pytest.mark.parametrize("place", range(4))
def test_a_refused_batch_leaves_the_others_as_without_it(
    spoil: Callable[[Tensor], Tensor], want_gradients: bool, place: int
) -> None:
    """Bit for bit: parameters, buffers, momentum, answers, weights of the blocks."""
    good = [entry_at(3), entry_at(2), entry_at(5, size=1)]  # one image is enough in company
    engine, untouched = make_cascade(), make_cascade()
    for each in (engine, untouched):
        train(each, entry_at(2, 5), entry_at(4, 5))
    entries = good.copy()
    entries.insert(place, spoilt(entry_at(4), spoil))
    outcomes = engine.step_together(entries, want_gradients=want_gradients)
    refused = outcomes.pop(place)
    assert isinstance(refused, BatchRefused)
    assert refused.reason == "diverged"
    expected = untouched.step_together(good, want_gradients=want_gradients)
    assert results(outcomes) == results(expected)
    for one, other in zip(outcomes, expected, strict=True):
        assert isinstance(one, Step)
        assert isinstance(other, Step)
        if one.gradient is not None and other.gradient is not None:
            assert torch.equal(one.gradient, other.gradient)
    for each in (engine, untouched):
        train(each, entry_at(2, 6), entry_at(3, 6))
    ours, theirs = close(engine), close(untouched)
    assert_same(ours.state, theirs.state)
    assert_same(ours.momentum, theirs.momentum)


def test_a_batch_whose_gradient_alone_is_not_finite_is_refused() -> None:
    network = plain_network(activation=lambda index: RootOfSize() if index == 2 else nn.Tanh())
    at_zero = spoilt(plain_entry(2), torch.zeros_like)
    good = [plain_entry(1), plain_entry(4)]
    engine, untouched = make_cascade(network), make_cascade(network)
    outcomes = engine.step_together([at_zero, *good], want_gradients=True)
    assert results(outcomes[:1]) == ["diverged"]
    assert results(outcomes[1:]) == [step.loss for step in train(untouched, *good)]
    start = start_of(network)
    assert_same(close(engine, start).state, close(untouched, start).state)


def test_one_that_cannot_even_be_joined_is_refused_and_the_others_are_trained_on() -> None:
    good = [entry_at(3), entry_at(2)]
    engine, one_by_one = make_cascade(), make_cascade()
    odd = spoilt(entry_at(2, 1), of_wrong_shape)
    outcomes = engine.step_together([odd, *good], want_gradients=True)
    assert results(outcomes[:1]) == ["not_computable"]
    for outcome, entry in zip(outcomes[1:], good, strict=True):
        assert results([outcome]) == [train(one_by_one, entry)[0].loss]
    assert_same(close(engine).state, close(one_by_one).state)


@pytest.mark.parametrize("spoil", [not_finite, far_too_large])
def test_if_all_are_refused_nothing_changes(spoil: Callable[[Tensor], Tensor]) -> None:
    engine, untouched = make_cascade(), make_cascade()
    bad = [spoilt(entry_at(cut), spoil) for cut in (2, 5)]
    assert results(engine.step_together(bad, want_gradients=True)) == ["diverged"] * 2
    with pytest.raises(BatchRefused, match="diverged"):
        engine.step(bad[0], want_gradient=True)
    assert_same(close(engine).state, START.state)
    for each in (engine, untouched):
        train(each, entry_at(3))
    assert_same(close(engine).state, close(untouched).state)


def test_one_image_is_too_little_alone() -> None:
    engine = make_cascade()
    (refused,) = engine.step_together([entry_at(3, size=1)], want_gradients=True)
    assert results([refused]) == ["not_computable"]
    assert_same(close(engine).state, START.state)


def test_a_network_that_has_diverged_refuses_everything_and_is_left_out() -> None:
    engine = make_cascade(rate=1e38)
    for seed in range(4):
        outcomes = engine.step_together(
            [entry_at(3, seed), entry_at(5, seed)], want_gradients=False
        )
        if all(isinstance(outcome, BatchRefused) for outcome in outcomes):
            break
    else:
        raise AssertionError("it should have diverged")
    merged = close(engine)
    for values in [*merged.state.values(), *merged.momentum.values()]:
        assert np.isfinite(values).all()
