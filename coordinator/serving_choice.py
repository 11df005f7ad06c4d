"""Which version of a run answers devices, chosen by hand: ``<run folder>/serving.json``.

``splitfleet model promote`` and ``rollback`` write it while the coordinator runs; the coordinator
reads it. It is whole or not there, and says nothing about which version trains.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from coordinator.atomic_files import write_file
from coordinator.errors import StoreError

FILE = "serving.json"
REMEMBERED = 16
"""So many earlier choices are kept to go back to."""
_MOST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ServingChoice:
    """``version`` None follows the last closed round. ``previous``: earlier ones, newest last."""

    version: int | None = None
    previous: tuple[int | None, ...] = ()

    def promote(self, version: int | None) -> ServingChoice:
        """Another choice; that which was is remembered. The same one again changes nothing."""
        if version == self.version:
            return self
        return ServingChoice(version, (*self.previous, self.version)[-REMEMBERED:])

    def rollback(self) -> ServingChoice:
        """The choice before this one; there must be one."""
        assert self.previous
        return ServingChoice(self.previous[-1], self.previous[:-1])

    @property
    def needed(self) -> frozenset[int]:
        """Versions that must be kept: the chosen one, and the one a rollback returns to."""
        return frozenset(v for v in (self.version, *self.previous[-1:]) if v is not None)


def read_choice(run_folder: Path) -> ServingChoice:
    """What was chosen; the last closed round if nothing was. Raises :class:`StoreError`."""
    path = run_folder / FILE
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        data = json.loads(content) if len(content) <= _MOST_BYTES else None
    except FileNotFoundError:
        return ServingChoice()
    except (OSError, ValueError, RecursionError) as exc:
        raise StoreError(f"{path} cannot be read: {exc}; {_REMEDY}") from exc
    if not isinstance(data, dict) or not isinstance(data.get("previous", []), list):
        raise StoreError(f"{path} is damaged; {_REMEDY}")
    choices = [data.get("version"), *data.get("previous", [])]
    if not all(choice is None or (type(choice) is int and choice >= 0) for choice in choices):
        raise StoreError(f"{path} names something that is no version; {_REMEDY}")
    return ServingChoice(choices[0], tuple(choices[1:][-REMEMBERED:]))


def write_choice(run_folder: Path, choice: ServingChoice) -> None:
    """Write or replace it, durably. Raises :class:`StoreError`; then it is as before."""
    path = run_folder / FILE
    data = {"version": choice.version, "previous": list(choice.previous)}
    try:
        write_file(path, json.dumps(data).encode() + b"\n")
    except OSError as exc:
        raise StoreError(
            f"cannot write {path}: {exc.strerror or exc}; free space or correct its rights"
        ) from exc


_REMEDY = (
    "remove it to serve the last closed round, or choose a version with splitfleet model promote"
)
