"""The byte format of one tensor, version 2, little endian throughout.

| bytes    | field                                                                        |
|----------|------------------------------------------------------------------------------|
| 3        | magic `SFT`                                                                  |
| 1        | version, 2                                                                   |
| 1        | codec: 0 exact, 1 fp16, 2 bf16, 3 affine                                     |
| 1        | lossless stage: 0 none, 1 zstd                                               |
| 1        | dtype of the decoded tensor, an index into `DTYPES`; 0 unless exact          |
| 1        | flags: 1 one map per channel, 2 masked; affine only, never both              |
| 1        | top: the highest level of an affine tensor, 1 … 255; else 0                  |
| 1        | ndim                                                                         |
| 4        | CRC-32 of every other byte, in order                                         |
| 4 × ndim | dims, u32                                                                    |
| 4        | values in the body, u32: the product of dims, or fewer if masked             |
| 4        | body length as it lies here, u32                                             |
| varies   | side data, affine only: f32 offset × maps, then f32 scale × maps             |
| varies   | body                                                                         |

An affine value is level · scale + offset, two float32 operations; there is one map (offset and
scale) for the tensor, or one for each index of dimension 1. The body holds the levels as
`bit_planes` packs them, of as many bits as `top` needs, channel by channel: dimension 1 (if there
is one) is the outermost, the others follow in C order. A masked tensor holds only the values that
the receiver, who knows which, does not take to be zero, in C order. Other bodies are the elements
in C order.

The body of a zstd tensor is one zstd frame that states its content size. It holds the affine body
as it is, and the byte planes of other elements: the first byte of every element, then the second,
and so on. Nothing follows the body.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tensors.bit_planes import packed_bytes
from tensors.errors import FormatError
from tensors.lossless import decompress

Buffer = bytes | bytearray | memoryview
"""What encoded tensors may arrive in."""


class LazyBytes(Protocol):
    """Bytes that are made when they are asked for; how many is known before."""

    def __len__(self) -> int: ...

    def __bytes__(self) -> bytes: ...


Encoded = Buffer | LazyBytes
"""An encoded tensor, or what stands for one inside a process (`tensors.by_reference`)."""

MAGIC = b"SFT"
VERSION = 2
MAX_NDIM = 8
MAX_VALUES = 2**32 - 1

DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(name) for name in ("f4", "f2", "f8", "i8", "i4", "i2", "i1", "u1")
)
"""dtypes by their number in the header."""

PER_CHANNEL = 1
MASKED = 2

_PREFIX = struct.Struct("<3sBBBBBBBI")
_CRC_AT = _PREFIX.size - 4


class CodecId(IntEnum):
    EXACT = 0
    FP16 = 1
    BF16 = 2
    AFFINE = 3


class Lossless(IntEnum):
    NONE = 0
    ZSTD = 1


_CODEC_IDS = frozenset(CodecId)
_LOSSLESS_IDS = frozenset(Lossless)


@dataclass(frozen=True)
class Limits:
    """What a decoder is willing to make from bytes it does not trust."""

    max_elements: int = 2**26
    """Elements of the decoded tensor (of all tensors together, for a parameter pack)."""
    max_bytes: int = 2**28
    """Bytes of memory the decoded tensor (all tensors of a pack) may take."""
    max_ndim: int = MAX_NDIM


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The fields of a header; one from `read_header` has been checked against its data."""

    codec: CodecId
    shape: tuple[int, ...]
    values: int
    """Values in the body: all elements, or those that a mask keeps."""
    body_bytes: int
    """Length of the body as it lies in the data."""
    lossless: Lossless = Lossless.NONE
    dtype: np.dtype[Any] = DTYPES[0]
    """Of the decoded tensor."""
    top: int = 0
    """Highest level of an affine tensor."""
    per_channel: bool = False
    masked: bool = False

    @property
    def size(self) -> int:
        """Bytes of the header itself."""
        return header_bytes(len(self.shape))

    @property
    def maps(self) -> int:
        """How many pairs of offset and scale the side data holds."""
        if self.codec is not CodecId.AFFINE:
            return 0
        return channels(self.shape) if self.per_channel else 1

    @property
    def bits(self) -> int:
        """Bits of a level."""
        return self.top.bit_length()

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of a body that is not affine."""
        return self.dtype.itemsize if self.codec is CodecId.EXACT else 2

    @property
    def raw_bytes(self) -> int:
        """Bytes of the body before the lossless stage."""
        if self.codec is CodecId.AFFINE:
            return packed_bytes(self.values, self.bits)
        return self.values * self.element_bytes

    def pack(self, *rest: Buffer) -> bytes:
        """The encoded tensor: this header, then `rest`, its side data and body."""
        ndim = len(self.shape)
        prefix = _PREFIX.pack(
            MAGIC,
            VERSION,
            self.codec,
            self.lossless,
            DTYPES.index(self.dtype),
            self.per_channel * PER_CHANNEL | self.masked * MASKED,
            self.top,
            ndim,
            0,
        )[:_CRC_AT]
        sizes = struct.pack(f"<{ndim}III", *self.shape, self.values, self.body_bytes)
        checksum = 0
        for part in (prefix, sizes, *rest):
            checksum = zlib.crc32(part, checksum)
        return b"".join((prefix, struct.pack("<I", checksum), sizes, *rest))


def channels(shape: tuple[int, ...]) -> int:
    """Channels of a tensor: the length of dimension 1, or 1 for a 0-d or 1-d tensor."""
    return shape[1] if len(shape) >= 2 else 1


def header_bytes(ndim: int) -> int:
    """Bytes of the header of an `ndim`-dimensional tensor."""
    return _PREFIX.size + 4 * ndim + 8


def read_header(data: Encoded, *, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Read and check the header of an encoded tensor, which must fill `data` exactly.

    Takes no memory for the tensor. Raises FormatError with reason `truncated`, `trailing_bytes`,
    `bad_magic`, `unknown_version`, `unknown_codec`, `unknown_lossless`, `unknown_dtype`,
    `bad_flags`, `bad_top`, `too_many_dims`, `too_large`, `bad_count`, `bad_length` or
    `bad_checksum`.
    """
    if not isinstance(data, Buffer):
        return _read_lazy_header(data, limits)
    _require(data, _PREFIX.size)
    magic, version, codec_id, lossless_id, dtype_id, flags, top, ndim, crc = _PREFIX.unpack_from(
        data
    )
    if magic != MAGIC:
        raise FormatError("bad_magic", f"not a tensor: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FormatError(
            "unknown_version",
            f"tensor format version {version}, this side reads {VERSION}: upgrade the older side",
        )
    if codec_id not in _CODEC_IDS:
        raise FormatError("unknown_codec", f"unknown codec id {codec_id}: upgrade this side")
    if lossless_id not in _LOSSLESS_IDS:
        raise FormatError("unknown_lossless", f"unknown lossless id {lossless_id}")
    codec = CodecId(codec_id)
    if dtype_id >= len(DTYPES) or (codec is not CodecId.EXACT and dtype_id != 0):
        raise FormatError("unknown_dtype", f"dtype id {dtype_id} is not one of {codec.name}'s")
    if flags not in (0, PER_CHANNEL, MASKED) or (flags and codec is not CodecId.AFFINE):
        raise FormatError("bad_flags", f"flags {flags} do not go with codec {codec.name}")
    if (top == 0) is (codec is CodecId.AFFINE):
        raise FormatError("bad_top", f"highest level {top} does not go with codec {codec.name}")
    if ndim > min(MAX_NDIM, limits.max_ndim):
        raise _too_many_dims(ndim, limits)
    _require(data, header_bytes(ndim))
    *dims, values, body_bytes = struct.unpack_from(f"<{ndim}III", data, _PREFIX.size)
    header = Header(
        codec=codec,
        shape=tuple(dims),
        values=values,
        body_bytes=body_bytes,
        lossless=Lossless(lossless_id),
        dtype=DTYPES[dtype_id],
        top=top,
        per_channel=flags == PER_CHANNEL,
        masked=flags == MASKED,
    )
    _check_sizes(header, len(data), limits)
    view = memoryview(data)
    if zlib.crc32(view[_PREFIX.size :], zlib.crc32(view[:_CRC_AT])) != crc:
        raise FormatError("bad_checksum", "the tensor's checksum does not match its bytes")
    return header


def in_bytes(data: Encoded) -> Buffer:
    """The bytes themselves."""
    return data if isinstance(data, Buffer) else bytes(data)


def read_body(data: Buffer, header: Header) -> npt.NDArray[np.uint8]:
    """The body's bytes before the lossless stage, shape (raw_bytes,), read-only.

    The elements' byte planes are put together again. Raises FormatError `bad_body`.
    """
    body = memoryview(data)[len(data) - header.body_bytes :]
    if header.lossless is Lossless.NONE:
        return np.frombuffer(body, np.uint8)
    raw = decompress(body, header.raw_bytes)
    if header.codec is CodecId.AFFINE or header.element_bytes == 1:
        return raw
    return np.ascontiguousarray(raw.reshape(header.element_bytes, -1).T).ravel()


def _read_lazy_header(data: LazyBytes, limits: Limits) -> Header:
    from tensors.by_reference import TensorReference

    if not isinstance(data, TensorReference):
        return read_header(bytes(data), limits=limits)
    header = data.header
    if len(header.shape) > limits.max_ndim:
        raise _too_many_dims(len(header.shape), limits)
    _check_sizes(header, len(data), limits)
    return header


def _check_sizes(header: Header, length: int, limits: Limits) -> None:
    shape = header.shape
    holds = math.prod(shape)
    # Zeros count as ones: numpy refuses (0, 2**32 - 1, 2**32 - 1, ...) although it holds nothing.
    elements = holds or math.prod(dim or 1 for dim in shape)
    if elements > limits.max_elements:
        raise FormatError(
            "too_large", f"shape {shape}: {elements} elements, at most {limits.max_elements} taken"
        )
    if elements * header.dtype.itemsize > limits.max_bytes:
        raise FormatError(
            "too_large",
            f"shape {shape}: {elements * header.dtype.itemsize} bytes, "
            f"at most {limits.max_bytes} taken",
        )
    if header.values > holds or (header.values < holds and not header.masked):
        raise FormatError("bad_count", f"{header.values} values for shape {shape}")
    expected = header.size + 8 * header.maps + header.body_bytes
    if length < expected:
        raise _truncated(length, expected)
    if length > expected:
        raise FormatError("trailing_bytes", f"{length - expected} bytes after the tensor")
    if header.lossless is Lossless.ZSTD and not header.raw_bytes:
        raise FormatError("bad_length", f"a lossless stage for shape {shape}, which needs none")
    if header.lossless is Lossless.NONE and header.body_bytes != header.raw_bytes:
        raise FormatError(
            "bad_length",
            f"a body of {header.body_bytes} bytes for shape {shape}: {header.raw_bytes} due",
        )


def _require(data: Buffer, need: int) -> None:
    if len(data) < need:
        raise _truncated(len(data), need)


def _too_many_dims(ndim: int, limits: Limits) -> FormatError:
    return FormatError("too_many_dims", f"{ndim} dimensions, at most {limits.max_ndim} taken")


def _truncated(have: int, need: int) -> FormatError:
    return FormatError("truncated", f"tensor cut short: {have} bytes of {need}")
