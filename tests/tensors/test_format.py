"""Hostile bytes: refused with a reason, before memory is taken."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tensors import FormatError, Limits, decode, parse_codec, read_header
from tensors.format import CodecId, Header, Lossless

FLOAT32 = np.dtype(np.float32)
SIX = np.arange(6, dtype=np.float32).reshape(2, 3)


def reason(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        decode(data, limits=limits or Limits())
    return caught.value.reason


def header(
    *shape: int,
    codec: int = 0,
    lossless: int = 0,
    dtype: int = 0,
    body: int = 0,
    version: int = 1,
) -> bytes:
    ndim = len(shape)
    return struct.pack(
        f"<3sBBBBB{ndim}IQ", b"SFT", version, codec, lossless, dtype, ndim, *shape, body
    )


def test_the_layout_is_the_documented_one() -> None:
    assert parse_codec("fp32").encode(SIX) == (
        bytes.fromhex("534654 01 00 00 00 02 02000000 03000000 1800000000000000")
        + SIX.astype("<f4").tobytes()
    )
    assert parse_codec("int8").encode(np.array([[1, 5], [3, 5]], np.float32)) == (
        bytes.fromhex("534654 01 03 00 00 02 02000000 02000000 0400000000000000")
        + np.array([1, 5], "<f4").tobytes()
        + np.array([2 / 255, 0], "<f4").tobytes()
        + bytes([0, 0, 255, 0])
    )


def test_header_tells_shape_and_dtype_without_decoding() -> None:
    read = read_header(parse_codec("int8").encode(SIX))
    assert read == Header(CodecId.INT8, Lossless.NONE, FLOAT32, (2, 3), 6)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8", "int8+zstd"])
def test_every_truncation_and_any_trailing_byte_are_refused(codec: str) -> None:
    data = parse_codec(codec).encode(np.zeros((4, 3, 20), np.float32))
    assert {reason(data[:cut]) for cut in range(len(data))} == {"truncated"}
    assert reason(data + b"\0") == "trailing_bytes"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"PK\3\4" + bytes(40), "bad_magic"),
        (header(1, version=2, body=4) + bytes(4), "unknown_version"),
        (header(1, codec=4, body=4) + bytes(4), "unknown_codec"),
        (header(1, lossless=2, body=4) + bytes(4), "unknown_lossless"),
        (header(1, dtype=200, body=4) + bytes(4), "unknown_dtype"),
        (header(1, dtype=3, codec=3, body=1) + bytes(9), "unknown_dtype"),
        (header(*[1] * 9, body=4) + bytes(4), "too_many_dims"),
        (header(2, body=4) + bytes(4), "bad_length"),
        (header(1, body=2**64 - 1) + bytes(4), "truncated"),
        (header(1, body=2**63) + bytes(4), "truncated"),
    ],
)
def test_hostile_header_is_refused_with_its_reason(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize(
    "shape",
    [(2**32 - 1,), (2**32 - 1,) * 8, (0, 2**32 - 1, 2**32 - 1, 2**32 - 1), (2**13, 2**13, 2)],
)
@pytest.mark.parametrize("codec", list(CodecId))
def test_huge_shape_is_refused_without_taking_memory(
    shape: tuple[int, ...], codec: CodecId
) -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(100))
    for lossless, body in ((0, b""), (1, frame)):
        data = header(*shape, codec=codec, lossless=lossless, body=len(body)) + body
        tracemalloc.start()
        try:
            assert reason(data) == "too_large"
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


def test_limits_bound_elements_bytes_and_dimensions() -> None:
    data = parse_codec("fp32").encode(SIX)
    assert decode(data, limits=Limits(6, 24, 2)).shape == (2, 3)
    assert reason(data, Limits(5, 24, 2)) == "too_large"
    assert reason(data, Limits(6, 23, 2)) == "too_large"
    assert reason(data, Limits(6, 24, 1)) == "too_many_dims"


def bomb(stated: int, *, declare: bool = True) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=declare)
    return compressor.compress(bytes(stated))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(bomb(50_000_000), id="zip_bomb"),
        pytest.param(bomb(3), id="too_short"),
        pytest.param(bomb(50_000_000, declare=False), id="size_not_declared"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x28\xb5\x2f\xfd", id="only_the_magic"),
        pytest.param(b"garbage garbage", id="not_zstd"),
        pytest.param(bomb(4) + b"x", id="bytes_after_the_frame"),
        pytest.param(bomb(4)[:-1], id="frame_cut_short"),
        pytest.param(bomb(4) + bomb(4), id="two_frames"),
        pytest.param(b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", id="skippable_frame"),
    ],
)
def test_hostile_zstd_frame_is_refused_without_taking_memory(frame: bytes) -> None:
    data = header(2, 2, codec=3, lossless=1, body=len(frame)) + bytes(16) + frame
    tracemalloc.start()
    try:
        assert reason(data) == "bad_body"
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("offset", "scale"),
    [
        (np.nan, 1.0),
        (np.inf, 1.0),
        (0.0, np.nan),
        (0.0, np.inf),
        (0.0, -1.0),
        (3e38, 1e37),
        (0.0, 3e38),
    ],
)
def test_offset_or_scale_that_decodes_to_nonsense_is_refused(offset: float, scale: float) -> None:
    side = np.array([0, offset, 1, scale], "<f4").tobytes()
    assert reason(header(1, 2, codec=3, body=2) + side + bytes(2)) == "bad_side_data"


@given(st.binary(max_size=200), st.sampled_from(["fp32+zstd", "fp16", "int8", "int8+zstd"]))
def test_arbitrary_damage_is_refused_or_decodes_within_limits(noise: bytes, codec: str) -> None:
    good = parse_codec(codec).encode(np.zeros((2, 3, 40), np.float32))
    at = len(noise) * 7 % len(good)
    damaged = good[:at] + noise + good[at + len(noise) :]
    with contextlib.suppress(FormatError):
        assert decode(damaged, limits=Limits(1000, 4000)).size <= 1000
