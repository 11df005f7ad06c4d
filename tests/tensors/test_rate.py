from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensors.codecs import parse_codec
from tensors.decoding import decode
from tensors.errors import CodecError
from tensors.rate import GRID, TOLERANCE, RateController
from tests.tiny import Array

SHAPE = (8, 4, 12, 12)
SIZE = int(np.prod(SHAPE))

CODECS = st.sampled_from(
    [
        "int8",
        "int8+zstd",
        "int4+zstd",
        "int8+channel+zstd",
        "int8+stochastic+zstd",
        "levels100+zstd",
    ]
)
BUDGETS = st.floats(0.02, 1.2).map(lambda bytes_a_value: bytes_a_value * SIZE)


def noise(rng: np.random.Generator) -> Array:
    return rng.standard_normal(SHAPE).astype(np.float32)


def behind_a_relu(rng: np.random.Generator) -> Array:
    return np.maximum(noise(rng), 0)


def smooth(rng: np.random.Generator) -> Array:
    """What zstd makes much smaller than its entropy."""
    coarse = rng.standard_normal((8, 4, 3, 3)).astype(np.float32)
    return coarse.repeat(4, 2).repeat(4, 3)


def with_outliers(rng: np.random.Generator) -> Array:
    """What a sample tells little about."""
    x = rng.standard_normal(SHAPE).astype(np.float32) * 1e-3
    x.reshape(-1)[rng.integers(0, SIZE, 5)] = 1
    return x


SOURCES = st.sampled_from([noise, behind_a_relu, smooth, with_outliers])
Source = Callable[[np.random.Generator], Array]


@settings(max_examples=60)
@given(CODECS, SOURCES, st.lists(BUDGETS, min_size=1, max_size=12), st.integers(0, 99))
def test_no_budget_is_exceeded_unless_the_fewest_levels_do(
    name: str, source: Source, budgets: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codec = parse_codec(name)
    control = RateController(codec)
    for budget in budgets:
        x = source(rng)
        rated = control.encode(x, budget, seed=seed)
        assert rated.levels is not None
        assert codec.levels is not None
        assert rated.levels in (*GRID, codec.levels)
        assert rated.levels <= codec.levels
        assert rated.data == codec.with_levels(rated.levels).encode(x, seed=seed)
        assert len(rated.data) <= budget * (1 + TOLERANCE) or rated.levels == GRID[0]


@settings(max_examples=60)
@given(CODECS, SOURCES, st.lists(BUDGETS, max_size=6), BUDGETS, BUDGETS, st.integers(0, 99))
def test_a_larger_budget_never_gives_fewer_levels(
    name: str, source: Source, before: list[float], one: float, other: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    control = RateController(parse_codec(name))
    for budget in before:
        control.encode(source(rng), budget)
    x = source(rng)
    less, more = (
        copy.deepcopy(control).encode(x, budget).levels for budget in sorted([one, other])
    )
    assert less is not None
    assert more is not None
    assert less <= more


@pytest.mark.parametrize("source", [noise, behind_a_relu, smooth])
def test_it_makes_use_of_its_budget(source: Source) -> None:
    rng = np.random.default_rng(1)
    codec = parse_codec("int8+zstd")
    control = RateController(codec)
    budget = len(codec.with_levels(16).encode(source(rng)))
    for _ in range(8):
        sent = len(control.encode(source(rng), budget).data)
    assert sent > 0.5 * budget


def test_it_follows_a_budget_that_changes() -> None:
    rng = np.random.default_rng(2)
    control = RateController(parse_codec("int8+zstd"))

    def levels(budget: float) -> list[int]:
        return [control.encode(noise(rng), budget * SIZE).levels or 0 for _ in range(6)]

    wide, narrow, again = levels(0.6), levels(0.2), levels(0.6)
    assert max(narrow) < min(*wide, *again)


def test_a_level_that_was_too_much_once_is_tried_again() -> None:
    rng = np.random.default_rng(3)
    control = RateController(parse_codec("int8+zstd"))
    odd = with_outliers(rng) + noise(rng)
    for _ in range(5):
        control.encode(odd, 0.1 * SIZE)
    before = control.encode(smooth(rng), 0.1 * SIZE).levels
    after = [control.encode(smooth(rng), 0.1 * SIZE).levels for _ in range(100)][-1]
    fresh = RateController(parse_codec("int8+zstd"))
    expected = [fresh.encode(smooth(rng), 0.1 * SIZE).levels for _ in range(20)][-1]
    assert before is not None
    assert after is not None
    assert expected is not None
    assert before < expected <= after


def test_what_is_left_out_costs_nothing() -> None:
    rng = np.random.default_rng(4)
    control = RateController(parse_codec("int8+zstd"))
    x, budget = noise(rng), 0.3 * SIZE
    keep = rng.random(SHAPE) < 0.3
    whole = control.encode(x, budget)
    masked = control.encode(x, budget, keep=keep)
    assert (masked.levels or 0) > (whole.levels or 0)
    assert len(masked.data) <= budget * (1 + TOLERANCE)
    assert not decode(masked.data, keep=keep)[~keep].any()


def test_torch_tensors_in_any_order_are_rated_alike() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    rated = [
        RateController(parse_codec("int8+zstd")).encode(same, 0.3 * SIZE)
        for same in (x.numpy(), x, x.to(memory_format=torch.channels_last))
    ]
    assert rated[0] == rated[1] == rated[2]


@pytest.mark.parametrize("shape", [(0, 4), (), (1,), (3, 0, 2)])
def test_small_tensors(shape: tuple[int, ...]) -> None:
    control = RateController(parse_codec("int8+zstd"))
    for budget in (0, 1000, -5):
        rated = control.encode(np.ones(shape, np.float32), budget)
        assert decode(rated.data).shape == shape


def test_a_constant_takes_all_levels_in_few_bytes() -> None:
    control = RateController(parse_codec("int8+zstd"))
    rated = control.encode(np.full(SHAPE, 3.5, np.float32), 200)
    assert rated.levels == 256
    np.testing.assert_array_equal(decode(rated.data), 3.5)


def test_a_budget_far_too_small_gives_the_fewest_levels() -> None:
    control = RateController(parse_codec("int8+zstd"))
    assert control.encode(noise(np.random.default_rng(6)), 1).levels == GRID[0]


def test_values_that_no_level_can_stand_for() -> None:
    control = RateController(parse_codec("int8+zstd"))
    with pytest.raises(CodecError, match="not finite"):
        control.encode(np.full(SHAPE, np.nan, np.float32), 100)
    assert control.encode(noise(np.random.default_rng(7)), 2 * SIZE).levels == 256


@pytest.mark.parametrize("name", ["fp32", "fp16+zstd", "bf16"])
def test_a_codec_without_levels_has_no_rate(name: str) -> None:
    with pytest.raises(CodecError, match="no levels"):
        RateController(parse_codec(name))


def test_a_budget_that_is_no_number_is_refused() -> None:
    controller = RateController(parse_codec("int8+zstd"))
    x = np.ones((2, 3), np.float32)
    with pytest.raises(CodecError, match="budget of NaN"):
        controller.encode(x, float("nan"))
    assert controller.encode(x, float("inf")).levels == 256


@settings(max_examples=40)
@given(st.sampled_from(["int3", "int8", "int5+channel", "levels100"]), st.floats(0, 1))
def test_estimates_are_exact_without_the_lossless_stage(name: str, share: float) -> None:
    rng = np.random.default_rng(8)
    codec, x = parse_codec(name), noise(rng)
    keep = None if codec.per_channel else rng.random(SHAPE) < share
    assert codec.estimate_bytes(x, keep=keep) == len(codec.encode(x, keep=keep))


def test_estimates_are_near_the_size_of_noise() -> None:
    x = np.random.default_rng(9).random(SHAPE, np.float32)
    for levels in GRID:
        codec = parse_codec("int8+zstd").with_levels(levels)
        assert codec.estimate_bytes(x) == pytest.approx(len(codec.encode(x)), rel=0.25)
        assert codec.estimate_bytes(x) == codec.bytes_of(parse_codec("int4+zstd").sketch(x))
