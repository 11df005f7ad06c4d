"""The header, and hostile bytes: refused with a reason, before memory is taken."""

from __future__ import annotations

import contextlib
import re
import struct
import tracemalloc
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import tensors.format
from tensors import FormatError, Limits, decode, decode_torch, encode_exact, parse_codec
from tensors.bit_planes import pack
from tensors.decoding import nonzero
from tensors.format import CodecId, Header, Lossless, header_bytes, read_header

FLOAT32 = np.dtype(np.float32)
SIX = np.arange(6, dtype=np.float32).reshape(2, 3)
SIDE = np.array([0, 1], "<f4").tobytes()
EXACT, FP16, BF16, AFFINE = range(4)
HUGE = [
    (2**32 - 1,),
    (2**32 - 1,) * 8,
    (0, 2**32 - 1, 2**32 - 1),
    (1, 2**32 - 1),
    (2**13, 2**13, 2),
]


def reason(data: bytes, limits: Limits | None = None) -> str:
    """Of the refusal, the same whatever reads the bytes."""
    reasons = set()
    for read in (decode, decode_torch, nonzero):
        with pytest.raises(FormatError) as caught:
            read(data, limits=limits or Limits())
        reasons.add(caught.value.reason)
    assert len(reasons) == 1, reasons
    return reasons.pop()


def tensor(
    *shape: int,
    codec: int = AFFINE,
    lossless: int = 0,
    dtype: int = 0,
    flags: int = 0,
    top: int | None = None,
    values: int | None = None,
    rest: bytes = b"",
    body: int | None = None,
    magic: bytes = b"SFT",
    version: int = 2,
    ndim: int | None = None,
) -> bytes:
    """Any header with a good checksum, before `rest`; `body` and more are as stated or as fit."""
    side = 8 * (codec == AFFINE)
    top = 15 * (codec == AFFINE) if top is None else top
    count = int(np.prod(shape)) if values is None else values
    kinds = (version, codec, lossless, dtype, flags, top, len(shape) if ndim is None else ndim)
    prefix = magic + bytes(kinds)
    sizes = struct.pack(
        f"<{len(shape)}III", *shape, count, max(0, len(rest) - side) if body is None else body
    )
    crc = zlib.crc32(prefix + sizes + rest)
    return prefix + struct.pack("<I", crc) + sizes + rest


@contextlib.contextmanager
def memory_below(most: int) -> Iterator[None]:
    """What is allocated inside, at its peak."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def fixed(data: bytes) -> bytes:
    """The same with the right checksum."""
    return data[:10] + struct.pack("<I", zlib.crc32(data[14:], zlib.crc32(data[:10]))) + data[14:]


def test_the_layout_is_the_documented_one() -> None:
    data = parse_codec("fp32").encode(SIX)
    assert data == fixed(
        bytes.fromhex("534654 02 00 00 00 00 00 02 00000000 02000000 03000000 06000000 18000000")
        + SIX.astype("<f4").tobytes()
    )
    masked = parse_codec("levels6+zstd").encode(SIX, keep=SIX > 1)
    assert masked == fixed(
        bytes.fromhex("534654 02 03 00 00 02 05 02 00000000 02000000 03000000 04000000 02000000")
        + np.array([0, 1], "<f4").tobytes()
        + bytes([0b01_00_11_10, 0b1100])
    )
    channels = parse_codec("int8+channel").encode(np.array([[1, 5], [3, 5]], np.float32))
    assert channels == fixed(
        bytes.fromhex("534654 02 03 00 00 01 ff 02 00000000 02000000 02000000 04000000 04000000")
        + np.array([1, 5, 2 / 255, 0], "<f4").tobytes()
        + bytes([0, 255, 0, 0])
    )
    zeros = parse_codec("fp16+zstd").encode(np.zeros(1000))
    assert zeros[:10] == bytes.fromhex("534654 02 01 01 00 00 00 01")
    assert encode_exact(np.ones(1, np.int64))[:10] == bytes.fromhex("534654 02 00 00 03 00 00 01")


def test_a_body_of_levels_lies_channel_by_channel_unless_masked() -> None:
    x = np.arange(0, 256, 15).reshape(3, 2, 3).astype(np.float32)
    keep = np.ones(x.shape, np.bool_)
    moved = x.astype(np.uint8).transpose(1, 0, 2)
    assert parse_codec("int8").encode(x)[-18:] == moved.tobytes()
    assert parse_codec("int8").encode(x, keep=keep)[-18:] == x.astype(np.uint8).tobytes()


def test_header_tells_what_the_data_holds_without_decoding() -> None:
    read = read_header(parse_codec("int4").encode(SIX))
    assert read == Header(codec=CodecId.AFFINE, shape=(2, 3), values=6, body_bytes=3, top=15)
    assert (read.size, read.maps, read.bits, read.raw_bytes) == (30, 1, 4, 3)
    read = read_header(parse_codec("levels9+channel+zstd").encode(np.zeros((50, 3, 99))))
    assert (read.maps, read.top, read.bits) == (3, 8, 4)
    assert (read.per_channel, read.masked, read.lossless) == (True, False, Lossless.ZSTD)
    assert read.raw_bytes == 50 * 3 * 99 // 2
    assert read.body_bytes < 100
    read = read_header(encode_exact(np.zeros((2, 5), np.int16)))
    assert (read.dtype, read.maps, read.element_bytes, read.raw_bytes) == (np.int16, 0, 2, 20)


def test_helper_makes_what_the_codec_makes() -> None:
    made = tensor(2, 3, rest=SIDE + b"\x30\x41\x52")  # channel by channel
    assert decode(made).tolist() == SIX.tolist()
    assert parse_codec("int4+zstd").encode(decode(made)) != made  # its range ends at 5


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int3", "int8+channel", "int4+zstd"])
def test_every_truncation_and_any_trailing_byte_are_refused(codec: str) -> None:
    data = parse_codec(codec).encode(np.zeros((4, 3, 20), np.float32))
    assert {reason(data[:cut]) for cut in range(len(data))} == {"truncated"}
    assert reason(data + b"\0") == "trailing_bytes"


@pytest.mark.parametrize("codec", ["fp32", "bf16+zstd", "int3", "int5+channel", "int4+zstd"])
def test_every_flipped_bit_is_noticed(codec: str) -> None:
    x = np.arange(60, dtype=np.float32).reshape(4, 3, 5) % 7
    data = parse_codec(codec).encode(x)
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(FormatError):
            decode(flipped)
    flipped = bytearray(data)
    flipped[-1] ^= 1
    assert reason(bytes(flipped)) == "bad_checksum"
    assert reason(data[:10] + bytes(4) + data[14:]) == "bad_checksum"


NINE = [1] * 9
REJECTED = [
    (b"", "truncated"),
    (b"PK\3\4" + bytes(40), "bad_magic"),
    (tensor(1, magic=b"SFU", rest=SIDE + b"\0"), "bad_magic"),
    (tensor(1, version=1, rest=SIDE + b"\0"), "unknown_version"),
    (tensor(1, version=3, rest=SIDE + b"\0"), "unknown_version"),
    (tensor(1, codec=4, rest=bytes(4)), "unknown_codec"),
    (tensor(1, lossless=2, rest=SIDE + b"\0"), "unknown_lossless"),
    (tensor(1, codec=EXACT, dtype=8, rest=bytes(4)), "unknown_dtype"),
    (tensor(1, codec=BF16, dtype=1, rest=bytes(2)), "unknown_dtype"),
    (tensor(1, dtype=7, rest=SIDE + b"\0"), "unknown_dtype"),
    (tensor(1, flags=3, rest=SIDE + b"\0"), "bad_flags"),
    (tensor(1, flags=4, rest=SIDE + b"\0"), "bad_flags"),
    (tensor(1, flags=128, rest=SIDE + b"\0"), "bad_flags"),
    (tensor(1, codec=EXACT, flags=2, rest=bytes(4)), "bad_flags"),
    (tensor(1, codec=FP16, flags=1, rest=bytes(2)), "bad_flags"),
    (tensor(1, top=0, rest=SIDE + b"\0"), "bad_top"),
    (tensor(1, codec=EXACT, top=255, rest=bytes(4)), "bad_top"),
    (tensor(1, codec=FP16, top=1, rest=bytes(2)), "bad_top"),
    (tensor(*NINE, rest=SIDE + b"\0"), "too_many_dims"),
    (tensor(1, ndim=255, rest=SIDE + b"\0"), "too_many_dims"),
    (tensor(2, values=1, rest=SIDE + b"\0"), "bad_count"),
    (tensor(2, values=3, rest=SIDE + b"\0\0"), "bad_count"),
    (tensor(2, values=3, flags=2, rest=SIDE + b"\0\0"), "bad_count"),
    (tensor(2, values=2**32 - 1, flags=2, rest=SIDE + b"\0\0"), "bad_count"),
    (tensor(0, 7, values=1, rest=SIDE + b"\0"), "bad_count"),
    (tensor(2, codec=EXACT, values=1, rest=bytes(4)), "bad_count"),
    (tensor(3, rest=SIDE + b"\0"), "bad_length"),
    (tensor(2, rest=SIDE + b"\0\0"), "bad_length"),
    (tensor(2, codec=EXACT, rest=bytes(4)), "bad_length"),
    (tensor(1, body=2**32 - 1, rest=SIDE + b"\0"), "truncated"),
    (tensor(1, body=2**31, rest=SIDE + b"\0"), "truncated"),
    (tensor(1, body=0, rest=SIDE + b"\0"), "trailing_bytes"),
    (tensor(1, 2**26, flags=1, rest=SIDE + b"\0"), "truncated"),
    (tensor(2, 3, flags=1, body=3, rest=SIDE + b"\0" * 3), "truncated"),
    (tensor(2, 3, flags=1, body=3, rest=SIDE * 4 + b"\0" * 3), "trailing_bytes"),
    (tensor(1, rest=SIDE + b"\0")[:-1] + b"\1", "bad_checksum"),
]


@pytest.mark.parametrize(("data", "expected"), REJECTED)
def test_hostile_header_is_refused_with_its_reason(data: bytes, expected: str) -> None:
    with memory_below(100_000):
        assert reason(data) == expected


def test_every_documented_reason_is_tested() -> None:
    documented = set(re.findall(r"`(\w+)`", tensors.format.read_header.__doc__ or ""))
    tested = {expected for _, expected in REJECTED} | {"too_large"}
    assert documented - {"data"} == tested


@pytest.mark.parametrize("shape", HUGE)
@pytest.mark.parametrize("codec", list(CodecId))
@pytest.mark.parametrize("flags", [0, 1, 2])
def test_huge_shape_is_refused_without_taking_memory(
    shape: tuple[int, ...], codec: CodecId, flags: int
) -> None:
    if flags and codec is not CodecId.AFFINE:
        return
    frame = zstandard.ZstdCompressor().compress(bytes(100))
    for lossless, body in ((0, b""), (1, frame)):
        data = tensor(
            *shape, codec=codec, lossless=lossless, flags=flags, values=2**32 - 1, rest=SIDE + body
        )
        with memory_below(100_000):
            assert reason(data) == "too_large"


def test_limits_bound_elements_bytes_and_dimensions() -> None:
    for data in (parse_codec("fp32").encode(SIX), parse_codec("int2").encode(SIX)):
        assert decode(data, limits=Limits(6, 24, 2)).shape == (2, 3)
        assert reason(data, Limits(5, 24, 2)) == "too_large"
        assert reason(data, Limits(6, 23, 2)) == "too_large"
        assert reason(data, Limits(6, 24, 1)) == "too_many_dims"
    assert decode(encode_exact(np.zeros((1,) * 8))).shape == (1,) * 8


def test_nothing_is_refused_for_a_shape_without_elements() -> None:
    for shape in ((0,), (3, 0), (0, 3), (2, 0, 5)):
        for flags in (0, 1, 2):
            maps = shape[1] if flags == 1 and len(shape) > 1 else 1
            data = tensor(*shape, flags=flags, rest=SIDE * maps, body=0)
            keep = np.zeros(shape, np.bool_)
            assert decode(data, keep=keep).shape == shape
            assert tuple(decode_torch(data, keep=keep).shape) == shape


def bomb(stated: int, *, declare: bool = True) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=declare)
    return compressor.compress(bytes(stated))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(bomb(50_000_000), id="zip_bomb"),
        pytest.param(bomb(1), id="too_short"),
        pytest.param(bomb(50_000_000, declare=False), id="size_not_declared"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x28\xb5\x2f\xfd", id="only_the_magic"),
        pytest.param(b"garbage garbage", id="not_zstd"),
        pytest.param(bomb(2) + b"x", id="bytes_after_the_frame"),
        pytest.param(bomb(2)[:-1], id="frame_cut_short"),
        pytest.param(bomb(2) + bomb(2), id="two_frames"),
        pytest.param(b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", id="skippable_frame"),
        pytest.param(bomb(300)[:5] + b"\x02\x00" + bomb(300)[7:], id="states_less_than_it_holds"),
    ],
)
def test_hostile_zstd_frame_is_refused_without_taking_memory(frame: bytes) -> None:
    for data in (
        tensor(2, 2, lossless=1, rest=SIDE + frame),
        tensor(1, codec=FP16, lossless=1, rest=frame),
        tensor(2, codec=EXACT, dtype=6, lossless=1, rest=frame),
    ):
        with memory_below(100_000):
            assert reason(data) == "bad_body"


def test_a_bomb_behind_few_masked_values_is_refused() -> None:
    data = tensor(2**20, flags=2, values=2, lossless=1, rest=SIDE + bomb(2**19))
    keep = np.zeros(2**20, np.bool_)
    keep[:2] = True
    with memory_below(100_000), pytest.raises(FormatError, match="states 524288") as caught:
        decode(data, keep=keep)
    assert caught.value.reason == "bad_body"


@pytest.mark.parametrize(
    ("offset", "scale"),
    [
        (np.nan, 1.0),
        (np.inf, 1.0),
        (-np.inf, 1.0),
        (0.0, np.nan),
        (0.0, np.inf),
        (0.0, -1.0),
        (0.0, -1e-45),
        (3.4e38, 1e36),
        (0.0, 3e38),
        (-3e38, 3e38),
    ],
)
def test_offset_or_scale_that_decodes_to_nonsense_is_refused(offset: float, scale: float) -> None:
    side = np.array([offset, scale], "<f4").tobytes()
    assert reason(tensor(1, rest=side + b"\0")) == "bad_side_data"
    assert reason(tensor(2**24, lossless=1, rest=side + bomb(2**23))) == "bad_side_data"
    channels = np.array([0, offset, 1, scale], "<f4").tobytes()
    assert reason(tensor(1, 2, flags=1, body=1, rest=channels + b"\0")) == "bad_side_data"


@pytest.mark.parametrize("top", [2, 4, 5, 6, 8, 14, 16, 100, 254])
def test_a_level_above_the_highest_is_refused(top: int) -> None:
    for level in (top, top + 1):
        levels = np.array([0, level, 1], np.uint8)
        body = pack(levels, top.bit_length()).tobytes()
        data = tensor(3, top=top, rest=SIDE + body)
        if level == top:
            assert decode(data).tolist() == [0, top, 1]
        else:
            assert reason(data) == "bad_body"


@given(st.binary(max_size=200), st.sampled_from(["fp32+zstd", "fp16", "int8", "int3+zstd"]))
def test_damage_behind_a_good_checksum_is_refused_or_decodes_within_limits(
    noise: bytes, codec: str
) -> None:
    good = parse_codec(codec).encode(np.zeros((2, 3, 40), np.float32))
    at = len(noise) * 7 % len(good)
    damaged = good[:at] + noise + good[at + len(noise) :]
    with contextlib.suppress(FormatError):
        assert decode(fixed(damaged.ljust(14, b"\0")), limits=Limits(1000, 4000)).size <= 1000


def test_header_bytes_is_what_a_header_takes() -> None:
    for ndim in range(9):
        data = encode_exact(np.zeros((0,) * ndim))
        assert len(data) == header_bytes(ndim) + 8 * (ndim == 0)
