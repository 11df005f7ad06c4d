"""Values to the elements codecs send, and back, in numpy.

`quantize_torch` has the twins for torch tensors; the bytes are the same, which a property test
holds them to. That is why every step is one plainly rounded float32 operation in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tensors.errors import CodecError
from tensors.format import channels

Float32s = npt.NDArray[np.float32]

# From these on, rounding to nearest gives infinity.
FP16_BOUND = 65520.0
BF16_BOUND = 2.0**128 - 2.0**119

_LEVELS = np.float32(255)
_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal


@dataclass(frozen=True, slots=True)
class Affine:
    """Per-channel map between values and levels 0 … 255: value = level · scale + offset."""

    offset: Float32s
    """(channels,) the channel's minimum, never a negative zero."""
    scale: Float32s
    """(channels,) distance of two levels; 0 for a constant channel."""

    def inverse(self) -> Float32s:
        """(channels,) levels per unit of value, 0 for a constant channel."""
        zeros = np.zeros_like(self.scale)
        return np.divide(np.float32(1), self.scale, out=zeros, where=self.scale > 0)

    def is_valid(self) -> bool:
        """Whether every level of every channel stands for a finite value."""
        with np.errstate(over="ignore", invalid="ignore"):
            top = self.scale * _LEVELS + self.offset
        return bool(np.isfinite(top).all() and (self.scale >= 0).all())


def affine_from_range(low: Float32s, high: Float32s) -> Affine:
    """The min-max map of channels with these minima and maxima, both (channels,) float32.

    A channel narrower than 255 times the smallest normal float32 counts as constant.
    Raises CodecError for a range that is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (high - low) / _LEVELS
    scale[scale < _SMALLEST_NORMAL] = 0
    # Adding zero makes -0.0 to 0.0: which of the two a minimum returns is up to the library.
    affine = Affine(low + np.float32(0), scale)
    if not affine.is_valid():
        raise CodecError(
            "int8: the tensor or a channel's range is not finite: look for divergence (loss NaN?)"
        )
    return affine


def by_channel(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape (outer, channels, inner) that brings the channels of any tensor to the middle."""
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    return shape[0], channels(shape), math.prod(shape[2:])


def to_float32(x: npt.NDArray[Any]) -> Float32s:
    """C-contiguous float32; a float64 beyond float32's range becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, np.float32).reshape(x.shape)


def to_fp16(x: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    values = to_float32(x)
    _check_bound(values, "fp16", FP16_BOUND)
    return values.astype(np.float16)


def to_bf16(x: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even."""
    values = to_float32(x)
    _check_bound(values, "bf16", BF16_BOUND)
    bits = values.view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Float32s:
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def to_int8(x: npt.NDArray[Any]) -> tuple[Affine, npt.NDArray[np.uint8]]:
    """Affine 8 bit levels per channel (dimension 1) between the channel's minimum and maximum."""
    values = to_float32(x).reshape(by_channel(x.shape))
    if not values.size:
        zeros = np.zeros(values.shape[1], np.float32)
        return Affine(zeros, zeros), np.empty(x.shape, np.uint8)
    affine = affine_from_range(values.min(axis=(0, 2)), values.max(axis=(0, 2)))
    scaled = values - affine.offset[:, None]
    scaled *= affine.inverse()[:, None]
    scaled += np.float32(0.5)
    return affine, scaled.astype(np.uint8).reshape(x.shape)


def from_int8(levels: npt.NDArray[np.uint8], affine: Affine) -> Float32s:
    values = levels.reshape(by_channel(levels.shape)).astype(np.float32)
    values *= affine.scale[:, None]
    values += affine.offset[:, None]
    return values.reshape(levels.shape)


def check_bound(low: float, high: float, codec: str, bound: float) -> None:
    """Raise CodecError unless both lie strictly within ±bound; NaN does not."""
    if not (-bound < low and high < bound):
        raise CodecError(
            f"{codec}: the tensor holds values that are not finite or not within ±{bound:g}: "
            "look for divergence (loss NaN?), or choose fp32"
        )


def _check_bound(values: Float32s, codec: str, bound: float) -> None:
    if values.size:
        check_bound(float(values.min()), float(values.max()), codec, bound)
