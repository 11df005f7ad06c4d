"""Statuses of a fleet, made up."""

from __future__ import annotations

from typing import Any

from coordinator.health import Health
from coordinator.status import ClosedRound, DeviceStatus, FleetStatus, RoundStatus, ServingStatus


def make_device(name: str = "cam-1", **changes: Any) -> DeviceStatus:
    fields: dict[str, Any] = {
        "name": name,
        "device_class": "generic",
        "state": "training",
        "cut": 2,
        "heard_s": 3.2,
        "software": "splitfleet 0.1.0",
        "rounds": 2,
        "samples": 9000,
        "open_samples": 320,
        "credits": 4,
        "share": 1.0,
        "exit_loss": 0.512,
        "exit_accuracy": 0.81,
        "predictions": {"exit": 60, "server": 30, "fallback": 10},
        "bytes_up": 12_000_000,
        "bytes_down": 3_400_000,
    }
    return DeviceStatus(**(fields | changes))


def make_round(**changes: Any) -> RoundStatus:
    fields: dict[str, Any] = {
        "number": 3,
        "attempt": 0,
        "version": 2,
        "seconds": 8.0,
        "deadline_s": 592.0,
        "extended": False,
        "participants": 2,
        "finished": 1,
        "batches": 120,
        "quota": 400,
        "loss": {"2": 1.25, "5": 1.5},
    }
    return RoundStatus(**(fields | changes))


def make_status(*devices: DeviceStatus, **changes: Any) -> FleetStatus:
    fields: dict[str, Any] = {
        "time": "2026-11-21T20:15:03.042Z",
        "uptime_s": 100.0,
        "boot": "boot",
        "fleet": "demo",
        "run": "20261121-201503-1a74",
        "phase": "training",
        "version": 2,
        "rounds": 6,
        "health": Health(ok=True, broker_connected=True),
        "round": make_round(),
        "closed": ClosedRound(
            number=2,
            version=2,
            seconds=41.0,
            samples=18_000,
            server_accuracy=0.801,
            exit_accuracy={"2": 0.7, "5": 0.75},
        ),
        "serving": ServingStatus(version=2, pinned=False, waiting_images=0),
        "bytes": {"down/gradient": 3_400_000, "up/activation": 12_000_000},
        "predictions": {"exit": 60, "server": 30, "fallback": 10},
        "online": sum(device.state != "offline" for device in devices),
        "known": len(devices),
        "states": {},
        "devices": list(devices),
        "left_out": 0,
    }
    return FleetStatus(**(fields | changes))
