"""Entries left out, and which entries are zero."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensors import CodecError, FormatError, decode, decode_torch, encode_exact, parse_codec
from tensors.decoding import nonzero, relu_mask
from tensors.format import read_header
from tests.tensors.arrays import (
    Array,
    affine_codecs,
    arrays,
    codecs,
    layouts,
    on_gpu_path,
    outcome,
    torch_layouts,
)

Mask = npt.NDArray[np.bool_]

X = np.arange(-3, 9, dtype=np.float32).reshape(3, 4)


def mask_for(x: Array, seed: int) -> Mask:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.random(x.shape) < rng.choice([0.0, 0.1, 0.5, 1.0]))


def reason(data: bytes, keep: Mask | None) -> str:
    for read in (decode, decode_torch):
        with pytest.raises(FormatError) as caught:
            read(data, keep=keep)
    return caught.value.reason


@given(x=arrays(), name=affine_codecs(per_channel=False), seed=st.integers(0, 1000))
def test_kept_entries_come_back_as_if_all_were_sent_and_others_as_zero(
    x: Array, name: str, seed: int
) -> None:
    keep = mask_for(x, seed)
    data = outcome(name, x, keep=keep, seed=seed)
    assume(isinstance(data, bytes))
    assert isinstance(data, bytes)
    y = decode(data, keep=keep)
    assert (y.dtype, y.shape) == (np.dtype(np.float32), x.shape)
    assert not y[~keep].any()
    assert not np.signbit(y[~keep]).any()
    holds_zero = x.size and x.min() <= 0 <= x.max()
    if holds_zero:  # else the mask makes room for zero
        np.testing.assert_array_equal(y[keep], decode(parse_codec(name).encode(x, seed=seed))[keep])
    if x.size and "stochastic" not in name and ("zstd" in name or name == "int8"):
        span = max(float(x.max()), 0) - min(float(x.min()), 0)
        bound = span / read_header(data).top / 2 + 2.0**-20 * float(np.abs(x).max()) + 2.0**-118
        assert (np.abs(y - x.astype(np.float64))[keep] <= bound).all()
    for read in (decode_torch(data, keep=keep), decode_torch(data, keep=keep, channels_last=True)):
        assert read.contiguous().numpy().tobytes() == y.tobytes()
    assert read_header(data).masked
    assert read_header(data).values == np.count_nonzero(keep)
    assert len(data) <= parse_codec(name).max_bytes(x.shape)


@given(x=arrays(), name=affine_codecs(per_channel=False), seed=st.integers(0, 1000))
def test_layouts_of_tensor_and_mask_do_not_matter(x: Array, name: str, seed: int) -> None:
    keep = mask_for(x, seed)
    expected = outcome(name, x, keep=keep)
    for same in layouts(x):
        assert outcome(name, same, keep=keep) == expected
    for t in torch_layouts(torch.from_numpy(x)):
        assert outcome(name, t, keep=keep) == expected
    for same_keep in layouts(keep):
        assert outcome(name, x, keep=same_keep) == expected
        if isinstance(expected, bytes):
            np.testing.assert_array_equal(
                decode(expected, keep=same_keep), decode(expected, keep=keep)
            )


@pytest.mark.parametrize("name", ["int2", "int4+zstd", "levels200", "int8+stochastic"])
def test_pictures_from_every_path_to_every_path(name: str) -> None:
    t = torch.randn((3, 4, 5, 6), generator=torch.Generator().manual_seed(3))
    last = t.contiguous(memory_format=torch.channels_last)
    keep = t.numpy() > 0.3
    data = parse_codec(name).encode(t.numpy(), keep=keep, seed=1)
    for same in (t, last):
        assert parse_codec(name).encode(same, keep=keep, seed=1) == data
        with on_gpu_path():
            assert parse_codec(name).encode(same, keep=keep, seed=1) == data
    y = decode(data, keep=keep)
    assert np.abs(y - t.numpy())[keep].mean() < 0.5
    np.testing.assert_array_equal(decode_torch(data, keep=keep).numpy(), y)
    moved = decode_torch(data, keep=keep, channels_last=True)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(moved.numpy(), y)


def test_only_kept_entries_take_bytes() -> None:
    x = np.random.default_rng(1).standard_normal((64, 16, 8, 8)).astype(np.float32)
    keep = x > 1
    codec = parse_codec("int4")
    saved = len(codec.encode(x)) - len(codec.encode(x, keep=keep))
    assert saved == x.size // 2 - -(-np.count_nonzero(keep) // 2)


@pytest.mark.parametrize("codec", ["int2", "levels5", "int8", "int4+stochastic"])
@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-41, -1e-41, 1e38])
def test_a_mask_makes_room_for_zero(codec: str, scale: float) -> None:
    x = np.float32(scale) * np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)
    keep = np.arange(12).reshape(3, 4) % 3 != 0
    y = decode(parse_codec(codec).encode(x, keep=keep), keep=keep)
    assert not y[~keep].any()
    if abs(scale) >= 1:
        assert np.sign(y[keep]).tolist() == [np.sign(scale)] * 8


def test_the_wrong_mask_is_refused() -> None:
    keep = X > 0
    data = parse_codec("int4").encode(X, keep=keep)
    assert reason(data, None) == "wrong_mask"
    assert reason(data, X > 1) == "wrong_mask"
    assert reason(data, X > -1) == "wrong_mask"
    assert reason(data, keep.T) == "wrong_mask"
    assert reason(data, keep.reshape(-1)) == "wrong_mask"
    assert reason(data, keep[:2]) == "wrong_mask"
    assert reason(data, np.ones((), np.bool_)) == "wrong_mask"
    with pytest.raises(FormatError) as caught:
        nonzero(data)
    assert caught.value.reason == "wrong_mask"


@pytest.mark.parametrize(
    "codec", ["fp32", "fp16", "bf16+zstd", "int4+channel", "int8+channel+zstd"]
)
def test_codecs_that_cannot_leave_entries_out_say_so(codec: str) -> None:
    with pytest.raises(CodecError, match="cannot leave entries out"):
        parse_codec(codec).encode(X, keep=X > 0)


def test_a_mask_is_of_the_tensors_shape() -> None:
    for keep in ((X > 0).T, (X > 0)[:1], np.zeros(0, np.bool_)):
        with pytest.raises(AssertionError):
            parse_codec("int4").encode(X, keep=keep)


def test_a_mask_is_ignored_where_nothing_was_left_out() -> None:
    data = parse_codec("int8").encode(X)
    np.testing.assert_array_equal(decode(data, keep=X > 0), decode(data))
    np.testing.assert_array_equal(decode_torch(data, keep=X > 0).numpy(), decode(data))


@pytest.mark.parametrize(
    ("offset", "scale"),
    [
        (1.0, 1.0),
        (-0.5, 1.0),
        (-20.0, 1.0),
        (5.0, 0.0),
        (1e-44, 1e-38),
        (1e38, 1e-38),
        (-1e38, 1e-44),
    ],
)
def test_a_masked_tensor_without_a_level_for_zero_is_refused(offset: float, scale: float) -> None:
    keep = X > 0
    data = read_header(parse_codec("int4").encode(X, keep=keep))
    forged = data.pack(np.array([offset, scale], "<f4").tobytes(), bytes(data.body_bytes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(forged, keep) == "bad_side_data"
    whole = data.pack(np.array([-7 * 0.3, 0.3], "<f4").tobytes(), bytes(data.body_bytes))
    with pytest.raises(FormatError, match="without a level for zero"):
        decode(whole, keep=keep)
    fine = data.pack(np.array([-7.5, 1.5], "<f4").tobytes(), bytes(data.body_bytes))
    assert (decode(fine, keep=keep) == np.where(keep, -7.5, 0)).all()


@given(x=arrays(), name=codecs)
def test_nonzero_is_what_decodes_to_another_value(x: Array, name: str) -> None:
    data = outcome(name, x)
    if isinstance(data, bytes):
        found = nonzero(data)
        assert found.dtype == np.bool_
        np.testing.assert_array_equal(found, decode(data) != 0)


@given(x=hnp.arrays(np.float32, (4, 3, 5), elements=st.sampled_from([-2, -0.5, -0.0, 0, 0.25, 3])))
def test_nonzero_of_values_around_zero(x: Array) -> None:
    for modifiers in ("", "+channel", "+zstd", "+stochastic", "+channel+stochastic"):
        for base in ("int2", "int4", "int8", "levels5"):
            for values in (x, np.maximum(x, 0), np.minimum(x, 0), x + 9, x - 9, np.zeros_like(x)):
                data = parse_codec(base + modifiers).encode(values)
                np.testing.assert_array_equal(nonzero(data), decode(data) != 0)


def test_nonzero_of_levels_that_all_stand_for_one_value() -> None:
    levels = parse_codec("int4").encode(X)
    header = read_header(levels)
    for offset, expected in ((0, False), (-0.0, False), (1e-45, True)):
        side = np.array([offset, 0], "<f4").tobytes()
        data = header.pack(side, levels[-header.body_bytes :])
        assert (nonzero(data) == expected).all()
        np.testing.assert_array_equal(nonzero(data), decode(data) != 0)


def test_nonzero_of_exact_tensors() -> None:
    for x in (np.array([0, 3, -1]), np.array([0.0, -0.0, np.nan, np.inf, 1e-45], np.float32)):
        np.testing.assert_array_equal(nonzero(encode_exact(x)), x != 0)


def test_gradient_behind_a_relu_is_sent_where_the_activation_lived() -> None:
    rng = np.random.default_rng(2)
    activation = np.maximum(rng.standard_normal((8, 4, 6, 6)), 0).astype(np.float32)
    keep = nonzero(parse_codec("int3+zstd").encode(activation))
    assert 0.2 < keep.mean() < 0.5
    gradient = torch.from_numpy(rng.standard_normal(activation.shape).astype(np.float32))
    codec = parse_codec("int8+stochastic+zstd")
    got = decode_torch(codec.encode(gradient, keep=keep, seed=3), keep=keep)
    assert not got[torch.from_numpy(~keep)].any()
    assert (got - gradient)[torch.from_numpy(keep)].abs().max() < 8 / 255


@pytest.mark.parametrize("name", ["fp32", "fp16+zstd", "bf16", "int2", "int4+channel", "int8+zstd"])
def test_only_what_a_relu_may_have_made_has_a_relu_mask(name: str) -> None:
    codec = parse_codec(name)
    x = np.random.default_rng(4).standard_normal((4, 3, 8)).astype(np.float32)
    for behind in (np.maximum(x, 0), np.zeros_like(x), x[:0], np.abs(x) + 1):
        mask = relu_mask(codec.encode(behind))
        assert mask is not None
        np.testing.assert_array_equal(mask, decode(codec.encode(behind)) != 0)
    assert relu_mask(codec.encode(x)) is None
    assert relu_mask(codec.encode(-np.abs(x) - 1)) is None
    one_channel = np.maximum(x, 0)
    one_channel[:, 1] = x[:, 1]
    assert relu_mask(codec.encode(one_channel)) is None


@pytest.mark.parametrize("codec", ["int2", "int3", "int4", "int2+zstd", "int4+channel+zstd"])
def test_a_gelu_is_not_taken_for_a_relu(codec: str) -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(4, 3, 8, 8)).astype(np.float32)
    gelu = x / (1 + np.exp(-1.702 * x))
    assert relu_mask(parse_codec(codec).encode(gelu)) is None
    assert relu_mask(parse_codec(codec).encode(np.maximum(x, 0))) is not None
