"""The byte format of one tensor, little endian throughout.

| bytes    | field                                                               |
|----------|---------------------------------------------------------------------|
| 3        | magic `SFT`                                                         |
| 1        | version, 1                                                          |
| 1        | codec: 0 exact, 1 fp16, 2 bf16, 3 int8                              |
| 1        | lossless stage: 0 none, 1 zstd                                      |
| 1        | dtype of the decoded tensor, an index into `DTYPES`                 |
| 1        | ndim                                                                |
| 4 × ndim | dims, u32                                                           |
| 8        | body length as it lies here, u64                                    |
| varies   | side data: int8 has f32 offset × channels, then f32 scale × channels |
| varies   | body: the elements in C order                                       |

The body of a zstd tensor is one zstd frame that states its content size. It holds the elements'
byte planes: the first byte of every element, then the second of every element, and so on (for
one-byte elements that is the plain body). Nothing follows the body. There is no checksum: the
transport's chunks carry one.
"""

from __future__ import annotations

import math
import struct
import threading
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from tensors.errors import FormatError

Buffer = bytes | bytearray | memoryview
"""What encoded tensors may arrive in."""

MAGIC = b"SFT"
VERSION = 1

DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(name) for name in ("f4", "f2", "f8", "i8", "i4", "i2", "i1", "u1")
)
"""dtypes by their number in the header."""

_PREFIX = struct.Struct("<3sBBBBB")
_U64 = struct.Struct("<Q")


class CodecId(IntEnum):
    EXACT = 0
    FP16 = 1
    BF16 = 2
    INT8 = 3

    def element_bytes(self, dtype: np.dtype[Any]) -> int:
        """Bytes of one element in the body before the lossless stage."""
        match self:
            case CodecId.EXACT:
                return dtype.itemsize
            case CodecId.FP16 | CodecId.BF16:
                return 2
            case CodecId.INT8:
                return 1

    def side_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of side data between header and body."""
        return 8 * channels(shape) if self is CodecId.INT8 else 0


class Lossless(IntEnum):
    NONE = 0
    ZSTD = 1


@dataclass(frozen=True)
class Limits:
    """What a decoder is willing to make from bytes it does not trust."""

    max_elements: int = 2**26
    """Elements of the decoded tensor (of all tensors together, for a parameter pack)."""
    max_bytes: int = 2**28
    """Bytes of memory the decoded tensor (all tensors of a pack) may take."""
    max_ndim: int = 8


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Header:
    """A header that has been checked against the data it stands in and the receiver's limits."""

    codec: CodecId
    lossless: Lossless
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    body_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the header itself."""
        return header_bytes(len(self.shape))

    @property
    def raw_bytes(self) -> int:
        """Bytes of the body before the lossless stage."""
        return math.prod(self.shape) * self.codec.element_bytes(self.dtype)

    def pack(self) -> bytes:
        ndim = len(self.shape)
        return struct.pack(
            f"<3sBBBBB{ndim}IQ",
            MAGIC,
            VERSION,
            self.codec,
            self.lossless,
            DTYPES.index(self.dtype),
            ndim,
            *self.shape,
            self.body_bytes,
        )


def channels(shape: tuple[int, ...]) -> int:
    """Channels of a tensor: the length of dimension 1, or 1 for a 0-d or 1-d tensor."""
    return shape[1] if len(shape) >= 2 else 1


def header_bytes(ndim: int) -> int:
    """Bytes of the header of an `ndim`-dimensional tensor."""
    return _PREFIX.size + 4 * ndim + _U64.size


def read_header(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Read and check the header of an encoded tensor, which must fill `data` exactly.

    Takes no memory for the tensor. Raises FormatError with reason `truncated`, `trailing_bytes`,
    `bad_magic`, `unknown_version`, `unknown_codec`, `unknown_lossless`, `unknown_dtype`,
    `too_many_dims`, `too_large` or `bad_length`.
    """
    if len(data) < _PREFIX.size:
        raise _truncated(len(data), _PREFIX.size)
    magic, version, codec_id, lossless_id, dtype_id, ndim = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise FormatError("bad_magic", f"not a tensor: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FormatError(
            "unknown_version",
            f"tensor format version {version}, this side reads {VERSION}: upgrade the older side",
        )
    if codec_id not in CodecId.__members__.values():
        raise FormatError("unknown_codec", f"unknown codec id {codec_id}: upgrade this side")
    if lossless_id not in Lossless.__members__.values():
        raise FormatError("unknown_lossless", f"unknown lossless id {lossless_id}")
    codec = CodecId(codec_id)
    if dtype_id >= len(DTYPES) or (codec is not CodecId.EXACT and dtype_id != 0):
        raise FormatError("unknown_dtype", f"dtype id {dtype_id} is not one of {codec.name}'s")
    dtype = DTYPES[dtype_id]
    if ndim > limits.max_ndim:
        raise FormatError("too_many_dims", f"{ndim} dimensions, at most {limits.max_ndim} taken")
    if len(data) < header_bytes(ndim):
        raise _truncated(len(data), header_bytes(ndim))
    *dims, body_bytes = struct.unpack_from(f"<{ndim}IQ", data, _PREFIX.size)
    shape = tuple(dims)
    _check_size(shape, dtype, limits)
    header = Header(codec, Lossless(lossless_id), dtype, shape, body_bytes)
    expected = header.size + codec.side_bytes(shape) + body_bytes
    if len(data) < expected:
        raise _truncated(len(data), expected)
    if len(data) > expected:
        raise FormatError("trailing_bytes", f"{len(data) - expected} bytes after the tensor")
    if header.lossless is Lossless.NONE and body_bytes != header.raw_bytes:
        raise FormatError(
            "bad_length", f"a body of {body_bytes} bytes for shape {shape}: {header.raw_bytes} due"
        )
    return header


def read_body(data: Buffer, header: Header) -> npt.NDArray[np.uint8]:
    """The elements' bytes in C order, shape (raw_bytes,), read-only; FormatError `bad_body`."""
    body = memoryview(data)[len(data) - header.body_bytes :]
    if header.lossless is Lossless.NONE:
        return np.frombuffer(body, np.uint8)
    try:
        # The frame's own claim sizes the buffer, so it is checked before anything is allocated.
        stated = zstandard.get_frame_parameters(body).content_size
        if stated != header.raw_bytes:
            raise FormatError(
                "bad_body", f"zstd frame states {stated} bytes, the shape needs {header.raw_bytes}"
            )
        raw = _decompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError("bad_body", f"corrupt zstd frame: {error}") from error
    if len(raw) != header.raw_bytes:
        raise FormatError("bad_body", f"zstd frame held {len(raw)} of {header.raw_bytes} bytes")
    planes = np.frombuffer(raw, np.uint8)
    width = header.codec.element_bytes(header.dtype)
    return planes if width == 1 else np.ascontiguousarray(planes.reshape(width, -1).T).ravel()


def compress(body: npt.NDArray[Any], level: int) -> bytes:
    """One zstd frame of the byte planes of a C-contiguous array."""
    planes = body.reshape(-1).view(np.uint8)
    if body.itemsize > 1:
        planes = np.ascontiguousarray(planes.reshape(-1, body.itemsize).T)
    return _compressor(level).compress(planes.data)


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], limits: Limits) -> None:
    # Zeros count as ones: numpy refuses (0, 2**32 - 1, 2**32 - 1, ...) although it holds nothing.
    elements = math.prod(max(dim, 1) for dim in shape)
    if elements > limits.max_elements:
        raise FormatError(
            "too_large", f"shape {shape}: {elements} elements, at most {limits.max_elements} taken"
        )
    if elements * dtype.itemsize > limits.max_bytes:
        raise FormatError(
            "too_large",
            f"shape {shape}: {elements * dtype.itemsize} bytes, at most {limits.max_bytes} taken",
        )


def _truncated(have: int, need: int) -> FormatError:
    return FormatError("truncated", f"tensor cut short: {have} bytes of {need}")


# zstandard's objects cost more to make than a small tensor to compress, and are not thread-safe.
_per_thread = threading.local()


def _compressor(level: int) -> zstandard.ZstdCompressor:
    known: dict[int, zstandard.ZstdCompressor] = _per_thread.__dict__.setdefault("compressors", {})
    if level not in known:
        known[level] = zstandard.ZstdCompressor(level=level)
    return known[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    if "decompressor" not in _per_thread.__dict__:
        _per_thread.decompressor = zstandard.ZstdDecompressor()
    known: zstandard.ZstdDecompressor = _per_thread.decompressor
    return known
