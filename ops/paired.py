"""Differences of paired measurements: mean, 95 % interval, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# fmt: off
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
"""Quantile 0.975 of Student's t with 1 … 30 degrees of freedom."""

NOT_RESOLVED = "not resolved"


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of paired differences; the 95 % interval is ``mean ± half``, None from one pair."""

    mean: float
    half: float | None

    def verdict(self, margin: float) -> str:
        """Whether what was compared is at most ``margin`` below the other.

        ``within MARGIN`` if the whole interval is above ``−margin``, ``worse`` if the whole
        interval is below. ``not resolved`` if it is on both sides, and also if it is wider than
        ``± margin``, wherever it lies.
        """
        if self.half is None or self.half > margin:
            return NOT_RESOLVED
        if self.mean - self.half >= -margin:
            return f"within {margin:g}"
        return "worse" if self.mean + self.half < -margin else NOT_RESOLVED


def difference(pairs: Sequence[float]) -> Difference:
    """The mean of one difference per pair, and Student's interval for it.

    With more than 31 pairs the interval is a little too wide: that of 31.
    """
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean, None)
    t = _T_975[min(len(pairs) - 1, len(_T_975)) - 1]
    return Difference(mean, t * statistics.stdev(pairs) / math.sqrt(len(pairs)))
