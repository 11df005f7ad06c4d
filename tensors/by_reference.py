"""Tensors that cross from one part of a process to another without being serialised.

A :class:`TensorReference` stands where encoded bytes stand: it is as long as they are, becomes
them, bit for bit, when somebody asks for them, and `decode_torch` opens it for nothing. Only a
fleet inside one process makes such; what goes over a network is bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tensors.codecs import Codec, parse_codec
from tensors.format import MAX_NDIM, CodecId, Encoded, Header, header_bytes

if TYPE_CHECKING:
    import torch


class TensorReference:
    """What the codec `fp32` makes of `values` (any floating dtype, any device), not made yet.

    `values` must not be changed any more.
    """

    __slots__ = ("_length", "values")

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.detach() if values.element_size() <= 4 else values.detach().float()
        self._length = header_bytes(values.dim()) + 4 * values.numel()

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return parse_codec("fp32").encode(self.values)

    def __repr__(self) -> str:
        return f"TensorReference(shape={tuple(self.values.shape)}, bytes={self._length})"

    @property
    def header(self) -> Header:
        """As in the bytes."""
        count = self.values.numel()
        return Header(
            codec=CodecId.EXACT, shape=tuple(self.values.shape), values=count, body_bytes=4 * count
        )


def encode_by_reference(
    codec: Codec,
    x: npt.NDArray[Any] | torch.Tensor,
    *,
    keep: npt.NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Encoded:
    """`Codec.encode`; of a torch tensor without loss (`fp32`) a :class:`TensorReference`."""
    exact = codec.kind is CodecId.EXACT and codec.zstd_level is None and keep is None
    if exact and not isinstance(x, np.ndarray) and x.is_floating_point() and x.dim() <= MAX_NDIM:
        return TensorReference(x)
    return codec.encode(x, keep=keep, seed=seed)
