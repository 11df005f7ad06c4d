"""Bytes back to tensors: what `codecs` wrote, and what a stranger claims to have written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tensors import affine as numpy_affine
from tensors import floats
from tensors.affine import Affine, Bytes
from tensors.bit_planes import unpack
from tensors.errors import FormatError
from tensors.format import (
    DEFAULT_LIMITS,
    Buffer,
    CodecId,
    Encoded,
    Header,
    Limits,
    in_bytes,
    read_body,
    read_header,
)

if TYPE_CHECKING:
    import torch


def decode(
    data: Encoded,
    *,
    limits: Limits = DEFAULT_LIMITS,
    keep: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[Any]:
    """The tensor in `data`: C-contiguous, writable, independent of `data`.

    keep: which entries a masked tensor holds, bool, its shape; the others are 0. float32 from a
    codec of `parse_codec`; of its own dtype from `encode_exact`, so check the dtype and shape of
    what a stranger sent. Raises FormatError, before memory is taken, for bytes that are not a
    tensor or exceed `limits`; reasons as in `read_header`, `bad_body`, `bad_side_data` and
    `wrong_mask`.
    """
    data = in_bytes(data)
    header = read_header(data, limits=limits)
    if header.codec is CodecId.AFFINE:
        affine = _read_affine(data, header)
        levels = _read_levels(data, header, affine, keep)
        view = numpy_affine.in_c_order(levels, header.shape, channel_major=not header.masked)
        return numpy_affine.dequantize(view, affine).reshape(header.shape)
    return _decode_floats(data, header)


def decode_torch(
    data: Encoded,
    *,
    limits: Limits = DEFAULT_LIMITS,
    keep: npt.NDArray[np.bool_] | None = None,
    channels_last: bool = False,
) -> torch.Tensor:
    """`decode` to a CPU tensor of the same values.

    Contiguous, or, if wanted and 4-d, contiguous in torch's channels_last order. What a
    `TensorReference` refers to comes as it is: in its own dtype, on its own device, not copied
    unless it is laid out otherwise.
    """
    import torch

    from tensors.by_reference import TensorReference

    header = read_header(data, limits=limits)
    if isinstance(data, TensorReference):
        return _laid_out(data.values, channels_last=channels_last)
    data = in_bytes(data)
    if header.codec is CodecId.AFFINE:
        from tensors import affine_torch

        affine = _read_affine(data, header)
        levels = _read_levels(data, header, affine, keep)
        return affine_torch.dequantize(
            levels,
            affine,
            header.shape,
            channel_major=not header.masked,
            channels_last=channels_last,
        )
    if header.codec is CodecId.FP16:  # numpy widens float16 several times more slowly
        narrow = read_body(data, header).view("<f2").astype(np.float16)
        values = torch.from_numpy(narrow).to(torch.float32).view(header.shape)
    else:
        values = torch.from_numpy(_decode_floats(data, header))
    return _laid_out(values, channels_last=channels_last)


def _laid_out(values: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    import torch

    if channels_last and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values.contiguous()


def nonzero(data: Encoded, *, limits: Limits = DEFAULT_LIMITS) -> npt.NDArray[np.bool_]:
    """Which entries of an encoded, unmasked tensor decode to something else than zero.

    bool, the tensor's shape. Raises FormatError as `decode` does.
    """
    data = in_bytes(data)
    header = read_header(data, limits=limits)
    if header.codec is CodecId.AFFINE:
        return _nonzero_levels(data, header, _read_affine(data, header))
    differs: npt.NDArray[np.bool_] = _decode_floats(data, header) != 0
    return differs


def relu_mask(data: Encoded, *, limits: Limits = DEFAULT_LIMITS) -> npt.NDArray[np.bool_] | None:
    """`nonzero`; None where a value may lie below zero.

    What a ReLU has made has such a mask: behind it the gradient of what is zero changes nothing, so
    it need not be sent.
    """
    data = in_bytes(data)
    header = read_header(data, limits=limits)
    if header.codec is CodecId.AFFINE:
        affine = _read_affine(data, header)
        return None if (affine.offset < 0).any() else _nonzero_levels(data, header, affine)
    values = _decode_floats(data, header)
    return None if (values < 0).any() else values != 0


def _nonzero_levels(data: Buffer, header: Header, affine: Affine) -> npt.NDArray[np.bool_]:
    levels = _read_levels(data, header, affine, None)
    view = numpy_affine.in_c_order(levels, header.shape, channel_major=not header.masked)
    differs: npt.NDArray[np.bool_]
    if header.per_channel:
        differs = numpy_affine.dequantize(view, affine) != 0
    else:
        zeros = _zero_levels(affine)
        # More than one: of a constant, all stand for zero.
        differs = view != zeros[0] if len(zeros) == 1 else np.full(view.shape, not len(zeros))
    return differs.reshape(header.shape)


def _zero_levels(affine: Affine) -> npt.NDArray[np.intp]:
    """Which levels of the only map stand for zero: none, one or all."""
    every = np.arange(affine.top + 1, dtype=np.uint8)
    (zeros,) = np.nonzero(numpy_affine.dequantize(every[None, None], affine)[0, 0] == 0)
    return zeros


def _read_affine(data: Buffer, header: Header) -> Affine:
    side = np.frombuffer(data, "<f4", 2 * header.maps, header.size).astype(np.float32)
    affine = Affine(side[: header.maps], side[header.maps :], header.top, clips=False)
    if not affine.is_valid():
        raise FormatError("bad_side_data", "an offset or a scale is not finite")
    return affine


def _read_levels(
    data: Buffer, header: Header, affine: Affine, keep: npt.NDArray[np.bool_] | None
) -> Bytes:
    if header.masked and (keep is None or keep.shape != header.shape):
        raise FormatError("wrong_mask", "a masked tensor for which this side has no mask")
    packed = read_body(data, header)
    levels = unpack(packed, header.values, header.bits)
    if header.top & (header.top + 1) and levels.size and levels.max() > header.top:
        raise FormatError("bad_body", f"a level above the highest, {header.top}")
    if not header.masked:
        return levels
    assert keep is not None
    if np.count_nonzero(keep) != header.values:
        raise FormatError(
            "wrong_mask", f"{header.values} values for a mask of {np.count_nonzero(keep)}"
        )
    zeros = _zero_levels(affine)
    if not len(zeros):
        raise FormatError("bad_side_data", "a masked tensor without a level for zero")
    whole = np.full(keep.size, zeros[0], np.uint8)
    whole[np.flatnonzero(keep)] = levels
    return whole


def _decode_floats(data: Buffer, header: Header) -> npt.NDArray[Any]:
    body = read_body(data, header)
    match header.codec:
        case CodecId.FP16:
            values = body.view("<f2").astype(np.float32)
        case CodecId.BF16:
            values = floats.from_bf16(body.view("<u2").astype(np.uint16, copy=False))
        case _:
            values = body.view(header.dtype.newbyteorder("<")).astype(header.dtype)
    return values.reshape(header.shape)
