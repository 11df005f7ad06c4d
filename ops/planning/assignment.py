"""Which cut layer for whom, so that rounds are short.

Alone, a device is best off at the cut where it needs least. At a shared server the choice is
coupled: what a device does not compute, the server has to. So: for a bound on what devices need
alone (bisected), everybody takes the cut within it that leaves the server least to do; the bound
that makes the shortest round is kept, and then single devices are moved, those that end last and
those that load the server most, as long as that helps (as list scheduling with a bound on the
makespan, Lenstra, Shmoys, Tardos 1990, followed by local search). In the end devices with time to
spare go as deep as that allows: deeper exits are better, and the server has less to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ops.errors import SettingsWrong
from ops.planning.model import Cuts, FleetModel, Prediction

BOUNDS = 12
MOVES = 400
"""Predictions that the local search may ask for."""
LOOKED_AT = 8
"""Units of each kind that a step of it looks at."""
BETTER = 1e-3
"""A move has to make a round shorter by this share."""

Units = list[NDArray[np.int64]]
"""Devices that have to have the same cut."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator wants.

    ``slack``: how much longer a round may be than the shortest, for deeper cuts. ``month_bytes`` of
    a device, both ways together, at ``rounds_per_month``.
    """

    first_cut: int = 1
    last_cut: int = 1024
    slack: float = 0.05
    month_bytes: float | None = None
    rounds_per_month: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A cut for each device, and how many predictions it took to find them."""

    prediction: Prediction
    asked: int

    @property
    def cuts(self) -> Cuts:
        """(N,)."""
        return self.prediction.cuts


def each_alone(devices: int) -> Units:
    """Every device may have a cut of its own."""
    return [np.array([device]) for device in range(devices)]


def by_group(groups: Sequence[int]) -> Units:
    """Devices of a group have the same cut."""
    numbers = np.asarray(groups)
    return [np.flatnonzero(numbers == group) for group in sorted(set(groups))]


def allowed(model: FleetModel, units: Units, limits: Limits) -> list[list[int]]:
    """The cuts that each unit may have.

    Raises :class:`SettingsWrong` if there is none for some device, naming what is in the way.
    """
    within = (model.cuts >= limits.first_cut) & (model.cuts <= limits.last_cut)
    if not within.any():
        raise SettingsWrong(
            f"--cuts {limits.first_cut}-{limits.last_cut}: the network has cuts 1 to "
            f"{model.cuts[-1]}"
        )
    budget = model.budget_mb[:, None]
    fits = within & (model.memory_mb <= budget)
    if len(short := np.flatnonzero(~fits.any(axis=1))):
        device, least = int(short[0]), float(model.memory_mb[within].min())
        raise SettingsWrong(
            f"memory: no allowed cut fits {len(short)} of {len(model.devices)} devices: "
            f"{model.devices[device].name} may use {float(budget[device, 0]):.0f} MiB for training "
            "(half of its memory_mb, or memory_budget_mb), the least that is needed is "
            f"{least:.0f} MiB: lower --width, batch_size or window, or allow shallower cuts"
        )
    if limits.month_bytes is not None:
        month = (model.up_bytes + model.down_bytes) * limits.rounds_per_month
        cheap = fits & (month <= limits.month_bytes)
        if len(short := np.flatnonzero(~cheap.any(axis=1))):
            least = float(np.where(fits, month, np.inf)[short].min(axis=1).max())
            raise SettingsWrong(
                f"--month-gb {limits.month_bytes / 1e9:g}: {len(short)} of {len(model.devices)} "
                f"devices need more, up to {least / 1e9:.3g} GB at their cheapest cut: fewer "
                "--rounds-per-day, fewer batches_per_round, or a codec with fewer levels"
            )
        fits = cheap
    choices = []
    for unit in units:
        together = fits[unit].all(axis=0)
        if not together.any():
            raise SettingsWrong(
                f"no cut fits all {len(unit)} devices of a class: choose for each with --by device"
            )
        choices.append([int(cut) for cut in model.cuts[together]])
    return choices


def assign(model: FleetModel, units: Units, limits: Limits) -> Found:
    """Cuts that make rounds short, within the limits.

    Raises :class:`SettingsWrong` if some device fits no cut.
    """
    return _Search(model, units, allowed(model, units, limits)).run(limits.slack)


class _Search:
    def __init__(self, model: FleetModel, units: Units, choices: list[list[int]]) -> None:
        self._model = model
        self._units = units
        self._choices = choices
        self._asked = 0
        self._known: dict[bytes, Prediction] = {}
        at = [np.array(cuts) - 1 for cuts in choices]
        alone, server = model.alone_s, model.server_s
        self._alone = [alone[u][:, c].max(axis=0) for u, c in zip(units, at, strict=True)]
        self._load = [server[u][:, c].sum(axis=0) for u, c in zip(units, at, strict=True)]

    def run(self, slack: float) -> Found:
        best = self._improve(self._bounded())
        best = self._deepen(best, (1 + slack) * best.slowest_s)
        return Found(best, self._asked)

    def _predict(self, picks: Sequence[int]) -> Prediction:
        cuts = np.empty(len(self._model.devices), np.int64)
        for unit, choices, pick in zip(self._units, self._choices, picks, strict=True):
            cuts[unit] = choices[pick]
        key = cuts.tobytes()
        if key not in self._known:
            self._asked += 1
            self._known[key] = self._model.predict(cuts)
        return self._known[key]

    def _picks(self, prediction: Prediction) -> list[int]:
        return [
            choices.index(int(prediction.cuts[unit[0]]))
            for unit, choices in zip(self._units, self._choices, strict=True)
        ]

    def _within(self, bound: float) -> list[int]:
        """For each unit the least load within the bound, else the cut where it is fastest."""
        picks = []
        for alone, load in zip(self._alone, self._load, strict=True):
            fits = np.flatnonzero(alone <= bound)
            if len(fits):
                picks.append(int(fits[np.lexsort((-fits, load[fits]))[0]]))
            else:
                picks.append(int(alone.argmin()))
        return picks

    def _bounded(self) -> Prediction:
        """The best over bounds between what the slowest needs at least and what all need."""
        low = max(float(alone.min()) for alone in self._alone)
        best = self._predict([int(alone.argmin()) for alone in self._alone])
        high = max(low, best.slowest_s)
        for share in np.linspace(0, 1, BOUNDS):
            tried = self._predict(self._within(low + float(share) * (high - low)))
            best = min(best, tried, key=_seconds)
        return best

    def _improve(self, best: Prediction) -> Prediction:
        """Move single units while that helps: those that end last, and those that load most."""
        end = self._asked + MOVES
        while self._asked < end:
            picks = self._picks(best)
            last = [float(best.device_s[unit].max()) for unit in self._units]
            load = [loads[pick] for loads, pick in zip(self._load, picks, strict=True)]
            order = [*np.argsort(last)[::-1][:LOOKED_AT], *np.argsort(load)[::-1][:LOOKED_AT]]
            better = None
            for unit in dict.fromkeys(int(index) for index in order):
                for pick in range(len(self._choices[unit])):
                    tried = self._predict([*picks[:unit], pick, *picks[unit + 1 :]])
                    if _seconds(tried) < (1 - BETTER) * _seconds(better or best):
                        better = tried
                if self._asked >= end:
                    break
            if better is None:
                break
            best = better
        return best

    def _deepen(self, best: Prediction, bound: float) -> Prediction:
        """The deepest cuts within a bound on the round, from the generous to the careful."""
        picks = self._picks(best)
        for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5):
            deeper = [
                max([pick, *np.flatnonzero(alone <= share * bound).tolist()])
                for pick, alone in zip(picks, self._alone, strict=True)
            ]
            tried = self._predict(deeper)
            if _seconds(tried) <= bound:
                return tried
        return best


def _seconds(prediction: Prediction) -> float:
    return prediction.slowest_s
