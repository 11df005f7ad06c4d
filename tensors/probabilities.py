"""How far probabilities can be believed, and what makes them better: temperature and ensemble.

Rows of probabilities with NaN or infinities are no answers: what is measured or fitted here leaves
them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tensors.errors import ExitRuleError
from tensors.exit_rules import Float64s, softmax

BINS = 15
TEMPERATURES = (0.05, 20.0)
"""The range that is searched: exits that are always right, or by chance, have no best one."""

_HALVINGS = 60


def calibration_error(
    probabilities: npt.NDArray[Any],
    labels: npt.ArrayLike,
    *,
    bins: int = BINS,
    equal_mass: bool = False,
) -> float:
    """Expected calibration error of (N, K) probabilities against labels (N,): 0 to 1, 0 is best.

    ECE = Σ_m |B_m| / N · |acc(B_m) − conf(B_m)|: samples are put into ``bins`` by the probability p
    of their most probable class; acc(B) is the share of bin B whose class is right, conf(B) its
    mean p. Bin m holds (m − 1)/M < p ≤ m/M (Guo et al. 2017, arXiv 1706.04599); with ``equal_mass``
    bins hold equally many samples, but equal p stay together (Nguyen and O'Connor 2015).

    NaN if no row is usable. Raises ExitRuleError for shapes, labels or bins that cannot be.
    """
    p, truth = _usable(labels, probabilities)
    if bins < 1:
        raise ExitRuleError(f"{bins} bins: must be at least 1")
    if not len(truth):
        return float("nan")
    sure = p.max(axis=1)
    if equal_mass:
        ranks = -(-len(sure) * np.arange(1, bins) // bins)
        edges = np.sort(sure)[np.maximum(ranks, 1) - 1]
    else:
        edges = np.arange(1, bins) / bins
    right = p.argmax(axis=1) == truth
    gaps = np.bincount(np.searchsorted(edges, sure), weights=right - sure)
    return float(np.abs(gaps).sum() / len(sure))


def fit_temperature(probabilities: npt.NDArray[Any], labels: npt.ArrayLike) -> float:
    """The T for which softmax(log p / T) has the least cross entropy on labels (N,).

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599): one number that makes an exit surer
    (T < 1) or less sure (T > 1) and leaves every answer as it is. Cross entropy is convex in 1/T;
    solved by bisection of its slope within `TEMPERATURES`. 1 if no row is usable.

    Raises ExitRuleError for shapes or labels that cannot be.
    """
    p, truth = _usable(labels, probabilities)
    if not len(truth):
        return 1.0
    logs = _logs(p)
    own = logs[np.arange(len(truth)), truth]

    def slope(inverse: float) -> float:
        return float(((softmax(inverse * logs) * logs).sum(axis=1) - own).mean())

    coldest, hottest = TEMPERATURES
    return 1 / _root(slope, 1 / hottest, 1 / coldest)


def apply_temperature(probabilities: npt.NDArray[Any], temperature: float) -> Float64s:
    """softmax(log p / T) of each row of (N, K). Raises ExitRuleError unless T > 0."""
    if not temperature > 0:
        raise ExitRuleError(f"temperature {temperature}: must be above 0")
    return softmax(_logs(np.asarray(probabilities, np.float64)) / temperature)


def fit_ensemble(
    exit_probabilities: npt.NDArray[Any],
    server_probabilities: npt.NDArray[Any],
    labels: npt.ArrayLike,
) -> float:
    """The exit's weight w, 0 to 1, in `ensemble` that has the least cross entropy on labels (N,).

    Convex in w; solved by bisection of its slope. 0 if no row is usable, or w makes no difference.
    Raises ExitRuleError for shapes or labels that cannot be.
    """
    p, q, truth = _usable(labels, exit_probabilities, server_probabilities)
    rows = np.arange(len(truth))
    exit_own, server_own = p[rows, truth], q[rows, truth]
    possible = exit_own + server_own > 0  # else the loss is infinite for every weight
    exit_own, server_own = exit_own[possible], server_own[possible]

    def slope(weight: float) -> float:
        with np.errstate(divide="ignore"):
            mixed = weight * exit_own + (1 - weight) * server_own
            return float(((server_own - exit_own) / mixed).sum())

    return _root(slope, 0.0, 1.0)


def ensemble(
    exit_probabilities: npt.NDArray[Any], server_probabilities: npt.NDArray[Any], weight: float
) -> Float64s:
    """w · exit + (1 − w) · server, (N, K) each; where one of two rows is no answer, the other.

    The mean of what several exits answer is what DepthFL (Kim et al. 2023) answers with. Raises
    ExitRuleError for shapes that differ or a weight out of range.
    """
    p, q = (np.asarray(x, np.float64) for x in (exit_probabilities, server_probabilities))
    if p.ndim != 2 or p.shape != q.shape:
        raise ExitRuleError(f"probabilities of shapes {p.shape} and {q.shape}: must be (N, K) both")
    if not 0 <= weight <= 1:
        raise ExitRuleError(f"weight {weight} of the exit: must be from 0 to 1")
    of_exit, of_server = (np.isfinite(x).all(axis=1, keepdims=True) for x in (p, q))
    one = np.where(of_server, q, p)
    return np.where(of_exit & of_server, weight * p + (1 - weight) * q, one)


def _usable(labels: npt.ArrayLike, *probabilities: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Each (N, K) as float64, then the labels, where all rows are finite."""
    truth = np.asarray(labels)
    arrays = [np.asarray(p, np.float64) for p in probabilities]
    for p in arrays:
        if p.ndim != 2 or p.shape[1] < 2 or p.shape != arrays[0].shape or len(p) != truth.size:
            raise ExitRuleError(
                f"probabilities of shape {p.shape} for {truth.size} labels: must be (N, K) for N "
                "labels, with K >= 2, and alike"
            )
    classes = arrays[0].shape[1]
    if truth.size and not (truth.ndim == 1 and truth.min() >= 0 and truth.max() < classes):
        raise ExitRuleError(f"labels must be one row of classes from 0 to {classes - 1}")
    finite = np.logical_and.reduce([np.isfinite(p).all(axis=1) for p in arrays])
    return [*(p[finite] for p in arrays), truth.astype(np.int64)[finite]]


def _logs(p: Float64s) -> Float64s:
    logs: Float64s = np.log(np.maximum(p, np.finfo(np.float64).tiny))
    return logs


def _root(slope: Callable[[float], float], low: float, high: float) -> float:
    """Where a slope that never falls turns positive, between ``low`` and ``high``."""
    if slope(low) >= 0:
        return low
    if slope(high) <= 0:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
