"""Values as floats of 32 or 16 bits, in numpy; `floats_torch` has the twins for torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tensors.errors import CodecError

# From these on, rounding to nearest gives infinity.
FP16_BOUND = 65520.0
BF16_BOUND = 2.0**128 - 2.0**119


def to_float32(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """C-contiguous float32; a float64 beyond float32's range becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, np.float32).reshape(x.shape)


def to_fp16(x: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """The nearest float16, ties to even. Raises CodecError beyond its range."""
    values = to_float32(x)
    _check_bound(values, "fp16", FP16_BOUND)
    return values.astype(np.float16)


def to_bf16(x: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even. Raises CodecError beyond its range."""
    values = to_float32(x)
    _check_bound(values, "bf16", BF16_BOUND)
    bits = values.view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """float32 of the same values."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def check_bound(low: float, high: float, codec: str, bound: float) -> None:
    """Raise CodecError unless both lie strictly within ±bound; NaN does not."""
    if not (-bound < low and high < bound):
        raise CodecError(
            f"{codec}: the tensor holds values that are not finite or not within ±{bound:g}: "
            "look for divergence (loss NaN?), or choose fp32"
        )


def _check_bound(values: npt.NDArray[np.float32], codec: str, bound: float) -> None:
    if values.size:
        check_bound(float(values.min()), float(values.max()), codec, bound)
