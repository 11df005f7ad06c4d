from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensors import CodecError, decode, decode_torch, encode_exact, parse_codec, read_header
from tensors.format import DTYPES, Lossless

BASES = ["fp32", "fp16", "bf16", "int8"]
EVERY = [*BASES, *(base + "+zstd" for base in BASES)]

Array = npt.NDArray[Any]


def arrays(*, finite: bool = True, min_side: int = 0) -> st.SearchStrategy[Array]:
    dtypes = st.sampled_from([np.dtype(name) for name in ("f2", "f4", "f8")])
    shapes = hnp.array_shapes(min_dims=0, max_dims=5, min_side=min_side, max_side=6)

    def filled(dtype: np.dtype[Any]) -> st.SearchStrategy[Array]:
        width = 8 * dtype.itemsize
        bound = {16: 65504.0, 32: 2.0**127, 64: 2.0**127}[width]
        values = (
            st.floats(-bound, bound, width=width)  # type: ignore[arg-type]
            if finite
            else st.floats(width=width)  # type: ignore[arg-type]
        )
        return hnp.arrays(dtype, shapes, elements=values)

    return dtypes.flatmap(filled)


def layouts(x: Array) -> list[Array]:
    """The same values in other strides, some of them negative."""
    if not x.ndim:
        return [x]
    spread = np.zeros(tuple(2 * n for n in x.shape), x.dtype)
    every_other = spread[tuple(slice(None, None, 2) for _ in x.shape)]
    every_other[...] = x
    return [np.asfortranarray(x), every_other, np.flip(np.flip(x).copy())]


def outcome(name: str, x: Array | torch.Tensor) -> bytes | str:
    """The bytes, or the error where the codec refuses."""
    try:
        return parse_codec(name).encode(x)
    except CodecError as error:
        return str(error)


def same(name: str, x: Array) -> bytes | str:
    """The outcome, which must be the same for numpy, torch and every layout of the values."""
    expected = outcome(name, x)
    for y in layouts(x):
        assert outcome(name, y) == expected
    t = torch.from_numpy(x)
    assert outcome(name, t) == expected
    assert outcome(name, t.clone().requires_grad_()) == expected
    if t.ndim:
        assert outcome(name, t.mT.contiguous().mT if t.ndim > 1 else t) == expected
        assert outcome(name, t.repeat_interleave(2, 0)[::2]) == expected
    if t.ndim == 4:
        assert outcome(name, t.contiguous(memory_format=torch.channels_last)) == expected
    return expected


@pytest.mark.parametrize("name", EVERY)
@given(x=arrays())
def test_torch_and_numpy_give_the_same_bytes_from_any_layout(name: str, x: Array) -> None:
    same(name, x)


@pytest.mark.parametrize("name", BASES)
@given(x=arrays(finite=False, min_side=1))
def test_torch_and_numpy_agree_on_what_they_refuse(name: str, x: Array) -> None:
    if name != "fp32" or np.isfinite(x).all():
        same(name, x)


@pytest.mark.parametrize("name", EVERY)
@given(x=arrays())
def test_bfloat16_tensors_encode_as_their_float32_values(name: str, x: Array) -> None:
    t = torch.from_numpy(x).to(torch.bfloat16)
    expected = outcome(name, t.float().numpy())
    assert outcome(name, t) == expected
    if t.ndim == 4:
        assert outcome(name, t.contiguous(memory_format=torch.channels_last)) == expected


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(32, 16, 28, 28), (32, 64, 32, 32), (1, 16, 32, 32)])
def test_real_sizes_agree_in_every_layout(name: str, shape: tuple[int, ...]) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu()
    expected = parse_codec(name).encode(t.numpy())
    last = t.contiguous(memory_format=torch.channels_last)
    for same_values in (t, last, last.numpy()):
        assert parse_codec(name).encode(same_values) == expected
    np.testing.assert_array_equal(decode(expected), decode_torch(expected).numpy())


@pytest.mark.parametrize("name", EVERY)
@given(x=arrays())
def test_decoded_tensor_is_float32_contiguous_writable_and_within_max_bytes(
    name: str, x: Array
) -> None:
    data = outcome(name, x)
    if isinstance(data, str):
        return
    assert len(data) <= parse_codec(name).max_bytes(x.shape)
    if "+" not in name:
        assert len(data) == parse_codec(name).max_bytes(x.shape)
    for carrier in (data, bytearray(data), memoryview(b"x" + data)[1:]):
        y = decode(carrier)
        assert (y.dtype, y.shape) == (np.dtype(np.float32), x.shape)
        assert y.flags.c_contiguous
        assert y.flags.writeable
        assert y.flags.owndata or y.base is not None
        t = decode_torch(carrier)
        assert (t.dtype, t.shape, t.is_contiguous()) == (torch.float32, x.shape, True)
        np.testing.assert_array_equal(t.numpy(), y)


def test_decoded_tensor_is_independent_of_the_buffer() -> None:
    for name in EVERY:
        data = bytearray(parse_codec(name).encode(np.ones((2, 3), np.float32)))
        y, t = decode(data), decode_torch(data)
        data[:] = bytes(len(data))
        assert (y == 1).all()
        assert (t == 1).all()


@pytest.mark.parametrize("name", ["fp32", "fp32+zstd"])
@given(x=hnp.arrays(np.uint32, hnp.array_shapes(max_dims=3, max_side=9)))
def test_fp32_carries_every_bit_pattern(name: str, x: npt.NDArray[np.uint32]) -> None:
    data = parse_codec(name).encode(x.view(np.float32))
    np.testing.assert_array_equal(decode(data).view(np.uint32), x)
    assert parse_codec(name).encode(torch.from_numpy(x.view(np.float32))) == data


@given(x=arrays())
def test_fp16_rounds_as_numpy_does(x: Array) -> None:
    with np.errstate(over="ignore"):
        expected = x.astype(np.float32).astype(np.float16).astype(np.float32)
    data = outcome("fp16", x)
    assert isinstance(data, str) == (not np.isfinite(expected).all())
    if isinstance(data, bytes):
        np.testing.assert_array_equal(decode(data), expected)


@given(x=arrays())
def test_bf16_rounds_as_torch_does(x: Array) -> None:
    expected = torch.from_numpy(x).float().to(torch.bfloat16).float()
    np.testing.assert_array_equal(decode(parse_codec("bf16").encode(x)), expected.numpy())


@pytest.mark.parametrize(("name", "largest"), [("fp16", 65504.0), ("bf16", 2.0**128 - 2.0**120)])
def test_values_that_would_round_to_infinity_are_refused(name: str, largest: float) -> None:
    codec = parse_codec(name)
    top = np.array([largest, -largest], np.float32)
    np.testing.assert_array_equal(decode(codec.encode(top)), top)
    half_a_step = {"fp16": 16.0, "bf16": 2.0**119}[name]
    beyond = np.array([0, -largest - half_a_step], np.float32)
    for x in (beyond, torch.from_numpy(beyond)):
        with pytest.raises(CodecError, match="not within"):
            codec.encode(x)


@given(
    x=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=7),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_int8_is_within_half_a_level_of_every_channel(x: npt.NDArray[np.float32]) -> None:
    y = decode(parse_codec("int8").encode(x)).astype(np.float64)
    middle = (1, 1, -1) if x.ndim == 1 else (x.shape[0], x.shape[1], -1)
    wide, got = x.astype(np.float64).reshape(middle), y.reshape(middle)
    low, high = wide.min((0, 2), keepdims=True), wide.max((0, 2), keepdims=True)
    rounding = 2.0**-22 * np.maximum(abs(low), abs(high)) + 1e-36
    assert (abs(got - wide) <= (high - low) / 255 * 0.501 + rounding).all()


@given(value=st.floats(-(2.0**127), 2.0**127, width=32), shape=hnp.array_shapes(max_dims=4))
def test_int8_constant_channels_are_exact(value: float, shape: tuple[int, ...]) -> None:
    x = np.full(shape, value, np.float32)
    np.testing.assert_array_equal(decode(parse_codec("int8").encode(x)), x)


def test_int8_scales_each_channel_on_its_own() -> None:
    x = np.zeros((2, 3, 4), np.float32)
    x[0, 1, 0], x[1, 2, 3] = 1e-3, 1e3
    y = decode(parse_codec("int8").encode(x))
    np.testing.assert_allclose(y, x, rtol=1e-6)


@pytest.mark.parametrize("name", ["fp16", "bf16", "int8", "int8+zstd"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_lossy_codecs_refuse_values_that_are_not_finite(name: str, poison: float) -> None:
    x = np.zeros((2, 3, 4, 4), np.float32)
    x[1, 2, 3, 0] = poison
    t = torch.from_numpy(x)
    last = t.contiguous(memory_format=torch.channels_last)
    for bad in (x, t, t.bfloat16(), last, x.astype(np.float64)):
        with pytest.raises(CodecError, match="not finite"):
            parse_codec(name).encode(bad)


def test_int8_refuses_a_range_that_overflows_float32() -> None:
    x = np.array([3e38, -3e38], np.float32)
    for bad in (x, torch.from_numpy(x)):
        with pytest.raises(CodecError, match="range is not finite"):
            parse_codec("int8").encode(bad)


def test_zstd_is_left_out_where_it_does_not_help() -> None:
    noise = np.random.default_rng(0).random((2, 3), np.float32)
    assert read_header(parse_codec("fp32+zstd").encode(noise)).lossless is Lossless.NONE
    zeros = parse_codec("fp32+zstd").encode(np.zeros(1000, np.float32))
    assert read_header(zeros).lossless is Lossless.ZSTD
    assert len(zeros) < 100


def test_zstd_level_is_used() -> None:
    x = np.random.default_rng(0).standard_normal((16, 8, 16, 16)).astype(np.float32).round(1)
    x = np.maximum(x, 0)
    fast, thorough = (parse_codec(f"int8+zstd:{level}").encode(x) for level in (1, 19))
    assert len(thorough) < len(fast)
    np.testing.assert_array_equal(decode(fast), decode(thorough))


@pytest.mark.parametrize(
    ("written", "canonical"),
    [("int8+zstd:1", "int8+zstd"), ("int8+zstd:01", "int8+zstd"), ("fp16+zstd:9", "fp16+zstd:9")],
)
def test_names_are_canonical_and_read_back(written: str, canonical: str) -> None:
    codec = parse_codec(written)
    assert codec.name == canonical
    assert parse_codec(canonical) == codec


@pytest.mark.parametrize(
    "name",
    ["", "int4", "INT8", "raw", "int8+lz4", "int8+zstd:", "int8+zstd:-1", "int8 ", "int8+zstd\n"],
)
def test_unknown_codec_names_the_known_ones(name: str) -> None:
    with pytest.raises(CodecError, match="fp32, fp16, bf16, int8"):
        parse_codec(name)


@pytest.mark.parametrize("level", [0, 20, 99])
def test_zstd_level_outside_its_range_is_refused(level: int) -> None:
    with pytest.raises(CodecError, match="1 to 19"):
        parse_codec(f"int8+zstd:{level}")


@pytest.mark.parametrize("name", EVERY)
def test_integers_are_refused_rather_than_rounded(name: str) -> None:
    for x in (np.arange(3), torch.arange(3), np.array([True])):
        with pytest.raises(CodecError, match="floating point"):
            parse_codec(name).encode(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_encoding_keeps_dtype_shape_and_bits(dtype: np.dtype[Any]) -> None:
    for shape in ((), (0,), (3,), (2, 3, 4)):
        size = int(np.prod(shape)) * dtype.itemsize
        x = np.arange(size, dtype=np.uint8).view(dtype).reshape(shape)
        for y in (decode(encode_exact(x)), decode_torch(encode_exact(x)).numpy()):
            assert (y.dtype, y.shape, y.tobytes()) == (dtype, shape, x.tobytes())
            assert y.flags.writeable


def test_exact_encoding_refuses_other_dtypes() -> None:
    for x in (np.array(["text"]), np.array([1j]), np.array([object()])):
        with pytest.raises(CodecError, match="convert it"):
            encode_exact(x)


def test_codec_is_shared_between_threads() -> None:
    codec = parse_codec("int8+zstd")
    inputs = [np.full((4, 4, 32, 32), i, np.float32).cumsum(axis=3) for i in range(1, 9)]
    expected = [codec.encode(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            data = codec.encode(inputs[index])
            if data != expected[index] or decode(data).shape != (4, 4, 32, 32):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong
