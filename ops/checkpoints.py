"""Reading a coordinator's state folder from outside: its run, its checkpoints, its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coordinator.checkpoint import Checkpoint
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from ops.errors import SettingsWrong


def open_store(state_dir: Path) -> tuple[str, Store, dict[str, Any]]:
    """The current run of a coordinator's folder: its name, its store, its settings as written.

    Nothing is created. Raises :class:`SettingsWrong` and ``StoreError``.
    """
    if not (state_dir / "current").is_file():
        raise SettingsWrong(
            f"{state_dir} holds no run: give the folder that a coordinator was started with as "
            "--state-dir (of a demo: runs/ID/coordinator)"
        )
    store = Store(state_dir)
    current = store.current()
    assert current is not None
    run, identity = current
    return run, store, identity


def load_checkpoint(store: Store, version: str, flag: str = "--version ") -> Checkpoint:
    """The checkpoint a person names: a number, ``best`` or ``latest``.

    ``flag`` is what stood before it on the command line. Raises :class:`SettingsWrong`, and
    ``StoreError`` if it is damaged.
    """
    match version:
        case "latest":
            checkpoint = store.latest()
        case "best":
            checkpoint = store.best()
        case _ if version.isascii() and version.isdecimal() and len(version) < 19:
            checkpoint = store.at(int(version))
        case _:
            raise SettingsWrong(f"{flag}{version}: write a number, best or latest")
    if checkpoint is None:
        kept = ", ".join(map(str, store.versions())) or "none"
        why = " has a score" if version == "best" else ""
        raise SettingsWrong(f"{flag}{version}: no such checkpoint{why}; kept are {kept}")
    return checkpoint


def settings_of_run(
    run_folder: Path, identity: Mapping[str, Any], given: Mapping[str, Any]
) -> CoordinatorSettings:
    """A run's settings with what is given (not None) in their place.

    Raises :class:`SettingsWrong` for a run that another version of splitfleet made.
    """
    flags = {key: value for key, value in given.items() if value is not None}
    try:
        return CoordinatorSettings(**{**identity, **flags})
    except ValidationError as exc:
        odd = ", ".join(".".join(map(str, error["loc"])) or error["msg"] for error in exc.errors())
        raise SettingsWrong(
            f"{run_folder / 'run.json'}: {odd}: another version of splitfleet made this"
        ) from exc
