"""The torch twins of `floats`: same bytes, on CPU or GPU, from any memory layout.

Input is detached; what is sent comes back as numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensors.floats import BF16_BOUND, FP16_BOUND, check_bound


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


def _float32(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.float32).contiguous()


def _check_bound(values: torch.Tensor, codec: str, bound: float) -> None:
    if values.numel():
        check_bound(values.amin().item(), values.amax().item(), codec, bound)


def _numpy(x: torch.Tensor) -> npt.NDArray[Any]:
    return x.cpu().numpy()
