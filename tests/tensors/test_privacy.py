from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensors import privacy_torch
from tensors.privacy import GaussianMechanism, clip_rows, epsilon_of, rho_of

SHAPE = (6, 3, 4, 4)
POSITIVE = st.floats(1e-6, 1e6)


def features(scale: float = 1.0) -> np.ndarray:
    return np.asarray(scale * np.random.default_rng(0).standard_normal(SHAPE), np.float32)


def norms(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(x.reshape(len(x), -1).astype(np.float64), axis=1))


def nothing(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_what_is_longer_than_the_clip_is_scaled_to_it_and_the_rest_is_left() -> None:
    x = features() * np.array([0.01, 0.1, 1, 10, 1e4, 0], np.float32).reshape(-1, 1, 1, 1)
    clipped = clip_rows(x, 2.0)
    np.testing.assert_array_equal(clipped[[0, 1, 5]], x[[0, 1, 5]])
    np.testing.assert_allclose(norms(clipped[2:5]), 2.0, rtol=1e-6)
    np.testing.assert_allclose(clipped[3] / norms(clipped)[3], x[3] / norms(x)[3], rtol=1e-5)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e30))
def test_no_two_images_are_further_apart_than_twice_the_clip(clip: float, scale: float) -> None:
    sent = GaussianMechanism(clip, 1.0).release(features(scale), nothing)
    assert norms(sent).max() <= clip
    assert norms(sent[:1] - sent[1:]).max() <= 2 * clip


def test_a_tensor_is_released_as_an_array_is() -> None:
    mechanism = GaussianMechanism(2.0, 0.5)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    of_array = mechanism.release(features(), draw)
    laid_out = torch.from_numpy(features()).to(memory_format=torch.channels_last)
    of_tensor = mechanism.release(laid_out, draw)
    np.testing.assert_allclose(of_tensor.numpy(), of_array, rtol=1e-5, atol=1e-6)
    noise = of_array - mechanism.release(features(), nothing)
    np.testing.assert_allclose(noise, 0.5 * draw(SHAPE), atol=1e-6)


def test_what_is_not_finite_stays_so_and_is_found_by_the_codec() -> None:
    x = features()
    x[1, 0, 0, 0] = np.inf
    clipped = clip_rows(x, 1.0)
    assert np.isnan(clipped[1]).any()
    assert np.isfinite(clipped[0]).all()


def test_the_gradient_goes_through_the_clip() -> None:
    """Beyond the clip only what turns the features counts: J = C/‖x‖ (I − uuᵀ)."""
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    x[0] *= 0.01
    x.requires_grad_()
    gradient = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    privacy_torch.clip_rows(x, 1.0).backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], gradient[0])
    for row in (1, 2):
        u = x[row].detach() / x[row].norm().detach()
        expected = (gradient[row] - u * (u @ gradient[row])) / x[row].norm().detach()
        torch.testing.assert_close(x.grad[row], expected)


def test_features_that_are_all_zero_have_a_gradient() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    privacy_torch.clip_rows(x, 1.0).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones(2, 5))


@given(POSITIVE, POSITIVE)
def test_a_release_costs_the_renyi_divergence_of_two_normals(clip: float, std: float) -> None:
    """D_α(N(μ, σ²) ‖ N(ν, σ²)) = α·‖μ − ν‖²/(2σ²), so ρ is that with ‖μ − ν‖ = 2C and α = 1."""
    assert GaussianMechanism(clip, std).rho == pytest.approx((2 * clip) ** 2 / (2 * std**2))


def test_the_divergence_by_integration() -> None:
    clip, std, alpha = 0.7, 1.3, 2.0
    x = np.linspace(-30, 30, 200_001)
    p, q = (np.exp(-((x - m) ** 2) / (2 * std**2)) for m in (clip, -clip))
    total = (p**alpha * q ** (1 - alpha)).sum() / q.sum()
    divergence = math.log(total) / (alpha - 1)
    assert divergence == pytest.approx(alpha * GaussianMechanism(clip, std).rho, rel=1e-6)


def test_epsilon_by_hand() -> None:
    assert epsilon_of(0.5, math.exp(-2)) == pytest.approx(0.5 + 2)
    assert epsilon_of(0.1, 1e-5) == pytest.approx(2.2459660)
    assert epsilon_of(math.inf, 1e-5) == math.inf


@given(st.floats(1e-6, 1e9), st.floats(1e-12, 0.5))
def test_a_budget_in_epsilon_is_one_in_rho(epsilon: float, delta: float) -> None:
    assert epsilon_of(rho_of(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-9)


def test_the_stricter_has_the_smaller_clip_and_the_larger_noise() -> None:
    one, other = GaussianMechanism(1.0, 2.0), GaussianMechanism(3.0, 4.0)
    both = one.stricter(other)
    assert both == GaussianMechanism(1.0, 4.0) == other.stricter(one)
    assert both.rho <= min(one.rho, other.rho)
