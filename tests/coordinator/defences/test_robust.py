"""Merging with liars among the holders of a block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation import Aggregation, Model
from coordinator.defences import robust
from coordinator.defences.robust import RobustAverager, RobustRule, robust_rule
from coordinator.errors import StoreError
from tensors.averaging import Averager
from tensors.errors import AveragingError
from tensors.robust import MEDIAN
from tests.server_side import START, trained_half
from tests.tiny import Array, assert_close, assert_same

ROOM = 1 << 26
MEAN, VARIANCE = "blocks.0.bn.running_mean", "blocks.0.bn.running_var"
COUNTER, WEIGHT = "blocks.0.bn.num_batches_tracked", "blocks.0.conv.weight"
STATE: dict[str, Array] = {
    MEAN: np.zeros(2, np.float32),
    VARIANCE: np.ones(2, np.float32),
    COUNTER: np.array(10),
    WEIGHT: np.zeros((2, 3), np.float32),
}


def holder(value: float, steps: int = 5) -> dict[str, Array]:
    return {
        MEAN: np.full(2, value, np.float32),
        VARIANCE: np.full(2, 2, np.float32),
        COUNTER: np.array(10 + steps),
        WEIGHT: np.full((2, 3), value, np.float32),
    }


def averager(folder: Path, trim: float = 0.25, limit: int = ROOM) -> RobustAverager:
    return RobustAverager(STATE, RobustRule(trim, folder, limit))


def test_one_of_five_cannot_move_it_far(tmp_path: Path) -> None:
    for trim in (0.25, MEDIAN):
        liars = averager(tmp_path, trim)
        for value in (0.9, 1.0, 1.1, 1.0):
            liars.add(holder(value), 32)
        liars.add(holder(-1e6, steps=10**12), 32)
        merged = liars.result()
        np.testing.assert_allclose(merged[WEIGHT], 1, atol=0.07)
        np.testing.assert_allclose(merged[MEAN], 1, atol=0.07)
        np.testing.assert_allclose(merged[VARIANCE], 2, atol=0.02)
        assert merged[COUNTER] == 10 + 5 * 5
        for name, values in merged.items():
            assert (values.dtype, values.shape) == (STATE[name].dtype, STATE[name].shape)


def test_whoever_claims_many_images_does_not_decide_alone(tmp_path: Path) -> None:
    one = averager(tmp_path, MEDIAN)
    for _ in range(4):
        one.add(holder(1.0), 32)
    one.add(holder(-50.0), 32 * 1000)
    np.testing.assert_allclose(one.result()[WEIGHT], 1)


def test_what_the_server_trained_for_several_devices_keeps_its_weight(tmp_path: Path) -> None:
    both = averager(tmp_path, MEDIAN)
    for _ in range(4):
        both.add(holder(1.0), 32)
    both.add(holder(3.0), 160, shared=True)
    np.testing.assert_allclose(both.result()[WEIGHT], 3)


def test_with_nothing_to_trim_it_is_the_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trimmed, mean = averager(tmp_path, trim=1e-12), Averager(STATE)
    for _ in range(5):
        state = holder(float(rng.normal()), int(rng.integers(1, 9)))
        weight = float(rng.integers(32, 64))
        for each in (trimmed, mean):
            each.add(state, weight)
    assert_close(trimmed.result(), mean.result(), rtol=1e-6)


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for values in (1 << 20, 4):
        monkeypatch.setattr(robust, "CHUNK_VALUES", values)
        one = averager(tmp_path)
        for value in (0.5, 2.0, 3.5):
            one.add(holder(value), 8)
        results.append(one.result())
    assert_same(*results)


def test_a_single_holder_is_taken_over_and_what_nobody_holds_stays(tmp_path: Path) -> None:
    rule = RobustRule(MEDIAN, tmp_path, ROOM)
    aggregation = Aggregation(START, first_server_block=2, device_copies=True, robust=rule)
    half = trained_half(2)
    aggregation.add_device(half, 8)
    merged = aggregation.result()
    assert_same({name: merged.state[name] for name in half}, half)
    assert_same(merged.momentum, START.momentum)
    others = START.state.keys() - half.keys()
    assert_same({n: merged.state[n] for n in others}, {n: START.state[n] for n in others})


def test_what_cannot_be_averaged_is_refused_whole(tmp_path: Path) -> None:
    one = averager(tmp_path)
    for wrong, words in (
        ({WEIGHT: np.full((2, 3), np.nan, np.float32)}, "finite"),
        ({WEIGHT: np.zeros(3, np.float32)}, "shape"),
        ({MEAN: np.zeros(2, np.float32)}, "together"),
    ):
        with pytest.raises(AveragingError, match=words):
            one.add(wrong, 8)
    with pytest.raises(AveragingError, match="weight"):
        one.add(holder(1.0), 0)
    assert_same(one.result(), STATE)


def test_the_disk_that_it_takes_is_bounded_and_given_back(tmp_path: Path) -> None:
    size = sum(values.nbytes for values in STATE.values())
    one = averager(tmp_path, MEDIAN, limit=2 * size)
    for value in (1.0, 1.0):
        one.add(holder(value), 8)
    with pytest.raises(AveragingError, match="contributions_bytes"):
        one.add(holder(9.0), 8)
    np.testing.assert_allclose(one.result()[WEIGHT], 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said_to_be_that(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(StoreError, match="free space or choose another folder"):
        averager(in_the_way)


def test_the_mean_keeps_nothing(tmp_path: Path) -> None:
    assert robust_rule("mean", 0.25, tmp_path, ROOM) is None
    median = robust_rule("median", 0.25, tmp_path, ROOM)
    trimmed = robust_rule("trimmed-mean", 0.25, tmp_path, ROOM)
    assert median is not None
    assert trimmed is not None
    assert (median.trim, trimmed.trim) == (MEDIAN, 0.25)


def test_a_model_merges_by_the_rule(tmp_path: Path) -> None:
    """Momentum too, and blocks by their own holders."""
    velocity = {name: np.ones_like(values) for name, values in START.momentum.items()}
    model = Model(START.state, START.momentum)
    aggregation = Aggregation(
        model,
        first_server_block=2,
        device_copies=True,
        robust=RobustRule(MEDIAN, tmp_path, ROOM),
    )
    server = {n: v for n, v in START.state.items() if n in START.momentum}
    for scale in (1.0, 1.0, -1e3):
        momentum = {name: np.float32(scale) * values for name, values in velocity.items()}
        aggregation.add_server(server, momentum, 32)
    assert_same(aggregation.result().momentum, velocity)
