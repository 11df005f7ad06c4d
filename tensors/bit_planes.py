"""Levels of fewer than 8 bits in bytes without gaps.

Each level is cut, from its low bits up, into parts of 8, 4, 2 and 1 bits, as the binary
decomposition of its width says (3 bits: 2 and 1; 6 bits: 4 and 2). All first parts form a plane,
then all second parts, and so on; a plane holds 8/width parts a byte, the first in the lowest bits.

The planes are also what lets zstd see the structure: neighbours share a byte, and the rarely used
high bits of most levels become long runs (measured in docs/benchmarks.md).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_WIDTHS = (8, 4, 2, 1)


def parts(bits: int) -> tuple[int, ...]:
    """Widths of the parts of a level of `bits` (1 … 8) bits, from its low bits up."""
    return tuple(width for width in _WIDTHS if bits & width)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` levels of `bits` bits take."""
    return sum(-(-count * width // 8) for width in parts(bits))


def pack(levels: Bytes, bits: int) -> Bytes:
    """(count,) levels below 2^bits, contiguous → (packed_bytes,)."""
    if bits == 8:
        return levels
    planes, shift = [], 0
    for width in parts(bits):
        part: Bytes = levels >> np.uint8(shift) if shift else levels
        if shift + width < bits:
            part = part & np.uint8((1 << width) - 1)
        planes.append(_pack_plane(part, width))
        shift += width
    return planes[0] if len(planes) == 1 else np.concatenate(planes)


def unpack(packed: Bytes, count: int, bits: int) -> Bytes:
    """(packed_bytes,) → (count,) levels; a view of `packed` for 8 bits."""
    if bits == 8:
        return packed
    levels: Bytes | None = None
    start, shift = 0, 0
    for width in parts(bits):
        stop = start + -(-count * width // 8)
        part = _unpack_plane(packed[start:stop], width)[:count]
        if levels is None:
            levels = part
        else:
            levels |= part << np.uint8(shift)
        start, shift = stop, shift + width
    assert levels is not None
    return levels


def _pack_plane(part: Bytes, width: int) -> Bytes:
    if width == 1:
        return np.packbits(part, bitorder="little")
    together = 8 // width
    if len(part) % together or not part.flags.aligned or not part.flags.c_contiguous:
        part = np.concatenate([part, np.zeros(-len(part) % together, np.uint8)])
    # Bytes 0a 0b, read as a little endian number, become ab in the low byte; SIMD does the rest.
    if width == 4:
        words: npt.NDArray[np.uint16] = part.view("<u2")
        return (words | (words >> 4)).astype(np.uint8)
    wide: npt.NDArray[np.uint32] = part.view("<u4")
    return (wide | (wide >> 6) | (wide >> 12) | (wide >> 18)).astype(np.uint8)


def _unpack_plane(plane: Bytes, width: int) -> Bytes:
    if width == 1:
        return np.unpackbits(plane, bitorder="little")
    if width == 4:
        words = plane.astype("<u2")
        words |= words << 4
        words &= 0x0F0F
        return words.view(np.uint8)
    wide = plane.astype("<u4")
    wide |= wide << 6
    wide |= wide << 12
    wide &= 0x03030303
    return wide.view(np.uint8)
