from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensors.robust import MEDIAN, trimmed_mean

TRIMS = st.sampled_from([0.0, 0.1, 0.25, 0.4, MEDIAN])


def reference(values: list[float], weights: list[int], trim: float) -> float:
    """Every value as often as it weighs, in parts of a hundredth, in plain Python."""
    parts = sorted(v for v, w in zip(values, weights, strict=True) for _ in range(100 * w))
    cut = round(trim * len(parts))
    if 2 * cut == len(parts):
        return (parts[cut - 1] + parts[cut]) / 2
    kept = parts[cut : len(parts) - cut]
    return sum(kept) / len(kept)


@given(
    st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 4)), min_size=1, max_size=9),
    TRIMS,
)
def test_it_is_the_mean_of_what_is_left_between_the_ends(
    holders: list[tuple[float, int]], trim: float
) -> None:
    values, weights = [v for v, _ in holders], [w for _, w in holders]
    found = trimmed_mean(np.array(values), np.array(weights, np.float64), trim)
    assert float(found) == pytest.approx(reference(values, weights, trim), abs=1e-9)


def test_without_trimming_it_is_the_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal((6, 4, 3)), rng.uniform(1, 9, 6)
    found = trimmed_mean(values, weights, 0.0)
    np.testing.assert_allclose(found, np.average(values, axis=0, weights=weights))


@given(st.integers(0, 2**32), st.integers(5, 15), st.sampled_from([0.25, 0.4, MEDIAN]))
def test_a_minority_cannot_leave_the_range_of_the_others(
    seed: int, honest: int, trim: float
) -> None:
    rng = np.random.default_rng(seed)
    good = rng.standard_normal((honest, 7))
    bad = 1e6 * rng.standard_normal((int(honest * trim / (1 - trim) - 1e-9), 7))
    values = np.concatenate([bad, good])
    found = trimmed_mean(values, np.ones(len(values)), trim)
    assert (found >= good.min(0) - 1e-9).all()
    assert (found <= good.max(0) + 1e-9).all()


def test_the_order_of_holders_is_all_one() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.standard_normal((8, 5)), rng.uniform(1, 3, 8)
    order = rng.permutation(8)
    for trim in (0.2, MEDIAN):
        np.testing.assert_allclose(
            trimmed_mean(values, weights, trim), trimmed_mean(values[order], weights[order], trim)
        )


def test_one_holder_is_taken_over_bit_for_bit() -> None:
    values = np.random.default_rng(2).standard_normal((1, 50)).astype(np.float32)
    for trim in (0.25, MEDIAN):
        found = trimmed_mean(values, np.array([7.0]), trim).astype(np.float32)
        np.testing.assert_array_equal(found, values[0])
