"""The prediction beside the simulator's."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from coordinator.settings import CoordinatorSettings
from ops.errors import SettingsWrong
from ops.planning.model import Cuts, FleetModel
from ops.simulate import rarely_collecting
from ops.simulator.fleet import SimulatedFleet
from ops.simulator.programs import Device
from ops.simulator.stub import BLOCKS
from ops.simulator.world import LIMIT_S

SETTLING = 1
"""Rounds that are not counted: the first has devices join, and fetch what later ones are sent."""


@dataclass(frozen=True, slots=True)
class Check:
    """Seconds of a round, and what the simulator adds when devices fail and switch off.

    Infinite where no round closed.
    """

    predicted_s: float
    simulated_s: float
    with_failures_s: float | None
    """None where nothing of that is in the profile."""

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was simulated; NaN where no round closed."""
        if not math.isfinite(self.simulated_s):
            return math.nan
        return self.predicted_s / self.simulated_s - 1


def check(model: FleetModel, cuts: Cuts, *, rounds: int, seed: int) -> Check:
    """Simulate the fleet with these cuts: always on, then as it is.

    Raises :class:`SettingsWrong` for a network that stubs cannot stand for.
    """
    if model.sizes.blocks > BLOCKS:
        raise SettingsWrong(
            f"--check: the simulator's stubs have {BLOCKS} blocks, the network has "
            f"{model.sizes.blocks}"
        )
    devices = [
        replace(device, cut=int(cut)) for device, cut in zip(model.devices, cuts, strict=True)
    ]
    steady = [replace(device, start_s=0.0, off_s=0.0, failure_s=0.0) for device in devices]
    always_on = model.settings.model_copy(update={"min_devices": len(devices)})
    simulated = _simulate(model, always_on, steady, rounds, seed)
    failing = any(device.off_s or device.failure_s for device in devices)
    return Check(
        model.predict(cuts).round_s,
        simulated,
        _simulate(model, model.settings, devices, rounds, seed) if failing else None,
    )


def _simulate(
    model: FleetModel,
    settings: CoordinatorSettings,
    devices: Sequence[Device],
    rounds: int,
    seed: int,
) -> float:
    with tempfile.TemporaryDirectory(prefix="splitfleet-plan-") as folder:
        changed = {"state_dir": Path(folder), "rounds": rounds + SETTLING, "inference": False}
        fleet = SimulatedFleet(
            settings.model_copy(update=changed),
            devices,
            seed=seed,
            sizes="real",
            server=model.server.cost,
            coordinator_link=model.server.link,
        )
        with rarely_collecting():
            fleet.run(until=lambda: fleet.coordinator.over, limit_s=LIMIT_S)
        history = fleet.checkpoint().history
    counted = [record["seconds"] for record in history[SETTLING:]]
    return fmean(counted) if counted else math.inf
