"""Centres that a minority of odd values cannot move far, for each coordinate by itself.

Sources: coordinate-wise trimmed mean and median, Yin, Chen, Ramchandran, Bartlett 2018, arXiv
1803.01498; here with weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MEDIAN = 0.5
"""The share trimmed from either end of which only the middle is left."""


def trimmed_mean(values: npt.NDArray[Any], weights: Floats, trim: float) -> Floats:
    """The weighted mean of what is left when ``trim`` of the weight is cut off at either end.

    ``values`` (n, …) are those of n holders, finite; ``weights`` (n,) are above zero. For each
    coordinate holders are ordered by value, and of those at the ends a part counts: with equal
    weights, 10 holders and ``trim`` = 0.25, five count wholly and two by half. 0 is the weighted
    mean, :data:`MEDIAN` the weighted median (the middle of both, where two hold half each).

    Less than ``trim`` of the weight, wherever its values are, cannot bring the result outside the
    range of the other values.
    """
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, 0).astype(np.float64)
    mass = weights[order]
    above = np.cumsum(mass, axis=0)
    total = above[-1]
    if trim >= MEDIAN:
        return _middle(ordered, above, total)
    left = np.minimum(above, (1 - trim) * total) - np.maximum(above - mass, trim * total)
    np.maximum(left, 0.0, out=left)
    result: Floats = (left * ordered).sum(0) / left.sum(0)
    return result


def _middle(ordered: Floats, above: Floats, total: Floats) -> Floats:
    half, rounding = total / 2, 1e-9 * total
    low = (above < half - rounding).sum(0)[None]
    high = (above <= half + rounding).sum(0)[None]
    ends = [np.take_along_axis(ordered, index, 0)[0] for index in (low, high)]
    middle: Floats = (ends[0] + ends[1]) / 2
    return middle
