"""``splitfleet model``: which versions of a run are kept, and which of them answers devices.

What serves is independent of what trains: the coordinator trains on from its last closed round
whatever was promoted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from coordinator.checkpoint import Checkpoint
from coordinator.errors import StoreError
from coordinator.serving_choice import ServingChoice, read_choice, write_choice
from coordinator.store import Kept, Store
from ops import bench_rows
from ops.checkpoints import load_checkpoint, open_store
from ops.errors import SettingsWrong
from ops.report import finite
from ops.units import byte_size, percent

_WORD = "version "
_COLUMNS = ("version", "round", "full network", "exits", "size", "")


@dataclass(frozen=True, slots=True)
class Versions:
    """The checkpoints of a run, and what was chosen to serve."""

    run: str
    store: Store
    identity: dict[str, Any]
    """The run's settings as written."""
    kept: list[Kept]
    choice: ServingChoice

    @property
    def whole(self) -> list[int]:
        """Versions whose manifest is readable, oldest first."""
        return [kept.manifest["version"] for kept in self.kept if kept.problem is None]

    @property
    def latest(self) -> int | None:
        """The last closed round's."""
        return self.whole[-1] if self.whole else None

    @property
    def best(self) -> int | None:
        """That with the highest score, the newest of equals."""
        scored = [
            (kept.manifest["score"], index, kept.manifest["version"])
            for index, kept in enumerate(self.kept)
            if kept.problem is None and isinstance(kept.manifest.get("score"), int | float)
        ]
        return max(scored)[2] if scored else None

    @property
    def serving(self) -> int | None:
        """The version that answers devices."""
        return self.latest if self.choice.version is None else self.choice.version

    def marks(self, version: int) -> list[str]:
        """What there is to say of a version: serves, pinned, latest, best."""
        marks = {
            "serves": self.serving,
            "pinned": self.choice.version,
            "latest": self.latest,
            "best": self.best,
        }
        return [mark for mark, holder in marks.items() if holder == version]


def read_versions(state_dir: Path, *, choose_anew: bool = False) -> Versions:
    """The versions of a coordinator's current run.

    With ``choose_anew`` a choice that cannot be read is none.

    Raises :class:`SettingsWrong` if there is no run, ``StoreError``.
    """
    run, store, identity = open_store(state_dir)
    try:
        choice = read_choice(store.folder)
    except StoreError:
        if not choose_anew:
            raise
        choice = ServingChoice()
    return Versions(run, store, identity, store.kept(), choice)


def list_versions(state_dir: Path, *, as_json: bool) -> None:
    """Print a line for each version that is kept."""
    versions = read_versions(state_dir)
    rows = [_row(versions, kept) for kept in versions.kept]
    if as_json:
        print(json.dumps({**_serving(versions), "versions": finite(rows)}, indent=1))
        return
    cells = [_cells(row) for row in rows]
    bench_rows.show(f"versions of {versions.run}", _COLUMNS, cells, Console())
    print(_sentence(versions))


def show_version(state_dir: Path, version: str, *, as_json: bool) -> None:
    """Print all there is to say of one version; its files are verified."""
    versions, checkpoint = _load(state_dir, version)
    found = [kept for kept in versions.kept if kept.manifest.get("version") == checkpoint.version]
    if not found:
        raise SettingsWrong(f"version {version} is being removed by its coordinator: take another")
    parameters = sum(values.size for values in checkpoint.model.state.values())
    last = checkpoint.history[-1] if checkpoint.history else {}
    row = _row(versions, found[-1]) | {
        "run": versions.run,
        "folder": str(found[-1].folder),
        "parameters": int(parameters),
        "devices": sorted(last.get("devices", {})),
        "sha256": found[-1].manifest["sha256"]["model.safetensors"],
    }
    if as_json:
        print(json.dumps(finite(row), indent=1))
        return
    exits = "  ".join(f"{cut}: {percent(value)}" for cut, value in row["exit_accuracy"].items())
    lines = {
        "run": row["run"],
        "version": f"{row['version']} {_marks(row)}".rstrip(),
        "round": row["round"],
        "full network": percent(row["score"]),
        "exits": exits or "none is trained",
        "devices of its round": ", ".join(row["devices"]) or "none",
        "parameters": f"{row['parameters']:,} in {byte_size(row['bytes'])} with momentum",
        "SHA-256": row["sha256"],
        "folder": row["folder"],
    }
    for name, value in lines.items():
        print(f"{name:<21} {value}")


def load_version(state_dir: Path, version: str) -> tuple[str, Store, dict[str, Any], Checkpoint]:
    """Run, its store and settings, and a version: a number, best, latest or serving.

    Raises :class:`SettingsWrong` if there is none, ``StoreError`` if it is damaged.
    """
    versions, checkpoint = _load(state_dir, version)
    return versions.run, versions.store, versions.identity, checkpoint


def promote(state_dir: Path, version: str) -> None:
    """Let this version answer devices; ``latest`` follows the last closed round again.

    The version is read whole before, so that what serves is never one that cannot be loaded. A
    choice before it that is damaged is replaced.

    Raises :class:`SettingsWrong` if there is no such version, ``StoreError`` if it is damaged.
    """
    versions = read_versions(state_dir, choose_anew=True)
    chosen = None
    if version != "latest":
        chosen = load_checkpoint(versions.store, version, _WORD).version
    _choose(versions, versions.choice.promote(chosen))


def rollback(state_dir: Path) -> None:
    """Undo the last :func:`promote`. Raises as it does."""
    versions = read_versions(state_dir)
    if not versions.choice.previous:
        before = versions.whole[-2:-1]
        advice = f"splitfleet model promote {before[0]}" if before else "promote a version"
        raise SettingsWrong(
            f"nothing was promoted before, so there is nothing to go back to: {advice} "
            "chooses one by its number"
        )
    choice = versions.choice.rollback()
    if choice.version is not None:
        load_checkpoint(versions.store, str(choice.version), _WORD)
    _choose(versions, choice)


def _load(state_dir: Path, version: str) -> tuple[Versions, Checkpoint]:
    versions = read_versions(state_dir)
    if version == "serving":
        version = "latest" if versions.choice.version is None else str(versions.choice.version)
    return versions, load_checkpoint(versions.store, version, _WORD)


def _choose(versions: Versions, choice: ServingChoice) -> None:
    folder = versions.store.folder
    write_choice(folder, choice)
    version = choice.version
    if version is not None and version not in versions.store.versions():
        # Its coordinator removed it between the check and the choice, which keeps it from now on.
        write_choice(folder, versions.choice)
        raise StoreError(f"version {version} was removed in this moment: choose another one")
    now = replace(versions, kept=versions.store.kept(), choice=choice)
    print(_sentence(now))


def _row(versions: Versions, kept: Kept) -> dict[str, Any]:
    manifest = kept.manifest
    if kept.problem is not None:
        return {
            "version": None,
            "folder": str(kept.folder),
            "bytes": kept.size,
            "problem": kept.problem,
        }
    last = manifest["history"][-1] if manifest["history"] else {}
    return {
        "version": manifest["version"],
        "round": manifest["round"],
        "score": manifest.get("score"),
        "trained_cuts": sorted(manifest["trained_cuts"]),
        "exit_accuracy": last.get("exit_accuracy", {}),
        "bytes": kept.size,
        "marks": versions.marks(manifest["version"]),
        "problem": None,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    if row["problem"] is not None:
        return [f"{Path(row['folder']).name}?", "", "", "", byte_size(row["bytes"]), "damaged"]
    exits = row["exit_accuracy"] or dict.fromkeys(map(str, row["trained_cuts"]))
    return [
        str(row["version"]),
        str(row["round"]),
        percent(row["score"]),
        " ".join(f"{cut}:{percent(value).replace(' ', '')}" for cut, value in exits.items()),
        byte_size(row["bytes"]),
        _marks(row),
    ]


def _marks(row: dict[str, Any]) -> str:
    return ", ".join(row["marks"])


def _serving(versions: Versions) -> dict[str, Any]:
    return {
        "run": versions.run,
        "serving": versions.serving,
        "pinned": versions.choice.version,
        "previous": list(versions.choice.previous),
    }


def _sentence(versions: Versions) -> str:
    if versions.choice.version is None:
        return f"the last closed round serves: version {versions.latest}"
    if versions.choice.version not in versions.whole:
        return (
            f"version {versions.choice.version} was chosen to serve, but it is not here any more: "
            "choose another with splitfleet model promote"
        )
    return (
        f"version {versions.choice.version} serves, whatever is trained; "
        "splitfleet model promote latest follows the training again"
    )
