"""``splitfleet log-level``: how much the coordinator and the devices log, while they run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from broker.errors import TopicError
from broker.logs import LogLevel
from broker.topics import check_device
from coordinator.log_levels import MOST_DEVICES, LogLevels, read_log_levels, write_log_levels
from ops.errors import SettingsWrong

DEFAULT = "default"
_SETTINGS = "as its settings say"


def choose(state_dir: Path, text: str, *, device: str | None, all_devices: bool) -> None:
    """Choose a level for the coordinator, for one device, or for all of them.

    Raises :class:`SettingsWrong`, ``StoreError``.
    """
    level = _level(text)
    if device is not None and all_devices:
        raise SettingsWrong("--device NAME or --all-devices, one of them")
    levels = _read(state_dir)
    if all_devices:
        levels = levels.for_all_devices(level)
    elif device is not None:
        levels = levels.with_device(_device(device), level)
    else:
        levels = replace(levels, coordinator=level)
    if len(levels.devices) > MOST_DEVICES:
        raise SettingsWrong(
            f"{MOST_DEVICES} devices have a level of their own already: choose one for "
            "--all-devices, or take some back with splitfleet log-level default --device NAME"
        )
    write_log_levels(state_dir, levels)
    _print(levels)


def show(state_dir: Path) -> None:
    """Print what was chosen. Raises :class:`SettingsWrong`, ``StoreError``."""
    _print(_read(state_dir))


def _read(state_dir: Path) -> LogLevels:
    if not state_dir.is_dir():
        raise SettingsWrong(
            f"{state_dir} is no folder: give the --state-dir of the coordinator, on its machine"
        )
    return read_log_levels(state_dir)


def _print(levels: LogLevels) -> None:
    print(f"coordinator: {levels.coordinator or _SETTINGS}")
    print(f"devices: {levels.all_devices or _SETTINGS}")
    for name, level in sorted(levels.devices.items()):
        print(f"device {name}: {level}")


def _level(text: str) -> LogLevel | None:
    if text == DEFAULT:
        return None
    allowed = get_args(LogLevel)
    if text not in allowed:
        raise SettingsWrong(f"{text!r} is no level: give {', '.join(allowed)}, or {DEFAULT}")
    return cast("LogLevel", text)


def _device(name: str) -> str:
    try:
        return check_device(name)
    except TopicError as exc:
        raise SettingsWrong(f"--device: {exc}") from exc
