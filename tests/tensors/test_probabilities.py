from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensors import ExitRuleError, softmax
from tensors.probabilities import (
    TEMPERATURES,
    apply_temperature,
    calibration_error,
    ensemble,
    fit_ensemble,
    fit_temperature,
)

Floats = npt.NDArray[np.float64]
CLASSES = 3

probabilities = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 20), st.just(CLASSES)), elements=st.floats(-8, 8)
).map(softmax)


def drawn(p: Floats, seed: int = 0) -> npt.NDArray[np.int64]:
    """Labels with the distribution that each row says."""
    draws = np.random.default_rng(seed).random((len(p), 1))
    below = (p.cumsum(axis=1) < draws).sum(axis=1)
    labels: npt.NDArray[np.int64] = np.minimum(below, p.shape[1] - 1)
    return labels


def random_rows(count: int, *, scale: float = 2.0, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    return softmax(scale * rng.standard_normal((count, CLASSES)))


def cross_entropy(p: Floats, labels: npt.NDArray[np.int64]) -> float:
    return float(-np.log(p[np.arange(len(p)), labels]).mean())


class TestCalibrationError:
    def test_has_the_value_of_its_definition(self) -> None:
        p = np.array([[0.62, 0.38], [0.64, 0.36], [0.95, 0.05], [0.05, 0.95]])
        # 15 bins: the first two rows are in (0.6, 0.667], the others in (0.933, 1].
        expected = 2 / 4 * abs(0.5 - 0.63) + 2 / 4 * abs(1 - 0.95)
        assert calibration_error(p, [0, 1, 0, 1]) == pytest.approx(expected)
        # Two bins of two; in one bin of all: |0.75 − 0.79|.
        assert calibration_error(p, [0, 1, 0, 1], bins=2, equal_mass=True) == pytest.approx(
            expected
        )
        assert calibration_error(p, [0, 1, 0, 1], bins=1) == pytest.approx(0.04)

    @given(p=probabilities, data=st.data(), equal_mass=st.booleans())
    def test_lies_in_the_unit_interval_whatever_the_order(
        self, p: Floats, data: st.DataObject, equal_mass: bool
    ) -> None:
        labels = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(p), max_size=len(p))))
        error = calibration_error(p, labels, equal_mass=equal_mass)
        assert 0 <= error <= 1
        rows = np.array(data.draw(st.permutations(range(len(p)))))
        again = calibration_error(p[rows], labels[rows], equal_mass=equal_mass)
        assert again == pytest.approx(error)
        twice = calibration_error(
            np.concatenate([p, p]), np.concatenate([labels, labels]), bins=1, equal_mass=equal_mass
        )
        one = calibration_error(p, labels, bins=1, equal_mass=equal_mass)
        assert twice == pytest.approx(one)
        assert one <= error + 1e-12, "fewer bins never show more"

    @pytest.mark.parametrize("equal_mass", [False, True])
    def test_is_small_only_for_probabilities_that_are_true(self, equal_mass: bool) -> None:
        p = random_rows(20_000)
        labels = drawn(p)
        assert calibration_error(p, labels, equal_mass=equal_mass) < 0.015
        surer = apply_temperature(p, 0.4)
        assert calibration_error(surer, labels, equal_mass=equal_mass) > 0.1

    def test_bins_of_equal_mass_hold_equally_many(self) -> None:
        # 30 rows at 0.91 … 0.94, half of them right: one equal-width bin hides what 30 bins show.
        sure = np.linspace(0.91, 0.93, 30)
        p = np.stack([sure, 1 - sure], axis=1)
        labels = np.arange(30) % 2
        shown = calibration_error(p, labels, bins=30, equal_mass=True)
        assert shown == pytest.approx(np.abs((labels == 0) - sure).mean())

    def test_equal_probabilities_are_one_bin(self) -> None:
        p = np.tile([0.75, 0.25], (8, 1))
        labels = [0, 0, 0, 0, 0, 0, 1, 1]
        assert calibration_error(p, labels, equal_mass=True) == pytest.approx(0)
        assert calibration_error(p, [1] * 8, equal_mass=True) == pytest.approx(0.75)

    def test_one_sample_and_none(self) -> None:
        assert calibration_error(np.array([[0.7, 0.3]]), [0]) == pytest.approx(0.3)
        assert math.isnan(calibration_error(np.full((2, 2), np.nan), [0, 1]))
        assert math.isnan(calibration_error(np.zeros((0, 2)), []))

    def test_rows_that_are_no_answers_are_left_out(self) -> None:
        p = np.array([[0.7, 0.3], [np.nan, 0.3], [0.1, np.inf]])
        assert calibration_error(p, [0, 0, 1]) == calibration_error(p[:1], [0])

    def test_what_does_not_fit_is_refused(self) -> None:
        p = np.full((2, 2), 0.5)
        for wrong in ([0], [[0, 1]], [0, 2], [-1, 0]):
            with pytest.raises(ExitRuleError, match="labels"):
                calibration_error(p, wrong)
        with pytest.raises(ExitRuleError, match="at least 1"):
            calibration_error(p, [0, 1], bins=0)
        with pytest.raises(ExitRuleError, match="K >= 2"):
            fit_temperature(np.ones((2, 1)), [0, 0])


class TestTemperature:
    @pytest.mark.parametrize("made_with", [0.3, 1.0, 2.5])
    def test_the_one_that_spoilt_the_probabilities_is_found(self, made_with: float) -> None:
        p = random_rows(20_000)
        labels = drawn(p)
        spoilt = apply_temperature(p, made_with)
        found = fit_temperature(spoilt, labels)
        assert found == pytest.approx(1 / made_with, rel=0.05)
        mended = apply_temperature(spoilt, found)
        assert calibration_error(mended, labels) < 0.015

    @given(p=probabilities, seed=st.integers(0, 9), other=st.floats(*TEMPERATURES))
    def test_no_other_has_less_cross_entropy(self, p: Floats, seed: int, other: float) -> None:
        labels = np.random.default_rng(seed).integers(0, CLASSES, len(p))
        best = cross_entropy(apply_temperature(p, fit_temperature(p, labels)), labels)
        assert best <= cross_entropy(apply_temperature(p, other), labels) + 1e-9

    @given(p=probabilities, temperature=st.floats(*TEMPERATURES))
    def test_leaves_every_answer_as_it_is(self, p: Floats, temperature: float) -> None:
        scaled = apply_temperature(p, temperature)
        np.testing.assert_allclose(scaled.sum(axis=1), 1)
        rows = np.arange(len(p))
        top = scaled[rows, p.argmax(axis=1)]
        np.testing.assert_allclose(top, scaled.max(axis=1))
        np.testing.assert_allclose(apply_temperature(p, 1.0), p)

    def test_extremes_end_at_the_range(self) -> None:
        right = np.array([[0.6, 0.4], [0.3, 0.7]])
        assert fit_temperature(right, [0, 1]) == pytest.approx(TEMPERATURES[0])
        assert fit_temperature(right, [1, 0]) == pytest.approx(TEMPERATURES[1])
        certain = np.array([[1.0, 0.0], [1.0, 0.0]])
        assert math.isfinite(fit_temperature(certain, [0, 1]))
        assert fit_temperature(np.full((2, 2), np.nan), [0, 1]) == 1.0

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
    def test_must_be_above_zero(self, temperature: float) -> None:
        with pytest.raises(ExitRuleError, match="above 0"):
            apply_temperature(np.full((1, 2), 0.5), temperature)


class TestEnsemble:
    def test_its_ends_are_exit_and_server(self) -> None:
        p, q = random_rows(50), random_rows(50, seed=1)
        np.testing.assert_array_equal(ensemble(p, q, 1.0), p)
        np.testing.assert_array_equal(ensemble(p, q, 0.0), q)
        np.testing.assert_allclose(ensemble(p, q, 0.25), (p + 3 * q) / 4)

    @given(p=probabilities, seed=st.integers(0, 9), other=st.floats(0, 1))
    def test_no_other_weight_has_less_cross_entropy(
        self, p: Floats, seed: int, other: float
    ) -> None:
        q = random_rows(len(p), seed=seed)
        labels = np.random.default_rng(seed).integers(0, CLASSES, len(p))
        weight = fit_ensemble(p, q, labels)
        best = cross_entropy(ensemble(p, q, weight), labels)
        assert best <= cross_entropy(ensemble(p, q, other), labels) + 1e-9

    def test_the_weight_that_made_the_labels_is_found(self) -> None:
        p, q = random_rows(40_000), random_rows(40_000, seed=1)
        labels = drawn(0.3 * p + 0.7 * q)
        assert fit_ensemble(p, q, labels) == pytest.approx(0.3, abs=0.03)

    def test_who_knows_nothing_has_no_weight(self) -> None:
        q = random_rows(2000, scale=4.0)
        labels = drawn(q)
        noise = random_rows(2000, scale=4.0, seed=1)
        assert fit_ensemble(noise, q, labels) < 0.05
        assert fit_ensemble(q, noise, labels) > 0.95
        assert fit_ensemble(q, q, labels) == 0.0

    def test_impossible_labels_do_not_spoil_the_weight(self) -> None:
        sure = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        other = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        # The first row is impossible for both, the second only for the exit.
        assert fit_ensemble(sure, other, [1, 1, 1]) == 0.0
        assert fit_ensemble(other, sure, [1, 1, 1]) == 1.0
        assert fit_ensemble(sure, sure, [1, 1, 0]) == 0.0

    def test_where_one_does_not_answer_the_other_does(self) -> None:
        p = np.array([[0.9, 0.1], [np.nan, 0.1], [0.9, 0.1], [np.nan, np.nan]])
        q = np.array([[0.2, 0.8], [0.2, 0.8], [np.inf, 0.8], [np.nan, np.nan]])
        mixed = ensemble(p, q, 0.5)
        np.testing.assert_allclose(mixed[:3], [[0.55, 0.45], [0.2, 0.8], [0.9, 0.1]])
        assert np.isnan(mixed[3]).all()
        assert fit_ensemble(p, q, [0, 0, 0, 0]) == 1.0  # of the first row alone
        assert fit_ensemble(p[3:], q[3:], [0]) == 0.0

    def test_what_does_not_fit_is_refused(self) -> None:
        p = np.full((2, 2), 0.5)
        with pytest.raises(ExitRuleError, match="both"):
            ensemble(p, p[:1], 0.5)
        for weight in (-0.1, 1.1, math.nan):
            with pytest.raises(ExitRuleError, match="from 0 to 1"):
                ensemble(p, p, weight)
        with pytest.raises(ExitRuleError, match="alike"):
            fit_ensemble(p, np.full((2, 3), 1 / 3), [0, 1])
