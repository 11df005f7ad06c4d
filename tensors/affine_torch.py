"""Affine quantization of torch tensors, on CPU or GPU, from any memory layout.

Input is detached. On the CPU numpy does most of the arithmetic: it converts float32 to bytes
several times as fast as torch does. torch is the faster one the other way, and swaps dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensors.affine import (
    HALF,
    Affine,
    Bytes,
    Float32s,
    Values,
    by_channel,
    dither_of,
    dither_of_sample,
    in_c_order,
    sample_steps,
    to_values,
)
from tensors.affine import dequantize as dequantize_numpy

_SIGN = 0x8000


def values_of(x: torch.Tensor) -> Values | GpuValues:
    """The values of a tensor, as float32."""
    x = x.detach()
    if x.device.type != "cpu":
        return GpuValues(x)
    shape, channels_last = tuple(x.shape), is_channels_last(x)
    if not channels_last:
        x = x.contiguous()
    kind: type[Values] = _TorchValues
    if x.dtype is torch.bfloat16:
        memory, kind = x.view(torch.int16).numpy().view(np.uint16), _Bfloat16Values
    else:
        memory = x.to(torch.float32).numpy()
    outer, count, inner = by_channel(shape)
    if channels_last:
        by = outer, inner, count
        memory = memory.transpose(0, 2, 3, 1)
    else:
        by = outer, count, inner
    return kind(memory.reshape(by), shape, channels_last=channels_last)


class _TorchValues(Values):
    def _in_order(self, levels: Bytes, *, channel_major: bool) -> Bytes:
        if not self._channels_last:
            return super()._in_order(levels, channel_major=channel_major)
        outer, inner, count = levels.shape
        rows = (1, outer * inner, count) if channel_major else (outer, inner, count)
        return _swap(levels.reshape(rows)).reshape(-1)


class _Bfloat16Values(_TorchValues):
    """The memory holds their bits, uint16."""

    def _float32s(self, memory: npt.NDArray[Any], out: Float32s | None = None) -> Float32s:
        if out is None:
            out = np.empty(memory.shape, np.float32)
        bits = torch.from_numpy(memory.view(np.int16))
        torch.from_numpy(out).copy_(bits.view(torch.bfloat16))
        return out

    def _ends(self) -> tuple[Float32s, Float32s]:
        # The bits, as unsigned integers, rise with the values from 0.0 to infinity and NaN, then as
        # the values fall from -0.0 to minus infinity and NaN.
        bits = self._memory
        low = high = bits.max()
        if high < _SIGN:
            low = bits.min()
        else:
            high = bits.view(np.int16).max().view(np.uint16)
            if high >= _SIGN:
                high = bits.min()
        ends = np.array([int(low) << 16, int(high) << 16], np.uint32).view(np.float32)
        return ends[:1], ends[1:]


class GpuValues:
    """What `affine.Values` is, for values that are better quantized where they lie."""

    def __init__(self, x: torch.Tensor) -> None:
        self._shape = tuple(x.shape)
        self._values = x.float().contiguous().view(by_channel(self._shape))

    @property
    def size(self) -> int:
        """See `affine.Values.size`."""
        return self._values.numel()

    def range(self, *, per_channel: bool) -> tuple[Float32s, Float32s]:
        """See `affine.Values.range`."""
        values = self._values if per_channel else self._values.reshape(1, 1, -1)
        if not values.numel():
            zeros = np.zeros(values.shape[1], np.float32)
            return zeros, zeros.copy()
        return values.amin((0, 2)).cpu().numpy(), values.amax((0, 2)).cpu().numpy()

    def sample(self, *, per_channel: bool) -> Float32s:
        """See `affine.Values.sample`."""
        outer, inner = sample_steps(tuple(self._values.shape))
        taken = self._values[::outer, :, ::inner]
        if per_channel:
            rows = taken.transpose(0, 1).reshape(taken.shape[1], taken.shape[0] * taken.shape[2])
        else:
            rows = taken.reshape(1, -1)
        sample: Float32s = rows.cpu().numpy()
        return sample

    def quantize(self, affine: Affine, seed: int | None, *, channel_major: bool) -> Bytes:
        """See `affine.Values.quantize`."""

        def per_map(values: Float32s) -> torch.Tensor:
            return torch.from_numpy(values).to(self._values.device)[:, None]

        scaled = self._values - per_map(affine.offset)
        scaled.mul_(per_map(affine.inverse()))
        if seed is None:
            scaled.add_(HALF.item())
        else:
            table = dither_of(tuple(self._values.shape))
            rows = [dither_of_sample(table, index, seed) for index in range(len(table))]
            rolled = np.array(rows, np.float32).reshape(table.shape)
            scaled.add_(torch.from_numpy(rolled).to(scaled.device))
        levels = scaled.clamp_(0, affine.top).to(torch.uint8)
        if channel_major:
            levels = levels.transpose(0, 1)
        flat: Bytes = levels.reshape(-1).cpu().numpy()
        return flat


def dequantize(
    levels: Bytes,
    affine: Affine,
    shape: tuple[int, ...],
    *,
    channel_major: bool,
    channels_last: bool,
) -> torch.Tensor:
    """float32 values of (size,) levels in that order; a 4-d result may lie channels_last."""
    outer, count, inner = by_channel(shape)
    if not (channels_last and len(shape) == 4):
        view = in_c_order(levels, shape, channel_major=channel_major)
        return torch.from_numpy(dequantize_numpy(view, affine)).view(shape)
    rows = (1, count, outer * inner) if channel_major else (outer, count, inner)
    # What is read-only, torch takes with a warning.
    writable = levels if levels.flags.writeable else levels.copy()
    values = torch.from_numpy(_swap(writable.reshape(rows))).to(torch.float32)
    to_values(values.numpy(), affine, channels_last=True)
    n, c, h, w = shape
    return values.view(n, h, w, c).permute(0, 3, 1, 2)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a tensor lies in torch's channels_last order and in no other."""
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _swap(x: npt.NDArray[np.uint8]) -> Bytes:
    """(n, a, b), contiguous → contiguous (n, b, a)."""
    # Shuffling the a·b "channels" of pictures of one pixel does just that, in a kernel several
    # times as fast as contiguous(); it is chosen by these strides.
    n, a, b = x.shape
    if not x.size:
        return np.empty((n, b, a), np.uint8)
    flat = torch.from_numpy(x).as_strided((n, a * b, 1, 1), (a * b, 1, a * b, a * b))
    swapped: Bytes = torch.native_channel_shuffle(flat, a).numpy()
    return swapped.reshape(n, b, a)
