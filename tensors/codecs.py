"""Codecs: tensors to bytes and back.

| codec | bytes a value | carries                                                              |
|-------|---------------|----------------------------------------------------------------------|
| fp32  | 4             | every float32, NaN and infinities too, bit for bit                   |
| fp16  | 2             | finite values within ±65504, rounded to nearest even                 |
| bf16  | 2             | finite values, rounded to nearest even                               |
| int8  | 1             | finite values, 256 levels between each channel's minimum and maximum |

int8's channels are dimension 1 (a 0-d or 1-d tensor is one channel); the error is at most half a
level, and a constant channel is exact. `+zstd` or `+zstd:LEVEL` (1 … 19, default 1) adds a lossless
stage, which is left out where it would not make the tensor smaller.

A numpy array and a torch tensor of equal values encode to equal bytes, whatever the strides.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tensors import quantize
from tensors.errors import CodecError, FormatError
from tensors.format import (
    DEFAULT_LIMITS,
    DTYPES,
    Buffer,
    CodecId,
    Header,
    Limits,
    Lossless,
    channels,
    compress,
    header_bytes,
    read_body,
    read_header,
)

if TYPE_CHECKING:
    import torch

CODECS = {
    "fp32": CodecId.EXACT,
    "fp16": CodecId.FP16,
    "bf16": CodecId.BF16,
    "int8": CodecId.INT8,
}
"""Codecs by the name a user writes before any `+zstd`."""

DEFAULT_ZSTD_LEVEL = 1
MAX_ZSTD_LEVEL = 19

_FLOAT32 = np.dtype(np.float32)
_NAME = re.compile(r"(?P<base>[a-z0-9]+)(?P<zstd>\+zstd(:(?P<level>[0-9]{1,2}))?)?")


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to encode tensors; made by `parse_codec`, safe to share between threads."""

    name: str
    """Canonical name, which `parse_codec` reads back."""
    kind: CodecId
    zstd_level: int | None
    """None without the lossless stage."""

    def encode(self, x: npt.NDArray[Any] | torch.Tensor) -> bytes:
        """Encode floating point values of any shape, strides and device.

        Raises CodecError for another dtype and for values the codec cannot carry.
        """
        side, body = self._quantize(x)
        return _assemble(self.kind, _FLOAT32, side, body, self.zstd_level)

    def max_bytes(self, shape: tuple[int, ...]) -> int:
        """The most bytes `encode` returns for a tensor of this shape."""
        body = math.prod(shape) * self.kind.element_bytes(_FLOAT32)
        return header_bytes(len(shape)) + self.kind.side_bytes(shape) + body

    def _quantize(self, x: npt.NDArray[Any] | torch.Tensor) -> tuple[bytes, npt.NDArray[Any]]:
        back_end: Any
        if isinstance(x, np.ndarray):
            is_float, back_end = x.dtype.kind == "f" and x.dtype.itemsize <= 8, quantize
        else:
            from tensors import quantize_torch

            is_float, back_end = x.is_floating_point(), quantize_torch
        if not is_float:
            raise CodecError(f"{self.name} takes floating point values, not {x.dtype}: convert it")
        match self.kind:
            case CodecId.EXACT:
                return b"", back_end.to_float32(x)
            case CodecId.FP16:
                return b"", back_end.to_fp16(x)
            case CodecId.BF16:
                return b"", back_end.to_bf16(x)
            case CodecId.INT8:
                affine, levels = back_end.to_int8(x)
                return np.concatenate([affine.offset, affine.scale], dtype="<f4").tobytes(), levels


def parse_codec(name: str) -> Codec:
    """The codec of that name: `fp32`, `fp16`, `bf16` or `int8`, then `+zstd` or `+zstd:LEVEL`."""
    match = _NAME.fullmatch(name)
    if match is None or match["base"] not in CODECS:
        raise CodecError(
            f"unknown codec {name!r}: write one of {', '.join(CODECS)}, "
            "with +zstd or +zstd:LEVEL after it if wanted"
        )
    base = match["base"]
    if not match["zstd"]:
        return Codec(base, CODECS[base], None)
    level = int(match["level"] or DEFAULT_ZSTD_LEVEL)
    if not 1 <= level <= MAX_ZSTD_LEVEL:
        raise CodecError(f"codec {name!r}: the zstd level must be 1 to {MAX_ZSTD_LEVEL}")
    suffix = "+zstd" if level == DEFAULT_ZSTD_LEVEL else f"+zstd:{level}"
    return Codec(base + suffix, CODECS[base], level)


def encode_exact(x: npt.NDArray[Any]) -> bytes:
    """Encode an array of any dtype in `format.DTYPES` so that `decode` gives it back unchanged."""
    if x.dtype not in DTYPES:
        known = ", ".join(dtype.name for dtype in DTYPES)
        raise CodecError(f"cannot send dtype {x.dtype}: convert it to one of {known}")
    return _assemble(CodecId.EXACT, x.dtype, b"", np.ascontiguousarray(x).reshape(x.shape), None)


def decode(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> npt.NDArray[Any]:
    """The tensor in `data`: C-contiguous, writable, independent of `data`.

    float32 from a codec of `parse_codec`; of its own dtype from `encode_exact`, so check the dtype
    and shape of what a stranger sent. Raises FormatError, before memory is taken, for bytes that
    are not a tensor or exceed `limits`; reasons as in `read_header`, `bad_body`, `bad_side_data`.
    """
    header, body = _open(data, limits)
    if header.codec is CodecId.INT8:
        return quantize.from_int8(body, _read_affine(data, header))
    return _decode_plain(header, body)


def decode_torch(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> torch.Tensor:
    """`decode` to a contiguous CPU tensor of the same values."""
    import torch

    header, body = _open(data, limits)
    if header.codec is CodecId.INT8:
        from tensors import quantize_torch

        return quantize_torch.from_int8(body, _read_affine(data, header))
    return torch.from_numpy(_decode_plain(header, body))


def _assemble(
    kind: CodecId,
    dtype: np.dtype[Any],
    side: bytes,
    body: npt.NDArray[Any],
    zstd_level: int | None,
) -> bytes:
    shape = body.shape
    little = body.astype(body.dtype.newbyteorder("<"), copy=False)
    if zstd_level is not None:
        frame = compress(little, zstd_level)
        if len(frame) < body.nbytes:
            header = Header(kind, Lossless.ZSTD, dtype, shape, len(frame))
            return b"".join((header.pack(), side, frame))
    header = Header(kind, Lossless.NONE, dtype, shape, body.nbytes)
    return b"".join((header.pack(), side, little.reshape(-1).view(np.uint8).data))


def _open(data: Buffer, limits: Limits) -> tuple[Header, npt.NDArray[np.uint8]]:
    header = read_header(data, limits=limits)
    body = read_body(data, header)
    return header, body.reshape(header.shape) if header.codec is CodecId.INT8 else body


def _read_affine(data: Buffer, header: Header) -> quantize.Affine:
    count = channels(header.shape)
    side = np.frombuffer(data, "<f4", 2 * count, header.size).astype(np.float32)
    affine = quantize.Affine(side[:count], side[count:])
    if not affine.is_valid():
        raise FormatError("bad_side_data", "int8: a channel's offset or scale is not finite")
    return affine


def _decode_plain(header: Header, body: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    match header.codec:
        case CodecId.FP16:
            values = body.view("<f2").astype(np.float32)
        case CodecId.BF16:
            values = quantize.from_bf16(body.view("<u2").astype(np.uint16, copy=False))
        case _:
            values = body.view(header.dtype.newbyteorder("<")).astype(header.dtype)
    return values.reshape(header.shape)
