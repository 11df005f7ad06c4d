"""Rates of a fleet: the differences of two of its statuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.status import DeviceStatus, FleetStatus


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """Per second; None where it cannot be known."""

    samples: float | None = None
    up: float | None = None
    down: float | None = None

    @property
    def bytes(self) -> float | None:
        """Both ways."""
        return None if self.up is None or self.down is None else self.up + self.down


@dataclass(frozen=True, slots=True)
class Rates:
    """By device, bytes by ``direction/role``, images answered by whom; all per second."""

    devices: Mapping[str, DeviceRates] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    predictions: Mapping[str, float] = field(default_factory=dict)

    def of(self, device: str) -> DeviceRates:
        """Those of a device, as far as they are known."""
        return self.devices.get(device, DeviceRates())


class Meter:
    """Makes rates of statuses as they come, each since the one before.

    While a round is being merged its samples are neither here nor there: those rates stay.
    """

    def __init__(self) -> None:
        self._before: FleetStatus | None = None
        self._settled: FleetStatus | None = None
        self._samples: dict[str, float | None] = {}

    def update(self, now: FleetStatus) -> Rates:
        """The rates up to now; empty with the first status of a coordinator's life."""
        before, self._before = self._before, now
        if before is None or not _comparable(before, now):
            self._settled, self._samples = now, {}
            return Rates()
        if not (now.phase == "training" and now.round is None):
            self._count_samples(now)
        seconds = now.uptime_s - before.uptime_s
        known = {device.name: device for device in before.devices}
        devices = {}
        for device in now.devices:
            up = down = None
            if (earlier := known.get(device.name)) is not None:
                up = _rate(earlier.bytes_up, device.bytes_up, seconds)
                down = _rate(earlier.bytes_down, device.bytes_down, seconds)
            devices[device.name] = DeviceRates(self._samples.get(device.name), up, down)
        return Rates(
            devices,
            _rates(before.bytes, now.bytes, seconds),
            _rates(before.predictions, now.predictions, seconds),
        )

    def _count_samples(self, now: FleetStatus) -> None:
        before, self._settled = self._settled, now
        if before is None:
            return
        seconds = now.uptime_s - before.uptime_s
        known = {device.name: _samples(device) for device in before.devices}
        self._samples = {
            device.name: _rate(known.get(device.name), _samples(device), seconds)
            for device in now.devices
        }


def _rates(before: Mapping[str, int], now: Mapping[str, int], seconds: float) -> dict[str, float]:
    return {key: _rate(before.get(key, 0), count, seconds) or 0.0 for key, count in now.items()}


def _comparable(before: FleetStatus, now: FleetStatus) -> bool:
    return before.boot == now.boot and now.uptime_s > before.uptime_s


def _samples(device: DeviceStatus) -> int:
    return device.samples + device.open_samples


def _rate(before: int | None, now: int, seconds: float) -> float | None:
    if before is None or now < before or seconds <= 0:
        return None
    return (now - before) / seconds
