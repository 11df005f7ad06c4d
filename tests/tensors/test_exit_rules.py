from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensors import ExitRule, ExitRuleError, confidence, exits, softmax

RULES: tuple[ExitRule, ...] = get_args(ExitRule)

probabilities = hnp.arrays(
    np.float64,
    st.tuples(st.integers(0, 6), st.integers(2, 8)),
    elements=st.floats(-50, 50),
).map(softmax)


@pytest.mark.parametrize("rule", RULES)
@given(p=probabilities)
def test_confidence_lies_in_the_unit_interval(rule: ExitRule, p: npt.NDArray[np.float64]) -> None:
    for given_as in (p, p.astype(np.float32)):
        c = confidence(given_as, rule)
        assert (c.dtype, c.shape) == (np.dtype(np.float64), p.shape[:1])
        assert ((c >= 0) & (c <= 1)).all()


@pytest.mark.parametrize("rule", RULES)
def test_confidence_is_zero_for_uniform_and_one_for_certain(rule: ExitRule) -> None:
    for classes in (2, 10, 1000):
        p = np.stack([np.full(classes, 1 / classes), np.eye(classes)[classes // 2]])
        np.testing.assert_allclose(confidence(p, rule), [0, 1], atol=1e-12)


def test_confidence_has_the_values_of_its_definition() -> None:
    p = np.array([[0.7, 0.2, 0.1]])
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1))
    assert confidence(p, "entropy")[0] == pytest.approx(1 - entropy / np.log(3))
    assert confidence(p, "max_softmax")[0] == pytest.approx((0.7 - 1 / 3) / (2 / 3))
    assert confidence(p, "margin")[0] == pytest.approx(0.5)


@pytest.mark.parametrize("rule", RULES)
def test_nan_never_exits(rule: ExitRule) -> None:
    c = confidence(np.array([[np.nan, 0.5], [0.0, 1.0]]), rule)
    assert exits(c, -1.0).tolist() == [False, True]


def test_ties_offload() -> None:
    assert exits(np.array([0.4, 0.5, 0.6]), 0.5).tolist() == [False, False, True]
    assert not exits(np.array([1.0]), 1.0).any()


def test_softmax_is_stable_and_sums_to_one() -> None:
    p = softmax(np.array([[1e4, 0.0, -1e4], [1.0, 1.0, 1.0]], np.float32))
    np.testing.assert_allclose(p, np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 3, 4)])
def test_probabilities_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ExitRuleError, match="K >= 2"):
        confidence(np.ones(shape), "entropy")


def test_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ExitRuleError, match="entropy, max_softmax or margin"):
        confidence(np.ones((1, 2)) / 2, "energy")  # type: ignore[arg-type]
