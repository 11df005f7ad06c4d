from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensors import Averager, AveragingError

State = dict[str, npt.NDArray[Any]]

KEYS = (
    "blocks.0.conv.weight",
    "blocks.1.bn.weight",
    "blocks.1.bn.running_mean",
    "blocks.1.bn.running_var",
    "blocks.1.bn.num_batches_tracked",
    "heads.1.linear.bias",
)
PARTS = (KEYS[:1], KEYS[1:5], KEYS[5:])


def random_state(rng: np.random.Generator, keys: tuple[str, ...] = KEYS) -> State:
    state: State = {}
    for key in keys:
        if key.endswith("num_batches_tracked"):
            state[key] = np.array(rng.integers(100, 200), np.int64)
        elif key.endswith("running_var"):
            state[key] = rng.gamma(2.0, 3.0, 5).astype(np.float32)
        else:
            shape = (4, 3, 3, 3) if key.endswith("conv.weight") else (5,)
            state[key] = (rng.standard_normal(shape) * 10 + 3).astype(np.float32)
    return state


def reference(start: State, holders: list[tuple[State, float]]) -> State:
    """The rules as DESIGN writes them, in float64, all holders in memory."""
    result = dict(start)
    for key in start:
        having = [(state, w) for state, w in holders if key in state]
        if not having:
            continue
        weights = np.array([w for _, w in having]) / sum(w for _, w in having)
        values = np.stack([state[key] for state, _ in having]).astype(np.float64)
        if key.endswith("num_batches_tracked"):
            result[key] = start[key] + sum(state[key] - start[key] for state, _ in having)
            continue
        if key.endswith("running_var"):
            mean_key = key.replace("running_var", "running_mean")
            means = np.stack([state[mean_key] for state, _ in having]).astype(np.float64)
            values = values + (means - np.tensordot(weights, means, 1)) ** 2
        result[key] = np.tensordot(weights, values, 1)
    return result


@given(st.integers(0, 2**32), st.integers(1, 7))
def test_average_equals_the_reference_on_random_holders(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    start = random_state(rng)
    holders = []
    for _ in range(count):
        parts = [part for part in PARTS if rng.random() < 0.7]
        keys = tuple(key for part in parts for key in part)
        holders.append((random_state(rng, keys), float(rng.integers(1, 1000))))
    averager = Averager(start)
    for state, weight in holders:
        averager.add(state, weight)
    result = averager.result()
    assert list(result) == list(start)
    for key, expected in reference(start, holders).items():
        assert (result[key].dtype, result[key].shape) == (start[key].dtype, start[key].shape)
        np.testing.assert_allclose(result[key], expected, rtol=2e-7, atol=1e-9)


def test_one_holder_comes_out_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    averager = Averager(random_state(rng))
    only = random_state(rng)
    averager.add(only, 1 / 3)
    for key, value in averager.result().items():
        assert value.tobytes() == only[key].tobytes()


def test_equal_holders_come_out_bit_for_bit() -> None:
    rng = np.random.default_rng(2)
    state = random_state(rng)
    averager = Averager(state)
    for weight in (0.1, 7.0, 1e9):
        averager.add(state, weight)
    for key, value in averager.result().items():
        assert value.tobytes() == state[key].tobytes()


def test_without_holders_the_start_comes_out_as_it_was_given() -> None:
    start = random_state(np.random.default_rng(3))
    before = {key: value.copy() for key, value in start.items()}
    averager = Averager(start)
    for value in start.values():
        value[...] = 0
    first = averager.result()
    for value in first.values():
        value[...] = 1
    for key, value in averager.result().items():
        assert value.tobytes() == before[key].tobytes()


def test_pooled_variance_is_that_of_the_pooled_data_and_survives_a_large_mean() -> None:
    rng = np.random.default_rng(4)
    samples = [rng.normal(1e4 + i, 1, size=n) for i, n in enumerate((100, 300, 50))]
    averager = Averager({"running_mean": np.zeros(1), "running_var": np.ones(1)})
    for data in samples:
        averager.add(
            {"running_mean": np.array([data.mean()]), "running_var": np.array([data.var()])},
            len(data),
        )
    pooled = np.concatenate(samples)
    result = averager.result()
    np.testing.assert_allclose(result["running_mean"], pooled.mean(), rtol=1e-12)
    np.testing.assert_allclose(result["running_var"], pooled.var(), rtol=1e-9)


def test_counters_add_increments_whatever_the_weights() -> None:
    averager = Averager({"bn.num_batches_tracked": np.array(10)})
    for value, weight in ((13, 1.0), (10, 500.0), (17, 2.0)):
        averager.add({"bn.num_batches_tracked": np.array(value)}, weight)
    assert averager.result()["bn.num_batches_tracked"] == 20


def test_result_can_be_read_between_additions() -> None:
    averager = Averager({"w": np.zeros(1)})
    averager.add({"w": np.array([2.0])}, 1)
    assert averager.result()["w"] == 2
    averager.add({"w": np.array([8.0])}, 2)
    assert averager.result()["w"] == 6


def test_other_integers_are_rounded_to_the_nearest() -> None:
    averager = Averager({"index": np.zeros(2, np.int64)})
    averager.add({"index": np.array([1, 4])}, 1)
    averager.add({"index": np.array([2, 4])}, 3)
    assert averager.result()["index"].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": np.zeros(1)}, "unknown: not among"),
        ({"heads.1.linear.bias": np.zeros(6)}, r"\(6,\), must be \(5,\)"),
        ({"heads.1.linear.bias": np.full(5, np.nan)}, "not finite"),
        ({"heads.1.linear.bias": np.full(5, np.inf)}, "not finite"),
    ],
)
def test_contribution_that_does_not_fit_is_refused_whole(change: State, message: str) -> None:
    rng = np.random.default_rng(5)
    start = random_state(rng)
    averager = Averager(start)
    with pytest.raises(AveragingError, match=message):
        averager.add(random_state(rng) | change, 1.0)
    for key, value in averager.result().items():
        assert value.tobytes() == start[key].tobytes()


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_batch_norm_moments_must_come_together(missing: str) -> None:
    rng = np.random.default_rng(6)
    state = random_state(rng)
    averager = Averager(state)
    del state[f"blocks.1.bn.{missing}"]
    with pytest.raises(AveragingError, match="must come together"):
        averager.add(state, 1.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weight_must_be_finite_and_positive(weight: float) -> None:
    averager = Averager({"w": np.zeros(1)})
    with pytest.raises(AveragingError, match="weight"):
        averager.add({"w": np.ones(1)}, weight)
