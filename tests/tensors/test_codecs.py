from __future__ import annotations

import math
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
from tensors.codecs import Codec
from tensors.format import DTYPES, CodecId, Lossless
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

EVERY = [
    *("fp32", "fp16", "bf16", "fp32+zstd", "fp16+zstd", "bf16+zstd"),
    *("int8", "int8+zstd", "int5", "int4+channel", "int3+stochastic", "levels9+channel+zstd"),
]
LOSSY = [name for name in EVERY if not name.startswith("fp32")]


def agree(name: str, x: Array, seed: int = 0) -> None:
    """Array and tensors of equal values have the same outcome, whatever layout they have."""
    expected = outcome(name, x, seed=seed)
    for y in layouts(x):
        assert outcome(name, y, seed=seed) == expected
    for t in torch_layouts(torch.from_numpy(x)):
        assert outcome(name, t, seed=seed) == expected
        with on_gpu_path():
            assert outcome(name, t, seed=seed) == expected


@given(name=codecs, x=arrays(), seed=st.integers(0, 2**40))
def test_array_and_tensor_of_any_layout_give_the_same_bytes(name: str, x: Array, seed: int) -> None:
    agree(name, x, seed)


@given(name=codecs, x=arrays(finite=False, min_side=1))
def test_array_and_tensor_are_refused_alike(name: str, x: Array) -> None:
    if not name.startswith("fp32") or np.isfinite(x).all():
        agree(name, x)


@given(name=codecs, x=arrays())
def test_bfloat16_tensors_encode_as_their_float32_values(name: str, x: Array) -> None:
    t = torch.from_numpy(x).to(torch.bfloat16)
    expected = outcome(name, t.float().numpy())
    for same in torch_layouts(t):
        assert outcome(name, same) == expected


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(32, 16, 28, 28), (32, 64, 32, 32), (1, 16, 32, 32)])
def test_real_sizes_agree_in_every_layout(name: str, shape: tuple[int, ...]) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu()
    last = t.contiguous(memory_format=torch.channels_last)
    expected = parse_codec(name).encode(t.numpy(), seed=5)
    for same in (t, last, last.numpy()):
        assert parse_codec(name).encode(same, seed=5) == expected
    with on_gpu_path():
        assert parse_codec(name).encode(last, seed=5) == expected
    decoded = decode(expected)
    assert decode_torch(expected).numpy().tobytes() == decoded.tobytes()
    moved = decode_torch(expected, channels_last=True)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(moved.numpy(), decoded)


@given(name=codecs, x=arrays())
def test_what_comes_back(name: str, x: Array) -> None:
    """float32, contiguous, writable, the same from every reader, no longer than announced."""
    data = outcome(name, x)
    if isinstance(data, str):
        assert x.size
        return
    codec = parse_codec(name)
    assert len(data) <= codec.max_bytes(x.shape)
    if codec.zstd_level is None:
        assert len(data) == codec.max_bytes(x.shape) == codec.estimate_bytes(x)
    for carrier in (data, bytearray(data), memoryview(b"x" + data)[1:]):
        y = decode(carrier)
        assert (y.dtype, y.shape) == (np.dtype(np.float32), x.shape)
        assert y.flags.c_contiguous
        assert y.flags.writeable
        t = decode_torch(carrier)
        assert (t.dtype, t.shape, t.is_contiguous()) == (torch.float32, x.shape, True)
        assert t.numpy().tobytes() == y.tobytes()
        last = decode_torch(carrier, channels_last=True)
        assert (last.dtype, last.shape) == (torch.float32, x.shape)
        assert last.contiguous().numpy().tobytes() == y.tobytes()
        assert last.dim() == 4 or last.is_contiguous()
        if last.dim() == 4 and x.size:
            assert last.is_contiguous(memory_format=torch.channels_last)


@given(name=affine_codecs(), x=arrays(), seed=st.integers(0, 2**40))
def test_what_levels_decode_to(name: str, x: Array, seed: int) -> None:
    """Few values, finite, within the range they came from; and near them without clipping."""
    data = outcome(name, x, seed=seed)
    if isinstance(data, str):
        assert "not finite" in data
        assert float(x.max()) - float(x.min()) > 3.4e38
        return
    y = decode(data)
    codec = parse_codec(name)
    assert np.isfinite(y).all()
    assert codec.per_channel or np.unique(y).size <= (codec.levels or 0)
    if x.size:
        half = (float(x.max()) - float(x.min())) / (read_header(data).top * 2)
        slack = 1.001 * half + 1e-6 * float(np.abs(x).max()) + 2.0**-118
        assert y.min() >= float(x.min()) - slack
        assert y.max() <= float(x.max()) + slack
        if "stochastic" not in name and ("zstd" in name or codec.levels == 256):
            assert (np.abs(y.astype(np.float64) - x) <= slack).all()


def test_decoded_tensor_is_independent_of_the_buffer() -> None:
    for name in EVERY:
        data = bytearray(parse_codec(name).encode(np.ones((2, 3, 1, 1), np.float32)))
        y, t, last = decode(data), decode_torch(data), decode_torch(data, channels_last=True)
        data[:] = bytes(len(data))
        assert (y == 1).all()
        assert (t == 1).all()
        assert (last == 1).all()


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
        assert decode(data).tobytes() == expected.tobytes()


@given(x=arrays())
def test_bf16_rounds_as_torch_does(x: Array) -> None:
    expected = torch.from_numpy(x).float().to(torch.bfloat16).float()
    assert decode(parse_codec("bf16").encode(x)).tobytes() == expected.numpy().tobytes()


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


@given(value=st.floats(-(2.0**127), 2.0**127, width=32), shape=hnp.array_shapes(max_dims=4))
def test_a_constant_tensor_is_exact(value: float, shape: tuple[int, ...]) -> None:
    x = np.full(shape, value, np.float32)
    for name in ("int2", "int8+zstd", "levels3+channel", "int4+stochastic"):
        np.testing.assert_array_equal(decode(parse_codec(name).encode(x)), x)


def test_each_channel_has_a_range_of_its_own() -> None:
    x = np.zeros((2, 3, 4), np.float32)
    x[0, 1, 0], x[1, 2, 3] = 1e-3, 1e3
    y = decode(parse_codec("int8+channel").encode(x))
    np.testing.assert_allclose(y, x, rtol=1e-6)
    assert not decode(parse_codec("int8").encode(x))[0].any()
    for shape in ((), (7,)):
        few = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        assert read_header(parse_codec("int4+channel").encode(few)).maps == 1


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_lossy_codecs_refuse_values_that_are_not_finite(name: str, poison: float) -> None:
    x = np.zeros((2, 3, 4, 4), np.float32)
    x[1, 2, 3, 0] = poison
    t = torch.from_numpy(x)
    last = t.contiguous(memory_format=torch.channels_last)
    for bad in (x, t, t.bfloat16(), last, x.astype(np.float64)):
        with pytest.raises(CodecError, match=f"^{name.split('+', maxsplit=1)[0]}.*not finite"):
            parse_codec(name).encode(bad)


def test_a_range_that_overflows_float32_is_refused() -> None:
    x = np.array([3e38, -3e38], np.float32)
    for name in ("int8", "int3", "int4+channel", "int2+zstd"):
        for bad in (x, torch.from_numpy(x), np.array([1e300, 0]), np.array([-1e39])):
            with pytest.raises(CodecError, match="range is not finite"):
                parse_codec(name).encode(bad)


def test_without_zstd_the_range_is_clipped_and_with_zstd_it_is_not() -> None:
    x = np.random.default_rng(1).standard_t(3, (64, 8, 16)).astype(np.float32)

    def extent(name: str) -> float:
        return float(np.ptp(decode(parse_codec(name).encode(x))))

    for name in ("int2", "int4", "levels5", "int3+channel"):
        assert extent(name) < 0.7 * np.ptp(x)
        assert extent(f"{name}+zstd") == pytest.approx(np.ptp(x), rel=0.15)
    assert extent("int8") == pytest.approx(np.ptp(x), rel=0.01)


def test_zstd_is_left_out_where_it_does_not_help() -> None:
    noise = np.random.default_rng(0).random((2, 3), np.float32)
    for name in ("fp32+zstd", "int4+zstd"):
        assert read_header(parse_codec(name).encode(noise)).lossless is Lossless.NONE
        zeros = parse_codec(name).encode(np.zeros(1000, np.float32))
        assert read_header(zeros).lossless is Lossless.ZSTD
        assert len(zeros) < 100


def test_zstd_level_is_used() -> None:
    x = np.random.default_rng(0).standard_normal((16, 8, 16, 16)).astype(np.float32).round(1)
    x = np.maximum(x, 0)
    fast, thorough = (parse_codec(f"int8+zstd:{level}").encode(x) for level in (1, 19))
    assert len(thorough) < len(fast)
    np.testing.assert_array_equal(decode(fast), decode(thorough))


@pytest.mark.parametrize("name", ["int2+zstd", "int4+zstd", "int8+zstd", "int4+channel+zstd"])
def test_estimate_is_near_the_size(name: str) -> None:
    rng = np.random.default_rng(9)
    codec = parse_codec(name)
    for x in (
        np.maximum(rng.standard_normal((64, 8, 16, 16)) - 1, 0),
        rng.standard_normal((64, 8, 16, 16)),
        rng.laplace(size=(8, 4)),
        np.zeros((4, 5)),
        np.zeros((0, 5)),
    ):
        size, estimate = len(codec.encode(x)), codec.estimate_bytes(x)
        assert estimate == codec.estimate_bytes(torch.from_numpy(x))
        assert estimate <= codec.max_bytes(x.shape)
        assert 0.6 * size - 30 <= estimate <= 1.2 * size + 30
    keep = rng.random((64, 8, 16, 16)) < 0.3
    if not codec.per_channel:
        x = rng.standard_normal(keep.shape)
        size, estimate = len(codec.encode(x, keep=keep)), codec.estimate_bytes(x, keep=keep)
        assert 0.6 * size <= estimate <= 1.2 * size


def test_chance_follows_the_seed_and_only_where_asked_for() -> None:
    x = np.random.default_rng(3).standard_normal((8, 4, 5)).astype(np.float32)
    chance, plain = parse_codec("int3+stochastic"), parse_codec("int3")
    assert chance.encode(x, seed=1) == chance.encode(x, seed=1)
    assert chance.encode(x, seed=1) != chance.encode(x, seed=2)
    assert plain.encode(x, seed=1) == plain.encode(x, seed=2) != chance.encode(x)


@given(name=affine_codecs())
def test_canonical_names_read_back(name: str) -> None:
    codec = parse_codec(name)
    assert parse_codec(codec.name) == codec
    assert parse_codec(codec.name).name == codec.name
    assert codec.with_levels(codec.levels or 0) == codec
    other = codec.with_levels(3)
    assert other.name == codec.name.replace(codec.name.split("+")[0], "levels3")
    assert other.with_levels(256).name == codec.name.replace(codec.name.split("+")[0], "int8")


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("int8+zstd:1", "int8+zstd"),
        ("int8+zstd:01", "int8+zstd"),
        ("fp16+zstd:9", "fp16+zstd:9"),
        ("levels4", "int2"),
        ("levels256+channel", "int8+channel"),
        ("levels012", "levels12"),
        ("int6+channel+stochastic+zstd:19", "int6+channel+stochastic+zstd:19"),
    ],
)
def test_names_are_canonical(written: str, canonical: str) -> None:
    assert parse_codec(written).name == canonical
    assert parse_codec(canonical) == parse_codec(written)


def test_parts_of_a_codec() -> None:
    codec = parse_codec("levels12+channel+stochastic+zstd:7")
    assert codec == Codec(CodecId.AFFINE, 12, True, True, 7)
    bits = [parse_codec(name).bits for name in ("fp32", "fp16", "bf16", "levels3", "levels255")]
    assert bits == [32, 16, 16, 2, 8]
    assert [parse_codec(f"int{bits}").levels for bits in range(2, 9)] == [
        *(4, 8, 16, 32, 64, 128, 256)
    ]
    assert parse_codec("fp16").levels is None


@pytest.mark.parametrize(
    "name",
    [
        *("", "int", "int1", "int9", "int44", "INT8", "raw", "levels", "levels1000", "fp32int8"),
        *("int4levels9", "int8+lz4", "int8+zstd:", "int8+zstd:-1", "int8 ", "int8+zstd\n"),
        *("+zstd", "int8+zstd+channel", "int8+stochastic+channel", "int8+channel+channel"),
        *("int8+zstd:111", "levels٣"),
    ],
)
def test_unknown_codec_names_the_known_ones(name: str) -> None:
    with pytest.raises(CodecError, match="fp32, fp16, bf16, int2 … int8 or levels3 … levels256"):
        parse_codec(name)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("int8+zstd:0", "1 to 19"),
        ("fp32+zstd:20", "1 to 19"),
        ("levels2", "3 to 256 levels"),
        ("levels0", "3 to 256 levels"),
        ("levels257+zstd", "3 to 256 levels"),
        ("fp16+channel", "go with int2 … int8"),
        ("bf16+stochastic+zstd", "go with int2 … int8"),
    ],
)
def test_what_is_known_but_out_of_range_is_refused(name: str, what: str) -> None:
    with pytest.raises(CodecError, match=what):
        parse_codec(name)


@pytest.mark.parametrize("name", EVERY)
def test_integers_are_refused_rather_than_rounded(name: str) -> None:
    for x in (np.arange(3), torch.arange(3), np.array([True]), np.array([1j])):
        with pytest.raises(CodecError, match="floating point"):
            parse_codec(name).encode(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_encoding_keeps_dtype_shape_and_bits(dtype: np.dtype[Any]) -> None:
    for shape in ((), (0,), (3,), (2, 3, 4), (1, 2, 3, 4)):
        size = int(np.prod(shape)) * dtype.itemsize
        x = np.arange(size, dtype=np.uint8).view(dtype).reshape(shape)
        for y in (
            decode(encode_exact(x)),
            decode_torch(encode_exact(x)).numpy(),
            decode_torch(encode_exact(x), channels_last=True).numpy(),
            decode(encode_exact(np.asfortranarray(x).reshape(shape))),
        ):
            assert (y.dtype, y.shape, y.tobytes()) == (dtype, shape, x.tobytes())
            assert y.flags.writeable


def test_exact_encoding_refuses_other_dtypes() -> None:
    for x in (np.array(["text"]), np.array([1j]), np.array([object()]), np.array([True])):
        with pytest.raises(CodecError, match="convert it"):
            encode_exact(x)


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4+channel+zstd"])
def test_what_is_no_array_is_refused(name: str) -> None:
    codec = parse_codec(name)
    for x in (np.float32(1), 1.0, [1.0, 2.0], None):
        for use in (codec.encode, codec.sketch):
            with pytest.raises(CodecError, match=f"not {type(x).__name__}: make it an array"):
                use(x)  # type: ignore[arg-type]


def test_codec_is_shared_between_threads() -> None:
    codec = parse_codec("int8+channel+stochastic+zstd")
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
