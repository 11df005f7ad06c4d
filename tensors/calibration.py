"""Which threshold an early exit should have, from what it and the server answer for held-out data.

A threshold only decides which samples exit, so a held-out set has one more choice than it has
distinct confidences. All of them are counted, in O(N log N); none is missed by a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from tensors.errors import ExitRuleError
from tensors.exit_rules import ExitRule, Float64s, confidence

Int64s = npt.NDArray[np.int64]

OFFLOAD_ALL = 1.0
"""A threshold that no confidence exceeds."""
ANSWER_ALL = -1.0
"""A threshold that every confidence exceeds; only NaN still offloads."""


class SweepPoint(TypedDict):
    """What a threshold leads to, as shares of all samples."""

    threshold: float
    exit_rate: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A threshold and what it did on the ``samples`` it was chosen on.

    ``reached`` is False where what was wanted cannot be had: then this is the nearest to it.
    """

    threshold: float
    exits: int
    correct: int
    samples: int
    reached: bool

    @property
    def offload_rate(self) -> float:
        """Share of the samples that the server is asked for."""
        return (self.samples - self.exits) / self.samples

    @property
    def accuracy(self) -> float:
        """Of device and server together."""
        return self.correct / self.samples


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Every choice a threshold has on N samples, from offloading all to offloading none.

    ``levels`` (D,) are the distinct confidences, descending. ``thresholds``, ``exits`` and
    ``correct`` (D + 1,) say for each i a threshold above which the first i levels lie, how many
    samples then exit, and how many answers of device and server together are right. A threshold
    between is the highest confidence that offloads, the first `OFFLOAD_ALL`, the last `ANSWER_ALL`.
    """

    levels: Float64s
    thresholds: Float64s
    exits: Int64s
    correct: Int64s
    samples: int

    @property
    def offload_rate(self) -> Float64s:
        """Share of the samples that the server is asked for, (D + 1,)."""
        rate: Float64s = (self.samples - self.exits) / self.samples
        return rate

    @property
    def accuracy(self) -> Float64s:
        """Of device and server together, (D + 1,)."""
        share: Float64s = self.correct / self.samples
        return share

    def index(self, threshold: float) -> int:
        """Which of the choices a threshold is; NaN offloads all."""
        return int(np.count_nonzero(self.levels > threshold))

    def at(self, thresholds: Iterable[float]) -> list[SweepPoint]:
        """What these thresholds lead to."""
        found = ((float(threshold), self.index(threshold)) for threshold in thresholds)
        return [
            SweepPoint(
                threshold=threshold,
                exit_rate=int(self.exits[i]) / self.samples,
                accuracy=int(self.correct[i]) / self.samples,
            )
            for threshold, i in found
        ]

    def choice(self, index: int, *, reached: bool = True) -> Choice:
        """One of the D + 1."""
        return Choice(
            float(self.thresholds[index]),
            int(self.exits[index]),
            int(self.correct[index]),
            self.samples,
            reached,
        )


def top_answers(probabilities: npt.NDArray[Any]) -> Int64s:
    """The most probable class of each row, (N, K) floats to (N,); −1 for a row with NaN or inf."""
    usable = np.isfinite(probabilities).all(axis=1)
    return np.where(usable, np.argmax(probabilities, axis=1), -1).astype(np.int64)


def offload_curve(
    exit_probabilities: npt.NDArray[Any],
    server_answers: npt.ArrayLike,
    labels: npt.ArrayLike,
    rule: ExitRule = "entropy",
) -> Curve:
    """The curve of an exit with (N, K) probabilities and a server that answers (N,) if asked.

    ``labels`` (N,) are the truth, from 0; an answer below 0 is never right. Raises ExitRuleError
    for no samples, lengths that differ, or what :func:`confidence` refuses.
    """
    sure = confidence(exit_probabilities, rule)
    truth, answers = np.asarray(labels), np.asarray(server_answers)
    if not sure.size or truth.shape != sure.shape or answers.shape != sure.shape:
        raise ExitRuleError(
            f"{sure.size} exit answers, {answers.size} server answers, {truth.size} labels: "
            "must be equally many, and some"
        )
    server_right = (answers == truth) & (answers >= 0)
    exit_right = top_answers(exit_probabilities) == truth
    able = np.flatnonzero(~np.isnan(sure))
    order = able[np.argsort(-sure[able])]
    descending = sure[order]
    ends = np.flatnonzero(np.diff(descending, append=-np.inf))  # of samples equally sure
    gained = np.cumsum(exit_right[order].astype(np.int64) - server_right[order])
    levels = descending[ends]
    return Curve(
        levels,
        np.concatenate([[OFFLOAD_ALL], levels[1:], [ANSWER_ALL][: len(levels)]]),
        np.concatenate([[0], ends + 1]),
        server_right.sum(dtype=np.int64) + np.concatenate([[0], gained[ends]]),
        len(sure),
    )


def for_accuracy(curve: Curve, wanted: float, *, level: float | None = None) -> Choice:
    """The fewest offloads with an accuracy of at least ``wanted`` (0 to 1) on these samples.

    With ``level``, say 0.95, a promise beyond these samples: drawn anew, such a set leads with at
    least that probability to a threshold whose accuracy on all data is ``wanted``, or to none. From
    offloading all downwards every choice is tested against "less accurate than wanted" by the exact
    binomial test, up to the first that it cannot refute (fixed-sequence testing: Angelopoulos et
    al., Learn then Test, arXiv 2110.01052).

    Where ``wanted`` is not reached, the most accurate choice, of equals the fewest offloads.
    Raises ExitRuleError for values out of range.
    """
    _check("wanted accuracy", wanted)
    if level is None:
        good = np.flatnonzero(curve.accuracy >= wanted)
    else:
        least = _least_successes(curve.samples, wanted, level)
        good = np.flatnonzero(np.logical_and.accumulate(curve.correct >= least))
    if good.size:
        return curve.choice(int(good[-1]))
    best = np.flatnonzero(curve.correct == curve.correct.max())
    return curve.choice(int(best[-1]), reached=False)


def for_offload_rate(curve: Curve, wanted: float, *, level: float | None = None) -> Choice:
    """The most offloads that are at most a share ``wanted`` (0 to 1) of these samples.

    No label matters, and samples equally sure stay together, so it may be well below ``wanted``.
    With ``level``, say 0.95, a promise beyond these samples: with at least that probability no
    larger share of all data is offloaded (exact binomial test).

    Where ``wanted`` is not reached, everything is answered that has a confidence. Raises
    ExitRuleError for values out of range.
    """
    _check("wanted offload rate", wanted)
    if level is None:
        good = np.flatnonzero(curve.offload_rate <= wanted)
    else:
        good = np.flatnonzero(curve.exits >= _least_successes(curve.samples, 1 - wanted, level))
    if good.size:
        return curve.choice(int(good[0]))
    return curve.choice(len(curve.levels), reached=False)


def share_interval(successes: int, samples: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval for the share of which ``successes`` of ``samples`` were drawn.

    Exact: it holds the share with at least the probability ``level`` (Clopper and Pearson 1934).
    Raises ExitRuleError for counts or a level that cannot be.
    """
    if not 0 <= successes <= samples or samples < 1:
        raise ExitRuleError(f"{successes} of {samples}: must be from 0 to the number of samples")
    _check_level(level)
    tail = (1 - level) / 2
    return (
        _lower_bound(successes, samples, tail),
        1 - _lower_bound(samples - successes, samples, tail),
    )


def _lower_bound(successes: int, samples: int, tail: float) -> float:
    """The share with which as many successes or more have the probability ``tail``."""
    if successes == 0:
        return 0.0
    choices = _log_choices(samples)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _log_tails(choices, middle)[successes] < math.log(tail):
            low = middle
        else:
            high = middle
    return low


def _least_successes(samples: int, share: float, level: float) -> int:
    """The fewest successes that refute, at ``level``, a share of successes below ``share``."""
    _check_level(level)
    if share <= 0:
        return 0
    if share >= 1:
        return samples + 1
    unlikely = _log_tails(_log_choices(samples), share) <= math.log(1 - level)
    return int(np.argmax(unlikely)) if unlikely.any() else samples + 1


def _log_choices(samples: int) -> Float64s:
    """log C(samples, k) for k = 0 … samples."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, samples + 1)))])
    choices: Float64s = logs[-1] - logs - logs[::-1]
    return choices


def _log_tails(log_choices: Float64s, share: float) -> Float64s:
    """log P(X ≥ k) for k = 0 … n, X binomial with n tries and 0 < ``share`` < 1."""
    k = np.arange(len(log_choices))
    terms = log_choices + k * math.log(share) + k[::-1] * math.log1p(-share)
    tails: Float64s = np.logaddexp.accumulate(terms[::-1])[::-1]
    return tails


def _check(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ExitRuleError(f"{name} {share}: must be from 0 to 1")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ExitRuleError(f"level {level}: must be between 0 and 1, e.g. 0.95")
