"""Averages of holders of which some may be liars: trimmed mean or median of each coordinate.

The rules are those of ``tensors.averaging`` with another centre (``tensors.robust``; Yin et al.
2018, arXiv 1803.01498):

- parameters: the centre of the holders' values;
- BatchNorm ``running_mean``: their centre μ̃, ``running_var``: the centre of σ² + (μ − μ̃)²;
- ``num_batches_tracked``: the start's value and, times the number of holders, the centre of their
  increments.

A holder weighs its samples, but no device more than :data:`MOST` times the median of the holders:
how many images it has is its own claim, and half of all weight would decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from coordinator.defences.spool import Spool
from tensors.averaging import check_holder, last_part
from tensors.robust import MEDIAN, trimmed_mean

Arrays = Mapping[str, npt.NDArray[Any]]
AggregationRule = Literal["mean", "trimmed-mean", "median"]

MOST = 2.0
CHUNK_VALUES = 1 << 21
"""So many values of all holders are looked at together."""


@dataclass(frozen=True, slots=True)
class RobustRule:
    """``trim`` of the weight is cut off at either end; contributions wait in ``folder``.

    Those of a round may take ``limit`` bytes there.
    """

    trim: float
    folder: Path
    limit: int


def robust_rule(rule: AggregationRule, trim: float, folder: Path, limit: int) -> RobustRule | None:
    """What ``rule`` needs; None for the mean, which keeps nothing."""
    if rule == "mean":
        return None
    return RobustRule(MEDIAN if rule == "median" else trim, folder, limit)


class RobustAverager:
    """As ``tensors.averaging.Averager``, with the holders' states on disk until :meth:`result`."""

    def __init__(self, start: Arrays, rule: RobustRule) -> None:
        self._start = start
        self._trim = rule.trim
        self._spool = Spool(rule.folder, rule.limit)
        self._holders: dict[str, list[tuple[float, bool]]] = {}

    def add(self, state: Arrays, weight: float, *, shared: bool = False) -> None:
        """One holder, which may hold some of the names only; ``shared`` if it is no one device's.

        Raises ``AveragingError`` as ``Averager.add``, and where there is no room for it;
        ``StoreError`` where the disk is full.
        """
        check_holder(self._start, state, weight)
        typed = {name: values.astype(self._start[name].dtype) for name, values in state.items()}
        self._spool.write(typed)
        for name in state:
            self._holders.setdefault(name, []).append((weight, shared))

    def result(self) -> dict[str, npt.NDArray[Any]]:
        """The centre, once; a name that no holder brought keeps its start value."""
        found = {
            name: self._centre(name, start) if name in self._holders else start.copy()
            for name, start in self._start.items()
        }
        self._spool.close()
        return found

    def _centre(self, name: str, start: npt.NDArray[Any]) -> npt.NDArray[Any]:
        weights = self._weights(name)
        reduce = self._reducer(name, start, weights)
        step = max(1, CHUNK_VALUES // len(weights))
        parts = [
            reduce(low, min(low + step, start.size)) for low in range(0, start.size, step)
        ] or [np.empty(0)]
        centre = np.concatenate(parts).reshape(start.shape)
        return (np.rint(centre) if start.dtype.kind in "iub" else centre).astype(start.dtype)

    def _weights(self, name: str) -> npt.NDArray[np.float64]:
        holders = self._holders[name]
        weights = np.array([weight for weight, _ in holders])
        own = ~np.array([shared for _, shared in holders])
        if own.any():
            weights[own] = np.minimum(weights[own], MOST * np.median(weights[own]))
        return weights

    def _reducer(
        self, name: str, start: npt.NDArray[Any], weights: npt.NDArray[np.float64]
    ) -> Callable[[int, int], npt.NDArray[np.float64]]:
        def values(low: int, high: int) -> npt.NDArray[np.float64]:
            return trimmed_mean(self._spool.read(name, low, high), weights, self._trim)

        def variance(low: int, high: int) -> npt.NDArray[np.float64]:
            means = self._spool.read(name.removesuffix("var") + "mean", low, high)
            apart = means.astype(np.float64) - trimmed_mean(means, weights, self._trim)
            return trimmed_mean(self._spool.read(name, low, high) + apart**2, weights, self._trim)

        def counter(low: int, high: int) -> npt.NDArray[np.float64]:
            before = start.reshape(-1)[low:high]
            increments = self._spool.read(name, low, high) - before
            alike = np.ones(len(increments))
            return before + len(increments) * trimmed_mean(increments, alike, self._trim)

        kinds = {"running_var": variance, "num_batches_tracked": counter}
        return kinds.get(last_part(name), values)
