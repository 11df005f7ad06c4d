"""The log levels that somebody chose for a running fleet: ``<state folder>/log-levels.json``.

``splitfleet log-level`` writes it; the coordinator follows it, and tells the devices theirs. It is
whole or not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from broker.envelopes import Envelope, down, to_all
from broker.fields import Name
from broker.logs import LogLevel
from broker.messages import Command
from coordinator.atomic_files import write_file
from coordinator.errors import StoreError

FILE = "log-levels.json"
MOST_DEVICES = 1000
_MOST_BYTES = 1 << 18
_REMEDY = "remove it to go back to the levels of the settings"


Devices = Annotated[dict[Name, LogLevel], Field(max_length=MOST_DEVICES)]


@dataclass(frozen=True, slots=True)
class LogLevels:
    """None is the level of its own settings; ``devices`` counts before ``all_devices``."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # when it is read

    coordinator: LogLevel | None = None
    all_devices: LogLevel | None = None
    devices: Devices = field(default_factory=dict)

    def of(self, device: str) -> LogLevel | None:
        """The level of a device."""
        return self.devices.get(device, self.all_devices)

    def with_device(self, device: str, level: LogLevel | None) -> LogLevels:
        """Another level for one device, or that of all."""
        others = {name: known for name, known in self.devices.items() if name != device}
        if level is not None:
            others[device] = level
        return replace(self, devices=others)

    def for_all_devices(self, level: LogLevel | None) -> LogLevels:
        """Another level for all devices, whatever they had of their own."""
        return replace(self, all_devices=level, devices={})


_FILE = TypeAdapter(LogLevels)


def order(level: LogLevel | None) -> Command:
    """What tells a device its level."""
    return Command(command="log_level", level=level)


def orders(before: LogLevels, now: LogLevels) -> list[Envelope]:
    """What devices have to be told when ``now`` holds instead of ``before``."""
    out: list[Envelope] = []
    if before.all_devices != now.all_devices:
        out.append(to_all(order(now.all_devices)))
        before = LogLevels(all_devices=now.all_devices)
    names = sorted({*before.devices, *now.devices})
    changed = [name for name in names if before.of(name) != now.of(name)]
    return out + [down(name, order(now.of(name))) for name in changed]


def read_log_levels(state_dir: Path) -> LogLevels:
    """What was chosen; nothing if there is no such file. Raises :class:`StoreError`."""
    path = state_dir / FILE
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return LogLevels()
    except OSError as exc:
        raise StoreError(f"{path} cannot be read: {exc.strerror or exc}; {_REMEDY}") from exc
    if len(content) > _MOST_BYTES:
        raise StoreError(f"{path} is too large; {_REMEDY}")
    try:
        return _FILE.validate_json(content)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"{path} is damaged: {where} {first['msg']}; {_REMEDY}") from None


def write_log_levels(state_dir: Path, levels: LogLevels) -> None:
    """Write or replace it, durably. Raises :class:`StoreError`; then it is as before."""
    path = state_dir / FILE
    try:
        write_file(path, _FILE.dump_json(levels) + b"\n")
    except OSError as exc:
        raise StoreError(
            f"cannot write {path}: {exc.strerror or exc}; free space or correct its rights"
        ) from exc
