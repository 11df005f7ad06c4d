from __future__ import annotations

import math
import operator
from functools import partial

import numpy as np
import torch

from edge_agent.noise import SecureNormal


def repeatable(count: int) -> bytes:
    return np.random.default_rng(0).bytes(count)


def test_numbers_are_standard_normal() -> None:
    drawn = np.sort(SecureNormal(repeatable)((100, 1001)).reshape(-1).astype(np.float64))
    normal = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in drawn[::100]])
    empirical = np.arange(0, len(drawn), 100) / len(drawn)
    # Kolmogorov and Smirnov: 1.95/√n is exceeded once in a thousand draws; these are fixed.
    assert np.abs(normal - empirical).max() < 1.95 / math.sqrt(len(drawn))


def test_neighbours_and_halves_are_independent() -> None:
    drawn = SecureNormal(repeatable)((200_000,))
    half = len(drawn) // 2
    for other in (np.roll(drawn, 1), np.roll(drawn, half), drawn[::-1]):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.01


def test_shapes_and_an_odd_count() -> None:
    normal = SecureNormal()
    assert normal((3, 1, 5)).shape == (3, 1, 5)
    assert normal((0, 4)).shape == (0, 4)
    assert normal((1,)).dtype == np.float32


def test_the_largest_and_smallest_uniform_numbers_stay_finite() -> None:
    for byte in (b"\x00", b"\xff"):
        assert np.isfinite(SecureNormal(partial(operator.mul, byte))((8,))).all()


def test_no_seed_repeats_it() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        drawn.append(SecureNormal()((16,)))
    assert (drawn[0] != drawn[1]).all()
