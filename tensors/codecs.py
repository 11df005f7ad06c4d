"""Codecs: tensors to bytes and back.

| codec          | bits a value | carries                                                         |
|----------------|--------------|-----------------------------------------------------------------|
| fp32           | 32           | every float32, NaN and infinities too, bit for bit              |
| fp16           | 16           | finite values within ±65504, rounded to nearest even            |
| bf16           | 16           | finite values, rounded to nearest even                          |
| int2 … int8    | 2 … 8        | finite values, rounded to one of 2^bits evenly spaced levels    |
| levels3 … 256  | 2 … 8        | the same with another number of levels                          |

What may follow the name, in this order:

- `+channel`: levels of their own for each index of dimension 1, instead of for the whole tensor;
- `+stochastic`: rounded up or down by chance, so that the mean error is zero;
- `+zstd` or `+zstd:LEVEL` (1 … 19, default 1): a lossless stage, left out where it would not help.

Without zstd each level costs its full bits, so the levels (unless there are 256) cover the share of
the range that makes the squared error least. With zstd rare levels are nearly free, and the full
range is the better trade of bytes for error (measured in docs/benchmarks.md). One map for the
tensor puts the bytes where the values are large; one a channel keeps quiet channels exact too.

A numpy array and a torch tensor of equal values encode to equal bytes, whatever the strides.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tensors import affine as numpy_affine
from tensors import floats
from tensors.affine import Affine, Bytes, Float32s, Sketch, Values
from tensors.bit_planes import pack, packed_bytes
from tensors.clipping import fit_clipped
from tensors.errors import CodecError
from tensors.format import (
    DTYPES,
    MAX_NDIM,
    CodecId,
    Encoded,
    Header,
    Lossless,
    channels,
    header_bytes,
)
from tensors.lossless import DEFAULT_LEVEL, MAX_LEVEL, compress

if TYPE_CHECKING:
    import torch

    from tensors.affine_torch import GpuValues

FLOATS = {"fp32": CodecId.EXACT, "fp16": CodecId.FP16, "bf16": CodecId.BF16}
"""Codecs without levels, by name."""
MIN_LEVELS, MAX_LEVELS = 3, 256

_FLOAT32 = np.dtype(np.float32)
_F4 = np.dtype("<f4")
_NAME = re.compile(
    r"(?P<float>fp32|fp16|bf16)?(int(?P<bits>[2-8]))?(levels(?P<levels>[0-9]{1,3}))?"
    r"(?P<channel>\+channel)?(?P<stochastic>\+stochastic)?"
    r"(?P<zstd>\+zstd(:(?P<level>[0-9]{1,2}))?)?"
)


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to encode tensors; made by `parse_codec`, safe to share between threads."""

    kind: CodecId
    levels: int | None = None
    """How many levels a value is rounded to; None for floats."""
    per_channel: bool = False
    stochastic: bool = False
    zstd_level: int | None = None
    """None without the lossless stage."""

    @property
    def name(self) -> str:
        """Canonical name, which `parse_codec` reads back."""
        if self.levels is None:
            name = next(name for name, kind in FLOATS.items() if kind is self.kind)
        elif self.levels & (self.levels - 1):
            name = f"levels{self.levels}"
        else:
            name = f"int{self.bits}"
        name += "+channel" * self.per_channel + "+stochastic" * self.stochastic
        if self.zstd_level is not None:
            name += "+zstd" if self.zstd_level == DEFAULT_LEVEL else f"+zstd:{self.zstd_level}"
        return name

    @property
    def bits(self) -> int:
        """Bits of a value before the lossless stage."""
        match self.kind:
            case CodecId.EXACT:
                return 32
            case CodecId.AFFINE:
                assert self.levels is not None
                return (self.levels - 1).bit_length()
            case _:
                return 16

    def with_levels(self, levels: int) -> Codec:
        """The codec that differs in the number of levels only."""
        assert self.levels is not None
        assert MIN_LEVELS <= levels <= MAX_LEVELS
        return replace(self, levels=levels)

    def encode(
        self,
        x: npt.NDArray[Any] | torch.Tensor,
        *,
        keep: npt.NDArray[np.bool_] | None = None,
        seed: int = 0,
    ) -> bytes:
        """Encode floating point values of any shape, strides and device.

        keep: bool, x's shape; the entries to send, to a receiver who knows the same and takes the
        others to be zero. Only for one map a tensor. seed: varies the chance in stochastic
        rounding.

        Raises CodecError for what is no array or tensor, another dtype and values the codec cannot
        carry.
        """
        _check(x, self)
        if keep is not None and (self.kind is not CodecId.AFFINE or self.per_channel):
            raise CodecError(f"{self.name} cannot leave entries out: choose int2 … int8")
        assert keep is None or keep.shape == tuple(x.shape)
        if self.kind is not CodecId.AFFINE:
            return self._assemble(self._floats(x))
        affine, sent = self._quantize(x, masked=keep is not None, seed=seed)
        if keep is not None:
            sent = np.compress(keep.reshape(-1), sent)
        body = pack(sent, self.bits)
        side = affine.offset.astype(_F4, copy=False).tobytes()
        side += affine.scale.astype(_F4, copy=False).tobytes()
        header = Header(
            codec=self.kind,
            shape=tuple(x.shape),
            values=sent.size,
            body_bytes=body.nbytes,
            top=affine.top,
            per_channel=self.per_channel,
            masked=keep is not None,
        )
        return self._finish(header, side, body)

    def max_bytes(self, shape: tuple[int, ...]) -> int:
        """The most bytes `encode` returns for a tensor of this shape."""
        maps = 0
        if self.kind is CodecId.AFFINE:
            maps = channels(shape) if self.per_channel else 1
        return header_bytes(len(shape)) + 8 * maps + self._body_bytes(math.prod(shape))

    def estimate_bytes(
        self,
        x: npt.NDArray[Any] | torch.Tensor,
        *,
        keep: npt.NDArray[np.bool_] | None = None,
    ) -> int:
        """About how many bytes `encode` would return, from a sample; exact without zstd."""
        return self.bytes_of(self.sketch(x, keep=keep))

    def sketch(
        self,
        x: npt.NDArray[Any] | torch.Tensor,
        *,
        keep: npt.NDArray[np.bool_] | None = None,
    ) -> Sketch:
        """What `bytes_of` has to know of a tensor; good for any number of levels.

        Raises CodecError as `encode` does.
        """
        _check(x, self)
        shape = tuple(x.shape)
        count = math.prod(shape) if keep is None else int(np.count_nonzero(keep))
        if self.zstd_level is None or self.kind is not CodecId.AFFINE:
            nothing = np.zeros(0, np.float32)
            return Sketch(shape, count, nothing, nothing, nothing)
        values = _values(x)
        low, high = self._range(values, masked=keep is not None)
        sample = values.sample(per_channel=self.per_channel)
        if keep is not None:
            sample = sample[:, numpy_affine.sample_of(keep)]
        return Sketch(shape, count, low, high, sample)

    def bytes_of(self, sketch: Sketch) -> int:
        """`estimate_bytes` of a tensor by a sketch of it, made with any number of levels."""
        body = self._body_bytes(sketch.values)
        other = self.max_bytes(sketch.shape) - self._body_bytes(math.prod(sketch.shape))
        if self.zstd_level is not None and self.kind is CodecId.AFFINE and sketch.values:
            assert self.levels is not None
            try:
                bits = sketch.entropy_bits(self.levels - 1)
            except CodecError as error:
                raise CodecError(f"{self.name}: {error}") from None
            body = min(body, math.ceil(bits * sketch.values / 8))
        return other + body

    def _body_bytes(self, values: int) -> int:
        if self.kind is CodecId.AFFINE:
            return packed_bytes(values, self.bits)
        return values * self.bits // 8

    def _floats(self, x: npt.NDArray[Any] | torch.Tensor) -> npt.NDArray[Any]:
        back_end: Any = floats
        if not isinstance(x, np.ndarray):
            from tensors import floats_torch

            back_end = floats_torch
        match self.kind:
            case CodecId.FP16:
                converted = back_end.to_fp16(x)
            case CodecId.BF16:
                converted = back_end.to_bf16(x)
            case _:
                converted = back_end.to_float32(x)
        array: npt.NDArray[Any] = converted
        return array

    def _quantize(
        self, x: npt.NDArray[Any] | torch.Tensor, *, masked: bool, seed: int
    ) -> tuple[Affine, Bytes]:
        values = _values(x)
        affine = self._fit(values, masked=masked)
        return affine, values.quantize(
            affine, seed if self.stochastic else None, channel_major=not masked
        )

    def _fit(self, values: Values | GpuValues, *, masked: bool) -> Affine:
        assert self.levels is not None
        low, high = self._range(values, masked=masked)
        try:
            # What is clipped cannot be rounded up by chance: the mean would not be kept.
            if self.zstd_level is not None or self.levels == MAX_LEVELS or self.stochastic:
                return numpy_affine.fit(low, high, self.levels - 1)
            sample = values.sample(per_channel=self.per_channel)
            return fit_clipped(
                low, high, self.levels - 1, sample, sample.size / max(1, values.size)
            )
        except CodecError as error:
            raise CodecError(f"{self.name}: {error}") from None

    def _range(self, values: Values | GpuValues, *, masked: bool) -> tuple[Float32s, Float32s]:
        low, high = values.range(per_channel=self.per_channel)
        if masked:  # what is left out decodes to zero, so zero must have a level
            return np.minimum(low, 0), np.maximum(high, 0)
        return low, high

    def _assemble(self, elements: npt.NDArray[Any]) -> bytes:
        little = elements.astype(elements.dtype.newbyteorder("<"), copy=False)
        exact = self.kind is CodecId.EXACT
        body = little.reshape(-1).view(np.uint8)
        header = Header(
            codec=self.kind,
            shape=elements.shape,
            values=elements.size,
            body_bytes=body.nbytes,
            dtype=elements.dtype if exact else _FLOAT32,
        )
        return self._finish(header, b"", body)

    def _finish(self, header: Header, side: bytes, body: Bytes) -> bytes:
        if self.zstd_level is not None and body.size:
            planes = body
            if header.codec is not CodecId.AFFINE and header.element_bytes > 1:
                planes = np.ascontiguousarray(body.reshape(-1, header.element_bytes).T)
            frame = compress(planes, self.zstd_level, alike=header.masked)
            if len(frame) < body.nbytes:
                shorter = replace(header, lossless=Lossless.ZSTD, body_bytes=len(frame))
                return shorter.pack(side, frame)
        return header.pack(side, body.data)


class Encode(Protocol):
    """How a tensor is encoded with a codec: `Codec.encode`, or what stands for that."""

    def __call__(
        self,
        codec: Codec,
        x: npt.NDArray[Any] | torch.Tensor,
        /,
        *,
        keep: npt.NDArray[np.bool_] | None = None,
        seed: int = 0,
    ) -> Encoded: ...


def parse_codec(name: str) -> Codec:
    """The codec of that name, see the top of this module; CodecError if there is none."""
    match = _NAME.fullmatch(name)
    bases = [] if match is None else [match[key] for key in ("float", "bits", "levels")]
    if match is None or sum(base is not None for base in bases) != 1:
        raise CodecError(
            f"unknown codec {name!r}: write one of {', '.join(FLOATS)}, int2 … int8 or "
            f"levels{MIN_LEVELS} … levels{MAX_LEVELS}, with +channel, +stochastic and +zstd or "
            "+zstd:LEVEL after it, in this order, if wanted"
        )
    zstd_level = None
    if match["zstd"]:
        zstd_level = int(match["level"] or DEFAULT_LEVEL)
        if not 1 <= zstd_level <= MAX_LEVEL:
            raise CodecError(f"codec {name!r}: the zstd level must be 1 to {MAX_LEVEL}")
    if match["float"]:
        if match["channel"] or match["stochastic"]:
            raise CodecError(f"codec {name!r}: +channel and +stochastic go with int2 … int8")
        return Codec(FLOATS[match["float"]], zstd_level=zstd_level)
    levels = 2 ** int(match["bits"]) if match["bits"] else int(match["levels"])
    if not MIN_LEVELS <= levels <= MAX_LEVELS:
        raise CodecError(f"codec {name!r}: {MIN_LEVELS} to {MAX_LEVELS} levels")
    return Codec(
        CodecId.AFFINE, levels, bool(match["channel"]), bool(match["stochastic"]), zstd_level
    )


def encode_exact(x: npt.NDArray[Any]) -> bytes:
    """Encode an array of any dtype in `format.DTYPES` so that `decode` gives it back unchanged."""
    if x.dtype not in DTYPES:
        known = ", ".join(dtype.name for dtype in DTYPES)
        raise CodecError(f"cannot send dtype {x.dtype}: convert it to one of {known}")
    return Codec(CodecId.EXACT)._assemble(np.ascontiguousarray(x).reshape(x.shape))  # noqa: SLF001


def _check(x: npt.NDArray[Any] | torch.Tensor, codec: Codec) -> None:
    if not isinstance(x, np.ndarray) and not hasattr(x, "is_floating_point"):
        raise CodecError(
            f"{codec.name} takes numpy arrays and torch tensors, not {type(x).__name__}: "
            "make it an array with np.asarray"
        )
    if len(x.shape) > MAX_NDIM:
        raise CodecError(f"{codec.name}: {len(x.shape)} dimensions, at most {MAX_NDIM} can be sent")
    if isinstance(x, np.ndarray):
        is_float = x.dtype.kind == "f" and x.dtype.itemsize <= 8
    else:
        is_float = x.is_floating_point()
    if not is_float:
        raise CodecError(f"{codec.name} takes floating point values, not {x.dtype}: convert it")


def _values(x: npt.NDArray[Any] | torch.Tensor) -> Values | GpuValues:
    if isinstance(x, np.ndarray):
        return numpy_affine.values_of(x)
    from tensors import affine_torch

    return affine_torch.values_of(x)
