"""The torch twins of `quantize`: same bytes, on CPU or GPU, from any memory layout.

Input is detached; what is sent comes back as numpy, what was received as torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensors.quantize import (
    BF16_BOUND,
    FP16_BOUND,
    Affine,
    affine_from_range,
    by_channel,
    check_bound,
)

_BLOCK_ELEMENTS = 2**18


def to_float32(x: torch.Tensor) -> npt.NDArray[np.float32]:
    return _numpy(_float32(x))


def to_fp16(x: torch.Tensor) -> npt.NDArray[np.float16]:
    values = _float32(x)
    _check_bound(values, "fp16", FP16_BOUND)
    return _numpy(values.to(torch.float16))


def to_bf16(x: torch.Tensor) -> npt.NDArray[np.uint16]:
    values = _float32(x)
    _check_bound(values, "bf16", BF16_BOUND)
    return _numpy(values.to(torch.bfloat16).view(torch.int16)).view(np.uint16)


def to_int8(x: torch.Tensor) -> tuple[Affine, npt.NDArray[np.uint8]]:
    values = _float32(x).view(by_channel(tuple(x.shape)))
    if not values.numel():
        zeros = np.zeros(values.shape[1], np.float32)
        return Affine(zeros, zeros), np.empty(tuple(x.shape), np.uint8)
    affine = affine_from_range(_numpy(values.amin((0, 2))), _numpy(values.amax((0, 2))))
    offset, inverse = (
        torch.from_numpy(v).to(values.device)[:, None] for v in (affine.offset, affine.inverse())
    )
    if values.device.type != "cpu":
        scaled = (values - offset).mul_(inverse).add_(0.5)
        return affine, _numpy(scaled.to(torch.uint8)).reshape(tuple(x.shape))
    levels = np.empty(tuple(values.shape), np.uint8)
    # A few samples at a time: a second large temporary would cost more in page faults than the
    # arithmetic. numpy converts float32 to uint8 four times as fast as torch does on a CPU.
    step = max(1, _BLOCK_ELEMENTS // values[0].numel())
    scratch = torch.empty((step, *values.shape[1:]), dtype=torch.float32)
    for start in range(0, len(values), step):
        block = values[start : start + step]
        scaled = torch.sub(block, offset, out=scratch[: len(block)]).mul_(inverse).add_(0.5)
        np.copyto(levels[start : start + step], scaled.numpy(), casting="unsafe")
    return affine, levels.reshape(tuple(x.shape))


def from_int8(levels: npt.NDArray[np.uint8], affine: Affine) -> torch.Tensor:
    values = torch.from_numpy(levels.reshape(by_channel(levels.shape)).astype(np.float32))
    values.mul_(torch.from_numpy(affine.scale)[:, None])
    values.add_(torch.from_numpy(affine.offset)[:, None])
    return values.view(levels.shape)


def _float32(x: torch.Tensor) -> torch.Tensor:
    """Contiguous float32 in the logical order; `x` itself where it is that already."""
    x = x.detach()
    # The layout first: a second large float32 temporary would cost more in page faults.
    if (
        x.device.type == "cpu"
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        x = _from_channels_last(x)
    return x.contiguous().to(torch.float32)


def _from_channels_last(x: torch.Tensor) -> torch.Tensor:
    # Each sample is an (h·w, c) matrix to transpose. Shuffling the h·w·c "channels" of a picture
    # with one pixel per sample does just that, in a vectorised kernel up to twice as fast as
    # contiguous().
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).view(1, n, 1, h * w * c).permute(0, 3, 1, 2)
    shuffled = torch.native_channel_shuffle(pixels, h * w)
    return shuffled.permute(0, 2, 3, 1).reshape(n, c, h, w)


def _check_bound(values: torch.Tensor, codec: str, bound: float) -> None:
    if values.numel():
        check_bound(values.amin().item(), values.amax().item(), codec, bound)


def _numpy(x: torch.Tensor) -> npt.NDArray[Any]:
    return x.cpu().numpy()
