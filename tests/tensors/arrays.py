"""Arrays of every shape, dtype, layout and kind of value, and codecs, for property tests."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensors import CodecError, affine_torch, parse_codec

Array = npt.NDArray[Any]

torch.set_num_threads(1)

_HUGE = {16: 65504.0, 32: 2.0**127 - 2.0**103, 64: 2.0**127 - 2.0**103}
_TINY = {16: 2.0**-20, 32: 2.0**-140, 64: 2.0**-140}


def _spans(width: int) -> list[tuple[float, float]]:
    huge, tiny = _HUGE[width], _TINY[width]
    return [
        (-1.0, 1.0),
        (0.0, 1.0),
        (-1.0, 0.0),
        (96.0, 97.0),
        (-97.0, -96.0),
        (-huge, huge),
        (0.0, huge),
        (-huge, -1.0),
        (-tiny, tiny),
        (0.0, tiny),
        (tiny, tiny),
        (-huge, tiny),
        (-0.0, 0.0),
    ]


def arrays(
    *, finite: bool = True, min_dims: int = 0, min_side: int = 0
) -> st.SearchStrategy[Array]:
    """float16, float32 and float64 arrays of 0 to 4 dimensions, empty ones too.

    Each keeps to a span of values: around zero, on one side, denormal, huge, constant. Float64s
    lie within float32's range.
    """
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=4, min_side=min_side, max_side=6)

    def elements(width: int) -> st.SearchStrategy[st.SearchStrategy[float]]:
        if not finite:
            return st.just(st.floats(width=width))  # type: ignore[arg-type]
        spans = st.sampled_from(_spans(width))
        return spans.map(lambda span: st.floats(*span, width=width))  # type: ignore[arg-type]

    def filled(dtype: np.dtype[Any]) -> st.SearchStrategy[Array]:
        return elements(8 * dtype.itemsize).flatmap(
            lambda values: hnp.arrays(dtype, shapes, elements=values)
        )

    return st.sampled_from([np.dtype(name) for name in ("f2", "f4", "f8")]).flatmap(filled)


def float32s(**options: Any) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    """`arrays`, as float32."""
    return arrays(**options).map(lambda x: x.astype(np.float32))


levels = st.sampled_from(["int2", "int3", "int4", "int5", "int6", "int7", "int8"]) | st.builds(
    "levels{}".format, st.integers(3, 256)
)
"""Names of codecs with levels, without modifiers."""


@st.composite
def affine_codecs(draw: st.DrawFn, *, per_channel: bool = True, zstd: bool = True) -> str:
    """Names of codecs with levels, with modifiers or without."""
    name = draw(levels)
    name += draw(st.sampled_from(["", "+channel"])) if per_channel else ""
    name += draw(st.sampled_from(["", "+stochastic"]))
    return name + (draw(st.sampled_from(["", "+zstd", "+zstd:3"])) if zstd else "")


codecs = st.sampled_from(["fp32", "fp16", "bf16", "fp32+zstd", "fp16+zstd", "bf16+zstd"])
codecs = codecs | affine_codecs()
"""Names of all codecs."""


def layouts(x: Array) -> list[Array]:
    """The same values in other strides, some of them negative."""
    if not x.ndim:
        return [x]
    spread = np.zeros(tuple(2 * n for n in x.shape), x.dtype)
    every_other = spread[tuple(slice(None, None, 2) for _ in x.shape)]
    every_other[...] = x
    big_endian = x.astype(x.dtype.newbyteorder(">"))
    return [np.asfortranarray(x), every_other, np.flip(np.flip(x).copy()), big_endian]


def torch_layouts(t: torch.Tensor) -> list[torch.Tensor]:
    """The same values in other strides, and as a tensor that has a gradient."""
    same = [t, t.clone().requires_grad_()]
    if t.dim():
        same.append(t.repeat_interleave(2, 0)[::2])
    if t.dim() > 1:
        same.append(t.mT.contiguous().mT)
    if t.dim() == 4:
        same.append(t.contiguous(memory_format=torch.channels_last))
    return same


def on_gpu_path() -> Any:
    """While entered, CPU tensors are quantized as those on a GPU are."""

    def on_gpu(x: torch.Tensor) -> affine_torch.GpuValues:
        return affine_torch.GpuValues(x.detach())

    return mock.patch.object(affine_torch, "values_of", on_gpu)


def outcome(name: str, x: Array | torch.Tensor, **options: Any) -> bytes | str:
    """The bytes, or the error where the codec refuses."""
    try:
        return parse_codec(name).encode(x, **options)
    except CodecError as error:
        return str(error)
