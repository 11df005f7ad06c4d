"""What is read outside the state machines: the link, the process, the board."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from broker.telemetry import AGENT_DROPS
from broker.topics import Address
from edge_agent.meters import Meters

THERMAL = Path("/sys/class/thermal")
STATUS = Path("/proc/self/statm")
PLAUSIBLE_C = (-60.0, 200.0)
"""A sensor that says anything else is not connected."""


class LinkMeters:
    """A ``LinkObserver`` that counts; told by the event loop, read by the machine's thread."""

    def __init__(self) -> None:
        self._bytes = {"up": 0, "down": 0}
        self._dropped = dict.fromkeys(AGENT_DROPS, 0)

    def sent(self, address: Address, size: int) -> None:
        """Count what went up."""
        del address
        self._bytes["up"] += size

    def received(self, address: Address, size: int) -> None:
        """Count what came down."""
        del address
        self._bytes["down"] += size

    def dropped(self, reason: str, device: str | None) -> None:
        """Count by reason."""
        del device
        self._dropped[reason if reason in self._dropped else "other"] += 1

    def meter(self, meters: Meters) -> None:
        """Enter what was counted."""
        meters.count_all("agent_message_bytes", self._bytes)
        meters.count_all("agent_messages_dropped", self._dropped)


def read_process(meters: Meters) -> None:
    """Enter processor time and memory of this process, and the board's temperature."""
    meters.count("agent_cpu_seconds", time.process_time())
    memory = resident_bytes()
    if memory is not None:
        meters.gauge("agent_memory_bytes", memory)
    temperature = hottest(THERMAL.glob("thermal_zone*/temp"))
    if temperature is not None:
        meters.gauge("temperature_celsius", temperature)


def resident_bytes(statm: Path = STATUS) -> int | None:
    """Resident memory of this process; None where Linux does not say."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def hottest(sensors: Iterable[Path]) -> float | None:
    """The highest plausible reading of these files, °C; they say thousandths. None without one."""
    found = []
    for sensor in sensors:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(sensor.read_text()) / 1000)
    low, high = PLAUSIBLE_C
    return max((reading for reading in found if low < reading < high), default=None)
