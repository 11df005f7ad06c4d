"""Energy as an estimate: CPU seconds times the power of a core, bytes times the energy of a radio.

Nothing is measured here. The figures come from ``energy.toml``, each with its source, or from a
file of the user's own; docs/cost.md says what the estimate leaves out.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ops.errors import SettingsWrong

Entry = TypeVar("Entry", bound="DeviceClass | Radio")


class DeviceClass(BaseModel):
    """A board: what it draws doing nothing and with all its cores busy, in watts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    idle_watts: float = Field(ge=0)
    load_watts: float = Field(gt=0)
    cores: int = Field(ge=1)
    source: str = Field(min_length=1)

    @property
    def watts_per_core(self) -> float:
        """What one busy core adds to an idle board."""
        return (self.load_watts - self.idle_watts) / self.cores


class Radio(BaseModel):
    """A radio: what a byte of payload costs on its device, in joules."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    joules_per_byte: float = Field(ge=0)
    source: str = Field(min_length=1)


class EnergyTable(BaseModel):
    """Device classes and radios by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: dict[str, DeviceClass] = Field(default_factory=dict)
    radio: dict[str, Radio] = Field(default_factory=dict)

    def rates(self, device: str, radio: str, *, slower: float = 1.0) -> EnergyRates:
        """Of one class and one radio, for CPU seconds that take the class ``slower`` times as long.

        Raises :class:`SettingsWrong` for a name that is not here or a factor that is none above 0.
        """
        if not 0 < slower < math.inf:
            raise SettingsWrong(f"--slower {slower}: it must be a number above 0")
        board = _named("--device-class", device, self.device)
        link = _named("--radio", radio, self.radio)
        return EnergyRates(
            watts_per_core=board.watts_per_core,
            joules_per_byte=link.joules_per_byte,
            slower=slower,
        )


class EnergyRates(BaseModel):
    """What turns CPU seconds and bytes into joules."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    watts_per_core: float = Field(ge=0)
    joules_per_byte: float = Field(ge=0)
    slower: float = Field(default=1.0, gt=0)

    def joules(self, cpu_seconds: float, payload_bytes: float) -> float:
        """The estimate: what computing and sending add to an idle device."""
        computing = cpu_seconds * self.slower * self.watts_per_core
        return computing + payload_bytes * self.joules_per_byte


def load_energy_table(path: Path | None = None) -> EnergyTable:
    """The table in ``path``, or the one that comes with the package.

    Raises :class:`SettingsWrong` for a file that cannot be read or a value that makes no sense.
    """
    try:
        if path is None:
            text = resources.files("ops").joinpath("energy.toml").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
        table = EnergyTable.model_validate(tomllib.loads(text))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise SettingsWrong(f"--energy-table {path}: {exc}; see ops/energy.toml") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise SettingsWrong(
            f"--energy-table {path}: {key} = {first['input']!r}: {first['msg']}"
        ) from exc
    for name, board in table.device.items():
        if board.load_watts < board.idle_watts:
            raise SettingsWrong(
                f"--energy-table {path}: device.{name}.load_watts = {board.load_watts}: must not "
                f"be below idle_watts = {board.idle_watts}"
            )
    return table


def _named(flag: str, name: str, table: Mapping[str, Entry]) -> Entry:
    if name not in table:
        raise SettingsWrong(
            f"{flag} {name}: choose one of {', '.join(sorted(table))}, or give your own figures "
            f"with --energy-table"
        )
    return table[name]
