"""Rate control: as many levels as a budget of bytes allows, tensor by tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tensors.codecs import Codec
from tensors.errors import CodecError
from tensors.format import Encoded

if TYPE_CHECKING:
    import torch

GRID = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of levels that are chosen from."""
TOLERANCE = 0.05
"""An encoded tensor may exceed its budget by this share."""

_LEARN = 0.5
_FORGET = 1 / 32


@dataclass(frozen=True, slots=True)
class Rated:
    """An encoded tensor, and the number of levels that it was encoded with; None for floats."""

    data: Encoded
    levels: int | None


class RateController:
    """Encodes a stream of similar tensors, each within a budget.

    The levels of ``codec`` are the most it uses; a budget only makes them fewer. It takes the most
    of the grid that fit by ``Codec.bytes_of``, corrected by what that estimate was off by before
    (spatial structure that zstd finds, parts of a byte that it does not). A tensor that turns out
    larger than its budget by more than ``TOLERANCE`` is encoded again with fewer levels, so
    nothing exceeds it by more than that unless even the fewest levels do. A larger budget never
    gives fewer levels. Not safe to share between threads.

    Raises CodecError for a codec without levels.
    """

    def __init__(self, codec: Codec) -> None:
        if codec.levels is None:
            raise CodecError(
                f"{codec.name} has no levels to choose from: rate control needs int2 … int8 or "
                "levels3 … 256"
            )
        choices = (*(n for n in GRID if n < codec.levels), codec.levels)
        self._codecs = [codec.with_levels(n) for n in choices]
        self._at = len(choices) - 1
        self._factors: dict[int, float] = {}

    def encode(
        self,
        x: npt.NDArray[Any] | torch.Tensor,
        budget: float,
        *,
        keep: npt.NDArray[np.bool_] | None = None,
        seed: int = 0,
    ) -> Rated:
        """Encode ``x`` in ``budget`` bytes if that can be; otherwise as ``Codec.encode``.

        Raises CodecError for a budget that is NaN, and as ``Codec.encode`` does.
        """
        if math.isnan(budget):
            raise CodecError(
                "a budget of NaN bytes: give a number, infinity for as many as it takes"
            )
        sketch = self._codecs[0].sketch(x, keep=keep)
        estimate = functools.cache(lambda at: self._codecs[at].bytes_of(sketch))
        highest = len(self._codecs) - 1
        while True:
            self._at = self._pick(estimate, budget, highest)
            codec = self._codecs[self._at]
            data = codec.encode(x, keep=keep, seed=seed)
            self._learn(len(data) / estimate(self._at))
            if self._at == 0 or len(data) <= budget * (1 + TOLERANCE):
                return Rated(data, codec.levels)
            highest = self._at - 1

    def _pick(self, estimate: Callable[[int], int], budget: float, highest: int) -> int:
        def fits(at: int) -> bool:
            return self._factor(at) * estimate(at) <= budget

        at = min(self._at, highest)
        if fits(at):
            while at < highest and fits(at + 1):
                at += 1
        else:
            while at > 0 and not fits(at):
                at -= 1
        return at

    def _factor(self, at: int) -> float:
        """Actual by estimated bytes. An estimate that never was tried is not made larger."""
        if at in self._factors:
            return self._factors[at]
        nearest = min(self._factors, key=lambda tried: abs(tried - at), default=None)
        return 1.0 if nearest is None else min(1.0, self._factors[nearest])

    def _learn(self, off: float) -> None:
        known = self._factors.get(self._at, off)
        self._factors[self._at] = factor = known + _LEARN * (off - known)
        # What was too large once is tried again after a while: the tensors may have changed.
        for other in self._factors.keys() - {self._at}:
            self._factors[other] += _FORGET * min(0.0, min(1.0, factor) - self._factors[other])
