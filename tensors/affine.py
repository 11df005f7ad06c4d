"""Affine quantization: values to levels 0 … top and back.

`affine_torch` brings torch tensors here, and quantizes what lies on a GPU there; the levels are the
same, which a property test holds them to. That is why every step is one plainly rounded float32
operation in a fixed order.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tensors.errors import CodecError
from tensors.format import channels

Float32s = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SAMPLE = 8192
"""Values that a range or a size is chosen by."""
HALF = np.float32(0.5)

_BLOCK_VALUES = 2**19
_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
_LARGE = 1e38
"""Sums of a few values up to this are finite in float32."""
_per_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Affine:
    """Maps between values and levels, one for a tensor or one a channel.

    value = level · scale + offset; level = ⌊(value − offset) · (1/scale) + ½⌋ within 0 … top.
    """

    offset: Float32s
    """(maps,) the value of level 0, never a negative zero."""
    scale: Float32s
    """(maps,) distance of two levels; 0 where all levels stand for one value."""
    top: int
    """The highest level."""
    clips: bool
    """Whether values may lie beyond the levels."""

    def inverse(self) -> Float32s:
        """(maps,) levels per unit of value, 0 for a constant."""
        if len(self.scale) == 1 and self.scale[0]:
            return np.float32(1) / self.scale
        zeros = np.zeros_like(self.scale)
        return np.divide(np.float32(1), self.scale, out=zeros, where=self.scale > 0)

    def is_valid(self) -> bool:
        """Whether every level stands for a finite value."""
        if len(self.scale) == 1:
            offset, scale = self.offset.item(), self.scale.item()
            if abs(offset) < _LARGE and 0 < scale * self.top < _LARGE:
                return True
        with np.errstate(over="ignore", invalid="ignore"):
            highest = self.scale * np.float32(self.top) + self.offset
        return bool(np.isfinite(highest).all() and not np.signbit(self.scale).any())


def by_channel(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape (outer, channels, inner) that brings the channels of any tensor to the middle."""
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    return shape[0], channels(shape), math.prod(shape[2:])


def fit(low: Float32s, high: Float32s, top: int) -> Affine:
    """The map of ranges `low` … `high`, both (maps,), whose ends are the first and last level.

    Where a range holds zero it is moved by half a level at most, so that a level stands for exactly
    zero, and one below it for what is below zero, however little. A range narrower than `top` times
    the smallest normal float32 counts as constant: zero if it holds that, else its minimum.
    Raises CodecError for a range that is not finite.
    """
    if len(low) == 1:
        simple = _fit_simple(low[0], high[0], top)
        if simple is not None:
            return simple
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (high - low) / np.float32(top)
    scale[scale < _SMALLEST_NORMAL] = 0
    holds_zero = (low <= 0) & (high >= 0)
    # Else a GELU's few small negative values would vanish, and be taken for a ReLU's zeros.
    barely_below = (low < 0) & (-low < scale * HALF) & np.isfinite(scale) & (top > 1)
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.where(barely_below, high / np.float32(max(1, top - 1)), scale)
        zero_level = np.floor(
            np.divide(-low, scale, out=np.zeros_like(scale), where=scale > 0) + HALF
        )
        zero_level = np.where(barely_below, np.float32(1), zero_level)
        # Adding zero makes -0.0 to 0.0: which of the two a minimum returns is up to the library.
        offset = np.where(holds_zero, -(zero_level * scale), low) + np.float32(0)
    affine = Affine(offset, scale, top, clips=bool((zero_level[holds_zero] > 0).any()))
    if not (np.isfinite(low).all() and np.isfinite(high).all() and affine.is_valid()):
        raise CodecError(
            "the tensor or its range is not finite: look for divergence (loss NaN?), or choose fp32"
        )
    return affine


def _fit_simple(low: np.float32, high: np.float32, top: int) -> Affine | None:
    """`fit` of one range as most are, in a fraction of the time; None for any other."""
    if not -_LARGE < low <= 0 <= high < _LARGE:
        return None
    scale = (high - low) / np.float32(top)
    if scale < _SMALLEST_NORMAL or (low < 0 and -low < scale * HALF):
        return None
    zero_level = np.float32(math.floor(-low / scale + HALF))
    offset = np.float32(0) - zero_level * scale
    inverse = np.float32(1) / scale
    lowest, highest = (low - offset) * inverse + HALF, (high - offset) * inverse + HALF
    clips = not (lowest > -1 and highest < top + 1)
    return Affine(np.array([offset]), np.array([scale]), top, clips=clips)


class Values:
    """float32 values as (outer, channels, inner), where the last two may lie in the other order.

    Everything here gives the same result for both orders.
    """

    def __init__(
        self, memory: npt.NDArray[Any], shape: tuple[int, ...], *, channels_last: bool = False
    ) -> None:
        self._memory = memory
        """C-contiguous, (outer, channels, inner) or (outer, inner, channels), for `_float32s`."""
        self._shape = shape
        self._channels_last = channels_last

    @property
    def size(self) -> int:
        """How many there are."""
        return self._memory.size

    def range(self, *, per_channel: bool) -> tuple[Float32s, Float32s]:
        """Minima and maxima, both (maps,); 0 where there is nothing."""
        count = channels(self._shape) if per_channel else 1
        if not self._memory.size:
            return np.zeros(count, np.float32), np.zeros(count, np.float32)
        if not per_channel:
            return self._ends()
        memory = self._float32s(self._memory)
        if not self._channels_last:
            return memory.min((0, 2)), memory.max((0, 2))
        rows = _wide_rows(memory)
        low, high = rows.min(0).reshape(-1, count), rows.max(0).reshape(-1, count)
        return low.min(0), high.max(0)

    def sample(self, *, per_channel: bool) -> Float32s:
        """(maps, n) evenly spread values, about `SAMPLE` in all."""
        logical = self._memory.transpose(0, 2, 1) if self._channels_last else self._memory
        outer, inner = sample_steps(logical.shape)
        taken = self._float32s(logical[::outer, :, ::inner])
        if not per_channel:
            return taken.reshape(1, -1)
        return taken.transpose(1, 0, 2).reshape(taken.shape[1], taken.shape[0] * taken.shape[2])

    def quantize(self, affine: Affine, seed: int | None, *, channel_major: bool) -> Bytes:
        """(size,) levels, channel by channel or in C order; with a seed rounded by chance."""
        memory = self._memory
        levels: Bytes = np.empty(memory.shape, np.uint8)
        offset, inverse = self._per_map(affine.offset), self._per_map(affine.inverse())
        moved = np.count_nonzero(affine.offset)
        table = None if seed is None else dither_of(memory.shape, channels_last=self._channels_last)
        # A few samples at a time, so that the scratch memory stays small.
        step = max(1, _BLOCK_VALUES // max(1, memory[:1].size))
        for start in range(0, len(memory) if memory.size else 0, step):
            block = memory[start : start + step]
            scaled = _scratch(block.shape)
            values = self._float32s(block, scaled)
            if moved:
                with np.errstate(over="ignore"):  # infinity is clipped as well
                    values = np.subtract(values, offset, out=scaled)
            np.multiply(values, inverse, out=scaled)
            if table is None:
                scaled += HALF
            else:
                for index in range(len(scaled)):
                    scaled[index] += dither_of_sample(table, start + index, seed or 0)
            if affine.clips or table is not None:
                np.clip(scaled, 0, np.float32(affine.top), out=scaled)
            np.copyto(levels[start : start + step], scaled, casting="unsafe")
        return self._in_order(levels, channel_major=channel_major)

    def _ends(self) -> tuple[Float32s, Float32s]:
        """Minimum and maximum of all, both (1,)."""
        flat = self._memory.reshape(-1)
        return flat.min(keepdims=True), flat.max(keepdims=True)

    def _float32s(
        self,
        memory: npt.NDArray[Any],
        out: Float32s | None = None,  # noqa: ARG002
    ) -> Float32s:
        """float32 values of a part of the memory: itself, or a copy, in `out` if given."""
        return memory

    def _per_map(self, values: Float32s) -> Any:
        if len(values) == 1:
            return values[0]
        if not self._channels_last:
            return values[:, None]
        return np.broadcast_to(values, self._memory.shape[1:])

    def _in_order(self, levels: Bytes, *, channel_major: bool) -> Bytes:
        """(size,) levels, which lie as the memory does, in the order that is wanted."""
        if channel_major:
            levels = levels.transpose(1, 0, 2)
        return np.ascontiguousarray(levels).reshape(-1)


def values_of(x: npt.NDArray[Any]) -> Values:
    """The values of an array, as float32."""
    with np.errstate(over="ignore"):
        memory = np.ascontiguousarray(x, np.float32).reshape(by_channel(x.shape))
    return Values(memory, x.shape)


def sample_steps(shape: tuple[int, ...]) -> tuple[int, int]:
    """The strides over outer and inner that leave about `SAMPLE` values."""
    outer, _, inner = shape
    wanted = max(1, math.prod(shape) // SAMPLE)
    over_outer = max(1, min(outer, math.isqrt(wanted)))
    # Odd, so that it does not meet the same columns of a picture in every row.
    return over_outer, max(1, min(inner, wanted // over_outer)) | 1


def sample_of(keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(n,) what `Values.sample` takes of a mask, in the same order."""
    by = by_channel(keep.shape)
    outer, inner = sample_steps(by)
    return keep.reshape(by)[::outer, :, ::inner].reshape(-1)


def in_c_order(levels: Bytes, shape: tuple[int, ...], *, channel_major: bool) -> Bytes:
    """(size,) levels as (outer, channels, inner); a view."""
    outer, count, inner = by_channel(shape)
    if channel_major:
        return levels.reshape(count, outer, inner).transpose(1, 0, 2)
    return levels.reshape(outer, count, inner)


def dequantize(levels: Bytes, affine: Affine) -> Float32s:
    """float32 values of levels, (outer, channels, inner)."""
    return to_values(levels.astype(np.float32, order="C"), affine)


def to_values(levels: Float32s, affine: Affine, *, channels_last: bool = False) -> Float32s:
    """Values in place of levels, (outer, channels, inner) or (outer, inner, channels)."""

    def per_map(values: Float32s) -> Any:
        if len(values) == 1:
            return values[0]
        return values if channels_last else values[:, None]

    levels *= per_map(affine.scale)
    if np.count_nonzero(affine.offset):
        levels += per_map(affine.offset)
    return levels


def entropy_bits(levels: Bytes) -> float:
    """Empirical entropy of the levels, bits a value."""
    counts = np.bincount(levels.reshape(-1), minlength=1)
    shares = counts[counts > 0] / max(1, levels.size)
    return float(-(shares * np.log2(shares)).sum())


@dataclass(frozen=True, slots=True)
class Sketch:
    """A tensor's shape, range and a sample: enough to estimate its size with any top."""

    shape: tuple[int, ...]
    values: int
    """How many entries are sent."""
    low: Float32s
    """(maps,)"""
    high: Float32s
    sample: Float32s
    """(maps, n) of the entries that are sent."""

    def entropy_bits(self, top: int) -> float:
        """Bits a value if it is one of levels 0 … top over the full range.

        Raises CodecError as `fit` does.
        """
        affine = fit(self.low, self.high, top)
        values = Values(self.sample[None], (1, *self.sample.shape))
        return entropy_bits(values.quantize(affine, None, channel_major=False))


@functools.lru_cache(maxsize=8)
def dither_of(shape: tuple[int, ...], *, channels_last: bool = False) -> Float32s:
    """Uniform numbers in (0, 1) of this shape, the same ones on every machine; read-only.

    They are odd multiples of 2⁻¹⁴: their mean is ½, and they stay clear of 0 and 1, so that a value
    that is a level stays that level however it was rounded. channels_last moves them as it moves
    the values.
    """
    if channels_last:
        outer, inner, middle = shape
        moved = np.ascontiguousarray(dither_of((outer, middle, inner)).transpose(0, 2, 1))
        moved.flags.writeable = False
        return moved
    words = np.random.PCG64(0xD17_4E5).random_raw(-(-math.prod(shape) // 4))
    numbers = words.astype("<u8").view("<u2")[: math.prod(shape)]
    numbers = (numbers >> 2 | 1).astype(np.float32)
    numbers *= np.float32(2.0**-14)
    numbers.flags.writeable = False
    return numbers.reshape(shape)


def dither_of_sample(table: Float32s, index: int, seed: int) -> Float32s:
    """The numbers for sample `index` under a seed: over 8192 seeds each takes every value once."""
    numbers: Float32s = table[(index + seed) % len(table)] + np.float32(
        seed * 5027 % 8192 * 2.0**-13
    )
    np.subtract(numbers, np.float32(1), out=numbers, where=numbers > 1)
    return numbers


def _scratch(shape: tuple[int, ...]) -> Float32s:
    """Memory to compute in, this thread's until it asks again.

    Large pieces that are taken and given back each time may cost more than what is computed in
    them: the system takes the pages away, and clears each one when it is touched again.
    """
    size = math.prod(shape)
    if size > _BLOCK_VALUES:
        return np.empty(shape, np.float32)
    if "scratch" not in _per_thread.__dict__ or _per_thread.scratch.size < size:
        _per_thread.scratch = np.empty(size, np.float32)
    mine: Float32s = _per_thread.scratch
    return mine[:size].reshape(shape)


def _wide_rows(memory: Float32s) -> Float32s:
    """(outer, inner, channels) as longer rows: numpy reduces short ones slowly."""
    _, inner, count = memory.shape
    together = next(n for n in (64, 16, 8, 4, 2, 1) if inner % n == 0)
    return memory.reshape(-1, together * count)
