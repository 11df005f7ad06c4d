"""The part of a range that is worth its levels: what lies beyond is clipped to the ends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tensors.affine import Affine, Float32s, fit

_BINS = 256
_SHARES = np.float32(0.8) ** np.arange(10, dtype=np.float32)
"""The shares of the full range that clipping tries."""


def fit_clipped(low: Float32s, high: Float32s, top: int, sample: Float32s, share: float) -> Affine:
    """The map of that part of each range that makes the squared error least.

    `sample`, (maps, n), is the stated share of the values. It is judged by a histogram, to which
    the ends of the range are added: a sample misses them, and they are what clipping costs.
    """
    full = fit(low, high, top)
    if not sample.size:
        return full
    maps = len(low)
    bins = _BINS if maps == 1 else _BINS // 4
    width = (high.astype(np.float64) - low) / bins
    counts = _histogram(sample, low, width, bins)
    counts[:, [0, -1]] += share
    centres = low[:, None] + (np.arange(bins) + 0.5) * width[:, None]
    # A range above (or below) zero keeps the end that is nearer to zero.
    shares = _SHARES[:, None]
    tried = fit(
        np.where(low < 0, np.minimum(low * shares, high), low).reshape(-1),
        np.where(high > 0, np.maximum(high * shares, low), high).reshape(-1),
        top,
    )
    offset, scale = (part.reshape(len(shares), maps) for part in (tried.offset, tried.scale))
    error = _histogram_error(offset[..., None], scale[..., None], top, centres, counts)
    best = error.argmin(0)
    if not best.any():
        return full
    chosen = best, np.arange(maps)
    return Affine(offset[chosen], scale[chosen], top, clips=True)


def _histogram(
    sample: Float32s, low: Float32s, width: npt.NDArray[np.float64], bins: int
) -> npt.NDArray[np.float64]:
    """(maps, bins) how often `sample` falls between low + i·width and the next."""
    inverse = np.divide(1.0, width, out=np.zeros_like(width), where=width > 0)
    index = ((sample - low[:, None]) * inverse[:, None]).astype(np.intp)
    np.clip(index, 0, bins - 1, out=index)
    index += np.arange(len(low))[:, None] * bins
    counts = np.bincount(index.reshape(-1), minlength=len(low) * bins)
    return counts.reshape(-1, bins).astype(np.float64)


def _histogram_error(
    offset: Float32s,
    scale: Float32s,
    top: int,
    centres: npt.NDArray[np.float64],
    counts: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """(shares, maps) squared error of the bins under maps (shares, maps, 1)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exact_level = np.where(scale > 0, (centres - offset) / scale, 0)
    level = np.clip(np.rint(exact_level), 0, top)
    lost = (level - exact_level) * scale
    # Between levels that are closer than a bin is wide the error is evenly spread.
    inside = (exact_level > -0.5) & (exact_level < top + 0.5)
    fine = scale < 4 * (centres[:, 1:2] - centres[:, :1])
    squared = np.where(inside & fine, scale.astype(np.float64) ** 2 / 12, lost**2)
    constant = np.where(scale > 0, 0, (centres - offset) ** 2)
    error: npt.NDArray[np.float64] = np.einsum("smb,mb->sm", squared + constant, counts)
    return error
