"""What codecs are measured against: a plain encoder, empirical entropy, and bits at equal error.

Nothing here uses ``tensors``: a mistake there must not hide here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

REFERENCE_BITS = (8, 4, 3, 2)
SLACK = math.log(1.1)
"""How far beyond a curve's finest point it is carried on: 10 % in error, 0.07 bits or so."""

Array = npt.NDArray[Any]


def encode_reference(x: Array, bits: int) -> bytes:
    """Per-channel min–max quantization of ``x`` (N, C, …), packed, under zstd level 1.

    Float32 minima, then float32 steps, C each; then one zstd frame of the levels in C order,
    ``bits`` bits each, highest bit first, without gaps.
    """
    channels = np.moveaxis(np.asarray(x, np.float32), 1, 0).reshape(x.shape[1], -1)
    low: npt.NDArray[np.float32] = channels.min(1)
    step: npt.NDArray[np.float32] = (channels.max(1) - low) / np.float32(2**bits - 1)
    step[step == 0] = 1
    around = (1, -1, *(1,) * (x.ndim - 2))
    levels = np.rint((x - low.reshape(around)) / step.reshape(around)).astype(np.uint8)
    digits = np.unpackbits(levels.reshape(-1, 1), axis=1)[:, 8 - bits :]
    frame: bytes = zstandard.ZstdCompressor(level=1).compress(np.packbits(digits).tobytes())
    return low.astype("<f4").tobytes() + step.astype("<f4").tobytes() + frame


def decode_reference(data: bytes, shape: Sequence[int], bits: int) -> npt.NDArray[np.float32]:
    """The values in ``data`` from :func:`encode_reference`, of this shape."""
    count, channels = math.prod(shape), shape[1]
    side = np.frombuffer(data, "<f4", 2 * channels).astype(np.float32)
    raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(data[8 * channels :]), np.uint8)
    digits = np.unpackbits(raw, count=count * bits).reshape(count, bits)
    levels = digits.astype(np.float32) @ np.float32(2) ** np.arange(bits - 1, -1, -1)
    around = (1, -1, *(1,) * (len(shape) - 2))
    low, step = side[:channels].reshape(around), side[channels:].reshape(around)
    values: npt.NDArray[np.float32] = (levels.reshape(shape) * step + low).astype(np.float32)
    return values


def entropy(levels: npt.NDArray[np.uint8], groups: npt.NDArray[np.integer] | None = None) -> float:
    """Empirical entropy of order 0, bits for each of ``levels`` (n,).

    ``groups`` (n,) says which have a distribution of their own, the channels for example. What
    it takes to describe the distributions is not counted.
    """
    if not levels.size:
        return 0.0
    symbols = levels.astype(np.int64)
    if groups is not None:
        symbols += 256 * groups.astype(np.int64)
    counts = np.bincount(symbols)
    counts = np.pad(counts, (0, -counts.size % 256)).reshape(-1, 256)
    of_group = np.broadcast_to(counts.sum(1, keepdims=True), counts.shape)[counts > 0]
    counts = counts[counts > 0]
    return float((counts * np.log2(of_group / counts)).sum() / levels.size)


def relative_error(x: Array, decoded: Array, where: npt.NDArray[np.bool_] | None = None) -> float:
    """‖x − x̂‖² / ‖x‖² over all entries, or over those in ``where``; 0 if nothing is lost."""
    wanted, got = np.asarray(x, np.float64), np.asarray(decoded, np.float64)
    if where is not None:
        wanted, got = wanted[where], got[where]
    lost, power = float(np.square(wanted - got).sum()), float(np.square(wanted).sum())
    return lost / power if power else math.inf if lost else 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of an encoder on one tensor: bits a value, and relative error."""

    bits: float
    error: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Bits a value that curves take at the error of a reference point."""

    reference: Point
    bits: float | None
    """None if no curve reaches so small an error."""
    note: str
    """Empty if the bits are interpolated."""

    @property
    def ratio(self) -> float | None:
        """Bits against the reference's; below 1 is fewer."""
        return None if self.bits is None else self.bits / self.reference.bits

    @property
    def fewer(self) -> bool:
        """Whether fewer bits than the reference's are enough."""
        return self.ratio is not None and self.ratio < 1


def compare(curves: Iterable[Sequence[Point]], reference: Point) -> Comparison:
    """The fewest bits at which one of the curves has the error of ``reference``.

    Between two points of a curve log error is taken to be linear in bits (other numbers of levels
    lie between them). Of a curve whose coarsest point has less error than the reference, that point
    counts; beyond its finest point a curve is carried on by 10 % of the error and no further.
    """
    found = [at for curve in curves if (at := _bits_at(_front(curve), reference)) is not None]
    if not found:
        return Comparison(reference, None, "finer than the finest setting")
    bits, note = min(found)
    return Comparison(reference, bits, note)


def _front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats, from few bits to many: errors fall."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.error)):
        if not front or point.error < front[-1].error:
            front.append(point)
    return front


def _bits_at(front: Sequence[Point], reference: Point) -> tuple[float, str] | None:
    if not front:
        return None
    if reference.error >= front[0].error:
        note = "" if reference.error == front[0].error else "with less error"
        return front[0].bits, note
    wanted = _log(reference.error)
    for left, right in itertools.pairwise(front):
        if reference.error >= right.error:
            return _line(left, right, wanted), ""
    if len(front) > 1 and wanted >= _log(front[-1].error) - SLACK:
        return _line(front[-2], front[-1], wanted), "carried on"
    return None


def _line(left: Point, right: Point, wanted: float) -> float:
    share = (_log(left.error) - wanted) / (_log(left.error) - _log(right.error))
    return left.bits + share * (right.bits - left.bits)


def _log(error: float) -> float:
    return math.log(max(error, 1e-30))
