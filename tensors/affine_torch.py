"""Affine quantization of torch tensors, on CPU or GPU, from any memory layout.

Input is detached. On the CPU numpy does the arithmetic: it converts between float32 and bytes
several times as fast as torch does.
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
)
from tensors.affine import dequantize as dequantize_numpy


def values_of(x: torch.Tensor) -> Values | GpuValues:
    """The values of a tensor, as float32."""
    x = x.detach()
    shape = tuple(x.shape)
    if x.device.type != "cpu":
        return GpuValues(x)
    x = x.to(torch.float32)
    if not is_channels_last(x):
        return Values(x.contiguous().view(by_channel(shape)).numpy(), shape)
    return _TorchValues(
        x.view(by_channel(shape)).transpose(1, 2).numpy(), shape, channels_last=True
    )


class _TorchValues(Values):
    def _swap(self, levels: Bytes) -> Bytes:
        swapped: Bytes = _swap(torch.from_numpy(levels)).numpy()
        return swapped


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
    memory = _swap(torch.from_numpy(np.require(levels.reshape(rows), requirements="W"))).numpy()
    values = torch.from_numpy(dequantize_numpy(memory, affine, channels_last=True))
    n, c, h, w = shape
    return values.view(n, h, w, c).permute(0, 3, 1, 2)


def nonzero(x: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Which entries are not zero, of x's shape, in C order."""
    x = x.detach().to("cpu", torch.float32)
    mask: npt.NDArray[np.bool_]
    if is_channels_last(x):
        n, c, h, w = x.shape
        differs = (x.permute(0, 2, 3, 1).numpy() != 0).reshape(n, h * w, c)
        mask = _swap(torch.from_numpy(differs.view(np.uint8))).numpy().view(np.bool_)
        return mask.reshape(n, c, h, w)
    mask = x.contiguous().numpy() != 0
    return mask


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a tensor lies in torch's channels_last order and in no other."""
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _swap(x: torch.Tensor) -> Any:
    """(n, a, b) → contiguous (n, b, a)."""
    # Shuffling the a·b "channels" of pictures of one pixel does just that, in a kernel several
    # times as fast as contiguous(); it is chosen by these strides.
    n, a, b = x.shape
    if not x.numel():
        return x.new_empty(n, b, a)
    flat = x.as_strided((n, a * b, 1, 1), (a * b, 1, a * b, a * b))
    return torch.native_channel_shuffle(flat, a).view(n, b, a)
