"""Levels and maps: error bounds, zero, clipping, chance, and the twin for GPUs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensors import CodecError
from tensors.affine import (
    Affine,
    Values,
    by_channel,
    dequantize,
    dither_of,
    entropy_bits,
    fit,
    in_c_order,
    values_of,
)
from tensors.affine_torch import GpuValues
from tensors.affine_torch import values_of as values_of_tensor
from tensors.clipping import fit_clipped
from tests.tensors.arrays import float32s, torch_layouts

Float32s = npt.NDArray[np.float32]

tops = st.integers(2, 255)
DRAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "student": lambda rng, n: rng.standard_t(2, n),
    "uniform": lambda rng, n: rng.random(n),
    "positive": lambda rng, n: 50 + rng.standard_normal(n),
    "negative": lambda rng, n: -np.abs(rng.standard_t(3, n)) - 1,
    "sparse": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.02),
    "evenly_spaced": lambda rng, n: rng.integers(0, 16, n),
    "two_values": lambda rng, n: rng.integers(0, 2, n) * 3 - 1,
}


def ends(*values: float) -> Float32s:
    return np.array(values, np.float32)


def fitted(values: Values, top: int, *, per_channel: bool = False, clip: bool = False) -> Affine:
    low, high = values.range(per_channel=per_channel)
    if not clip:
        return fit(low, high, top)
    sample = values.sample(per_channel=per_channel)
    return fit_clipped(low, high, top, sample, sample.size / max(1, values.size))


def quantized(values: Values, affine: Affine, seed: int | None = None) -> npt.NDArray[np.uint8]:
    """(size,) levels in C order."""
    return values.quantize(affine, seed, channel_major=False)


def squared_error(x: Float32s, top: int, *, clip: bool) -> float:
    values = values_of(x.reshape(1, 1, -1))
    affine = fitted(values, top, clip=clip)
    got = dequantize(quantized(values, affine).reshape(1, 1, -1), affine).reshape(x.shape)
    return float(((got.astype(np.float64) - x) ** 2).sum())


def rounding(x: Float32s) -> float:
    """What float32's roundings may add to an error of half a level."""
    return 2.0**-20 * float(np.abs(x).max(initial=0)) + 2.0**-118


def try_fit(values: Values, top: int, *, per_channel: bool, clip: bool) -> Affine | None:
    """None for a range that float32 does not hold; it may refuse those only."""
    try:
        return fitted(values, top, per_channel=per_channel, clip=clip)
    except CodecError:
        low, high = values.range(per_channel=False)
        assert float(high[0]) - float(low[0]) > 3.4e38
        return None


@given(x=float32s(), top=tops, per_channel=st.booleans())
def test_without_clipping_each_value_is_within_half_a_level(
    x: Float32s, top: int, per_channel: bool
) -> None:
    values = values_of(x)
    affine = try_fit(values, top, per_channel=per_channel, clip=False)
    if affine is None:
        return
    levels = quantized(values, affine)
    assert levels.max(initial=0) <= top
    view = x.reshape(by_channel(x.shape))
    got = dequantize(levels.reshape(view.shape), affine).astype(np.float64)
    half = affine.scale.astype(np.float64)[:, None] / 2
    assert (np.abs(got - view) <= half + rounding(x)).all()


@given(x=float32s(), top=tops, per_channel=st.booleans(), clip=st.booleans())
def test_zero_comes_back_as_zero(x: Float32s, top: int, per_channel: bool, clip: bool) -> None:
    """Wherever it occurs, every range that holds it has a level for it, clipped or not."""
    values = values_of(x)
    affine = try_fit(values, top, per_channel=per_channel, clip=clip)
    if affine is None:
        return
    view = x.reshape(by_channel(x.shape))
    for seed in (None, 0, 5):
        got = dequantize(quantized(values, affine, seed).reshape(view.shape), affine)
        assert (got[view == 0] == 0).all()
        assert not np.signbit(got[view == 0]).any()


@pytest.mark.parametrize("top", [2, 3, 7, 12, 15, 255])
@pytest.mark.parametrize(
    ("low", "high"),
    [(-5, 0), (0, 5), (-1, 1), (-1e-30, 5), (-5, 1e-30), (-1.7e38, 1.7e38), (-1e-42, 1e-41)],
)
def test_a_range_that_holds_zero_has_a_level_for_it(low: float, high: float, top: int) -> None:
    affine = fit(ends(low), ends(high), top)
    every = np.arange(top + 1, dtype=np.uint8).reshape(1, 1, -1)
    values = dequantize(every, affine)
    assert (values == 0).any()
    assert values.min() >= low - affine.scale[0] * 1.001
    assert values.max() <= high + affine.scale[0] * 0.501


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), top=tops)
def test_a_constant_is_exact(value: float, top: int) -> None:
    affine = fit(ends(value), ends(value), top)
    assert (affine.offset.tolist(), affine.scale.tolist()) == ([value], [0.0])
    assert not np.signbit(affine.offset[0] + affine.scale[0]) or value < 0


def test_a_relu_range_starts_at_zero_and_needs_no_clamp() -> None:
    affine = fit(ends(-0.0, 0.0), ends(6, 0), 15)
    assert affine.offset.tobytes() == ends(0, 0).tobytes()
    assert not affine.clips


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-3e38, 3e38),
        (-np.inf, 0),
        (0, np.inf),
        (np.nan, np.nan),
        (np.inf, np.inf),
        (-np.inf, np.inf),
    ],
)
def test_a_range_that_is_not_finite_is_refused(low: float, high: float) -> None:
    with pytest.raises(CodecError, match="not finite"):
        fit(ends(0, low), ends(1, high), 15)


@pytest.mark.parametrize("top", [2, 3, 7, 12, 15, 127])
@pytest.mark.parametrize("draw", DRAWS)
def test_clipping_does_not_increase_the_squared_error(draw: str, top: int) -> None:
    rng = np.random.default_rng(7)
    for n in (1, 2, 10, 300, 50_000):
        x = DRAWS[draw](rng, n).astype(np.float32)
        plain, clipped = (squared_error(x, top, clip=clip) for clip in (False, True))
        # The histogram knows a value up to a bin, the sample knows the tail up to its size.
        bin_width = float(np.ptp(x)) / 256
        assert clipped <= 1.1 * plain + n * bin_width**2 + 1e-9


@given(x=float32s(min_side=1), top=tops)
def test_clipping_never_costs_more_than_the_histogram_can_miss(x: Float32s, top: int) -> None:
    if try_fit(values_of(x), top, per_channel=False, clip=True) is None:
        return
    plain, clipped = (squared_error(x, top, clip=clip) for clip in (False, True))
    bin_width = (float(x.max()) - float(x.min())) / 256
    full_level = (float(x.max()) - float(x.min())) / top
    assert clipped <= 1.1 * plain + x.size * (bin_width**2 + full_level**2 / 12) + rounding(x) ** 2


@pytest.mark.parametrize(("top", "factor"), [(3, 0.5), (7, 0.5), (15, 0.7)])
def test_clipping_really_helps_a_heavy_tail(top: int, factor: float) -> None:
    x = np.random.default_rng(3).standard_t(4, 100_000).astype(np.float32)
    assert squared_error(x, top, clip=True) < factor * squared_error(x, top, clip=False)


def test_an_end_that_the_sample_missed_is_reckoned_with() -> None:
    x = np.random.default_rng(1).random(100_001).astype(np.float32)
    x[100_000 - 7] = 8
    assert 8 not in values_of(x).sample(per_channel=False)
    assert squared_error(x, 126, clip=True) < squared_error(x, 126, clip=False)


def test_each_channel_is_clipped_on_its_own() -> None:
    rng = np.random.default_rng(4)
    x = np.stack([rng.standard_t(3, (4, 5000)), rng.random((4, 5000))], 1).astype(np.float32)
    values = values_of(x)
    full, clipped = (fitted(values, 7, per_channel=True, clip=clip) for clip in (False, True))
    assert clipped.scale[0] < 0.7 * full.scale[0]
    assert clipped.scale[1] > 0.95 * full.scale[1]


@given(
    x=float32s(), top=tops, per_channel=st.booleans(), clip=st.booleans(), seed=st.integers(-3, 9)
)
def test_every_layout_and_the_gpu_path_give_the_same_levels(
    x: Float32s, top: int, per_channel: bool, clip: bool, seed: int
) -> None:
    values = values_of(x)
    affine = try_fit(values, top, per_channel=per_channel, clip=clip)
    if affine is None:
        return
    for t in torch_layouts(torch.from_numpy(x)):
        for same in (values_of_tensor(t), GpuValues(t.detach())):
            assert same.size == values.size
            for end, known in zip(
                same.range(per_channel=per_channel),
                values.range(per_channel=per_channel),
                strict=True,
            ):
                np.testing.assert_array_equal(end, known)
            np.testing.assert_array_equal(
                same.sample(per_channel=per_channel), values.sample(per_channel=per_channel)
            )
            for chance in (None, seed):
                expected = values.quantize(affine, chance, channel_major=False)
                got = same.quantize(affine, chance, channel_major=False)
                np.testing.assert_array_equal(got, expected)
                moved = same.quantize(affine, chance, channel_major=True)
                view = expected.reshape(by_channel(x.shape))
                np.testing.assert_array_equal(moved, view.transpose(1, 0, 2).reshape(-1))
                back = in_c_order(moved, x.shape, channel_major=True)
                np.testing.assert_array_equal(back, view)


@pytest.mark.parametrize("draw", [d for d in DRAWS if d not in ("two_values", "evenly_spaced")])
def test_rounding_by_chance_has_no_mean_error(draw: str) -> None:
    x = DRAWS[draw](np.random.default_rng(5), 200_000).astype(np.float32).reshape(200, 10, 100)
    values = values_of(x)
    affine = fit(*values.range(per_channel=False), 3)
    inside = (x > affine.offset) & (x < affine.offset + 3 * affine.scale)
    for seed in (0, 1):
        lost = (dequantize(quantized(values, affine, seed).reshape(x.shape), affine) - x)[
            inside & (x != 0)
        ]
        spread = lost.std() / np.sqrt(lost.size)
        assert abs(lost.mean(dtype=np.float64)) < 5 * spread


def test_rounding_by_chance_goes_up_as_often_as_the_value_is_far() -> None:
    x = np.full((64, 1, 4096), 0.3, np.float32)
    x[0, 0, :2] = 0, 3
    levels = quantized(values_of(x), fit(ends(0), ends(3), 3), 1).reshape(x.shape)
    assert set(np.unique(levels[1:]).tolist()) == {0, 1}
    assert levels[1:].mean() == pytest.approx(0.3, abs=5 * 0.46 / np.sqrt(63 * 4096))


def test_over_the_seeds_every_value_is_met_in_the_mean() -> None:
    x = np.random.default_rng(6).standard_normal((256, 2, 8)).astype(np.float32)
    values = values_of(x)
    affine = fit(*values.range(per_channel=False), 7)
    mean = np.mean(
        [
            dequantize(quantized(values, affine, seed).reshape(x.shape), affine)
            for seed in range(256)
        ],
        0,
        np.float64,
    )
    inside = (x > affine.offset) & (x < affine.offset + 7 * affine.scale)
    off = np.abs(mean - x)[inside] / affine.scale
    assert off.max() < 5 * 0.5 / np.sqrt(256)


def test_chance_is_the_seeds_and_the_samples_alone() -> None:
    x = np.random.default_rng(8).random((7, 3, 50), np.float32)
    values = values_of(x)
    affine = fit(*values.range(per_channel=False), 3)
    by_seed = [quantized(values, affine, seed) for seed in range(20)]
    for seed, levels in enumerate(by_seed):
        np.testing.assert_array_equal(levels, quantized(values, affine, seed))
    assert len({levels.tobytes() for levels in by_seed}) == 20


@pytest.mark.parametrize("shape", [(1, 2, 25), (50,), (4, 3, 5)])
def test_over_all_seeds_every_single_value_is_met(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(9).random(shape, np.float32)
    values = values_of(x)
    affine = fit(*values.range(per_channel=False), 3)
    total = np.zeros(x.size)
    for seed in range(8192):
        levels = values.quantize(affine, seed, channel_major=False)
        total += levels * float(affine.scale[0]) + float(affine.offset[0])
    np.testing.assert_allclose(total / 8192, x.reshape(-1), atol=float(affine.scale[0]) / 50)


@given(
    top=tops,
    low=st.floats(-1000, 0, width=32),
    high=st.floats(1, 1000, width=32),
    seed=st.integers(0, 2**40),
)
def test_a_value_that_is_a_level_keeps_it_whatever_the_chance(
    top: int, low: float, high: float, seed: int
) -> None:
    affine = fit(ends(low), ends(high), top)
    levels = np.random.default_rng(seed).integers(0, top + 1, (5, 1, 300)).astype(np.uint8)
    x = dequantize(levels, affine)
    for chance in (None, seed):
        got = quantized(values_of(x), affine, chance).reshape(x.shape)
        np.testing.assert_array_equal(got, levels)


def test_a_level_stays_under_the_least_and_the_greatest_chance() -> None:
    shape = (16, 1, 2**15)
    table = dither_of(shape)
    for found in (table.min(), table.max()):  # of half a million numbers, every one occurs
        assert found in (2.0**-14, 1 - 2.0**-14)
    x = np.full(shape, 3 * np.float32(0.1), np.float32)  # 3 · 0.1 · (1 / 0.1) is below 3
    levels = quantized(values_of(x), Affine(ends(0), ends(0.1), 255, clips=False), 0)
    assert (levels == 3).all()


def test_the_dither_is_the_same_everywhere_and_moves_with_the_layout() -> None:
    table = dither_of((2, 3, 5))
    assert (table[0, 0, :4] * 2**14).tolist() == [9465, 14311, 6527, 1545]
    assert not table.flags.writeable
    np.testing.assert_array_equal(
        dither_of((2, 5, 3), channels_last=True), table.transpose(0, 2, 1)
    )


def test_large_tensors_are_sampled_evenly() -> None:
    x = np.arange(64 * 32 * 1024, dtype=np.float32).reshape(64, 32, 1024)
    for per_channel in (False, True):
        sample = values_of(x).sample(per_channel=per_channel)
        assert sample.shape[0] == (32 if per_channel else 1)
        assert 4000 <= sample.size <= 20_000
        assert np.unique(sample).size == sample.size


def test_entropy_of_levels() -> None:
    assert entropy_bits(np.zeros(9, np.uint8)) == 0
    assert entropy_bits(np.zeros(0, np.uint8)) == 0
    assert entropy_bits(np.arange(256, dtype=np.uint8).repeat(3)) == pytest.approx(8)
    assert entropy_bits(np.array([0, 0, 1, 5], np.uint8)) == pytest.approx(1.5)
