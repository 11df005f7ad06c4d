"""Classes of devices: the system they boot, what the agent computes with there and may use."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass, replace

from ops.errors import SettingsWrong

MACHINES = ("aarch64", "x86_64")
"""As ``uname -m`` says; there are wheels of torch and onnxruntime for these."""
OLDEST_PYTHON = (3, 11)
TORCH, ONNXRUNTIME = "torch", "onnxruntime"
EXTRAS = {TORCH: "agent", ONNXRUNTIME: "lite"}


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """``memory_max`` is systemd's; ``label`` is the setting ``device_class`` of the agent."""

    label: str
    machine: str
    python: tuple[int, int]
    engine: str
    memory_max: str
    watchdog_s: int
    threads: int | None = None

    @property
    def extra(self) -> str:
        """Of the package, with the engine."""
        return EXTRAS[self.engine]

    @property
    def python_version(self) -> str:
        return ".".join(map(str, self.python))


def _here() -> str:
    machine = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, machine)


TRIXIE = (3, 13)
"""Raspberry Pi OS and Debian 13."""
CLASSES = {
    "pi4": DeviceClass("raspberry-pi-4", "aarch64", TRIXIE, TORCH, "80%", 180),
    "zero2": DeviceClass(
        "raspberry-pi-zero-2", "aarch64", TRIXIE, ONNXRUNTIME, "256M", 300, threads=2
    ),
    "generic": DeviceClass(
        "generic", _here(), (sys.version_info[0], sys.version_info[1]), TORCH, "80%", 180
    ),
}


def device_class(
    name: str,
    *,
    machine: str | None = None,
    python: str | None = None,
    engine: str | None = None,
) -> DeviceClass:
    """A class by its name, changed where the device is another. Raises SettingsWrong."""
    if name not in CLASSES:
        raise SettingsWrong(f"--class {name!r}: there are {', '.join(CLASSES)}")
    found = CLASSES[name]
    if python is not None:
        if not re.fullmatch(r"3\.\d{1,2}", python):
            raise SettingsWrong(f"--python {python!r}: give the device's version, like 3.13")
        found = replace(found, python=(3, int(python.partition(".")[2])))
        if found.python < OLDEST_PYTHON:
            raise SettingsWrong(f"--python {python}: the agent needs 3.11 or newer")
    if engine is not None:
        if engine not in EXTRAS:
            raise SettingsWrong(f"--engine {engine!r}: there are {', '.join(EXTRAS)}")
        found = replace(found, engine=engine)
    found = replace(found, machine=machine or found.machine)
    if found.machine not in MACHINES:
        raise SettingsWrong(
            f"there is no agent for {found.machine}: name the device's with --machine, "
            f"{' or '.join(MACHINES)}"
        )
    return found
