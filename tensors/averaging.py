"""Averaging what several holders of a network's parts learned.

Each holder brings the state of the parts it holds and a weight (the samples it learned from).
With Σw = 1 over the holders of a tensor:

- parameters, and everything not named below: Σ w·x
- BatchNorm `running_mean`: μ̄ = Σ w·μ, and `running_var`: Σ w·(σ² + (μ − μ̄)²), the moments of the
  pooled data
- `num_batches_tracked`: the start's value plus the sum of every holder's increment

Holders are folded in one at a time by the weighted form of Welford's update (West 1979,
doi:10.1145/359146.359153), so whatever their number, the memory is one float64 copy besides the
start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tensors.errors import AveragingError

Arrays = Mapping[str, npt.NDArray[Any]]

_MEAN = "running_mean"
_VARIANCE = "running_var"
_COUNTER = "num_batches_tracked"


class Averager:
    """A running average of states that share names and shapes with `start`."""

    def __init__(self, start: Arrays) -> None:
        self._start = {name: np.array(value) for name, value in start.items()}
        self._weights = dict.fromkeys(self._start, 0.0)
        self._means: dict[str, npt.NDArray[np.float64]] = {}
        self._counters: dict[str, npt.NDArray[Any]] = {}
        self._variance_of = variance_of(self._start)

    def add(self, state: Arrays, weight: float) -> None:
        """Fold in one holder's state, which may hold some of the names only.

        Raises AveragingError, with nothing folded in, for a name or shape that `start` does not
        have, values or a weight not finite, a weight not above zero, or a BatchNorm's mean without
        its variance or the reverse.
        """
        check_holder(self._start, state, weight)
        variances = set(self._variance_of.values())
        for name, value in state.items():
            if last_part(name) == _COUNTER:
                increment = value - self._start[name]
                self._counters[name] = self._counters.get(name, self._start[name]) + increment
            elif name not in variances:
                variance = self._variance_of.get(name)
                self._fold(name, value, weight, (variance, state[variance]) if variance else None)

    def result(self) -> dict[str, npt.NDArray[Any]]:
        """The average so far, with the names, dtypes and shapes of `start`.

        A name no holder brought keeps its start value. The arrays are the caller's.
        """
        return {name: self._result(name, value) for name, value in self._start.items()}

    def _fold(
        self,
        name: str,
        value: npt.NDArray[Any],
        weight: float,
        variance: tuple[str, npt.NDArray[Any]] | None,
    ) -> None:
        before = self._weights[name]
        total = before + weight
        share = weight / total
        self._weights[name] = total
        if before == 0.0:
            # Taken over as they are, so that one holder's values come out bit for bit.
            self._means[name] = np.array(value, np.float64)
            if variance is not None:
                self._means[variance[0]] = np.array(variance[1], np.float64)
            return
        mean = self._means[name]
        step = value - mean
        if variance is not None:
            spread = self._means[variance[0]]
            spread += (variance[1] - spread) * share + step * step * (share * (before / total))
        step *= share
        mean += step

    def _result(self, name: str, start: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if name in self._counters:
            return self._counters[name].astype(start.dtype)
        if name not in self._means:
            return start.copy()
        mean = self._means[name]
        return (np.rint(mean) if start.dtype.kind in "iub" else mean).astype(start.dtype)


def check_holder(start: Arrays, state: Arrays, weight: float) -> None:
    """Raise AveragingError for a holder that cannot be averaged; see :meth:`Averager.add`."""
    if not (math.isfinite(weight) and weight > 0):
        raise AveragingError(f"weight {weight}: must be finite and above zero")
    for name, value in state.items():
        if name not in start:
            raise AveragingError(f"{name}: not among the tensors being averaged")
        if value.shape != start[name].shape:
            raise AveragingError(f"{name}: shape {value.shape}, must be {start[name].shape}")
        if not np.isfinite(value).all():
            raise AveragingError(f"{name}: not finite; leave this holder out of the average")
    for mean, variance in variance_of(start).items():
        if (mean in state) != (variance in state):
            raise AveragingError(f"{mean} and {variance} must come together")


def variance_of(start: Arrays) -> dict[str, str]:
    """The names of BatchNorm's means, and those of the variances that belong to them."""
    return {
        name: variance
        for name in start
        if last_part(name) == _MEAN and (variance := name.removesuffix(_MEAN) + _VARIANCE) in start
    }


def last_part(name: str) -> str:
    """What a tensor is called in its layer."""
    return name.rpartition(".")[2]
