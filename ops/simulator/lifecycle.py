"""Devices that are switched off at times, and fail at times."""

from __future__ import annotations

from ops.simulator.process import Process
from ops.simulator.programs import Device
from ops.simulator.world import World


class Lifecycle:
    """Starts a device when its time has come, and lets it go off and fail as its profile says.

    Off is a clean shutdown of the machine below it: the connection breaks and the broker sees it.
    A failure is a power cut. Both last; whichever ends last switches the device on again.
    """

    def __init__(self, world: World, process: Process, device: Device) -> None:
        self._world = world
        self._process = process
        self._device = device
        self._rng = world.rng(f"lifecycle/{device.name}")
        self._reasons: list[str] = []

    def begin(self) -> None:
        """Plan everything."""
        device = self._device
        if device.start_s:
            self._reasons.append("not yet")
            self._world.at(device.start_s, lambda: self._on("not yet"))
        else:
            self._process.start()
        if device.off_s:
            first = device.start_s + self._rng.random() * device.on_s
            self._world.at(first, self._switch_off)
        if device.failure_s:
            self._world.at(device.start_s + self._wait(device.failure_s), self._fail)

    def _switch_off(self) -> None:
        if self._off("duty", power_cut=False):
            self._world.after(self._device.off_s, lambda: self._on("duty"))
            self._world.after(self._device.off_s + self._device.on_s, self._switch_off)

    def _fail(self) -> None:
        if self._off("failure", power_cut=True):
            repaired = self._wait(self._device.repair_s)
            self._world.after(repaired, lambda: self._on("failure"))
            self._world.after(repaired + self._wait(self._device.failure_s), self._fail)

    def _wait(self, mean_s: float) -> float:
        return self._rng.expovariate(1 / mean_s)

    def _off(self, reason: str, *, power_cut: bool) -> bool:
        if self._process.over:
            return False
        self._reasons.append(reason)
        if self._process.alive:
            self._process.kill(power_cut=power_cut)
        return True

    def _on(self, reason: str) -> None:
        self._reasons.remove(reason)
        if not self._reasons and not self._process.alive and not self._process.over:
            self._process.start()
