"""Files of a device that are there whole or not at all, whenever the power goes."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from edge_agent.errors import StateError


def make_folder(folder: Path) -> None:
    """Make a state folder and those above it, durably. Raises :class:`StateError`."""
    try:
        _make_folder(folder)
    except OSError as exc:
        raise StateError(f"cannot make the state folder {folder}: {exc.strerror}") from exc


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write or replace a file, which nobody else may read if it is ``private``.

    Raises :class:`StateError` if the disk will not have it.
    """
    temporary = path.with_suffix(".writing")
    try:
        if private:
            temporary.unlink(missing_ok=True)
            temporary.touch(0o600, exist_ok=False)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StateError(f"cannot write {path}: {exc.strerror}; free some space") from exc


def sync_folder(folder: Path) -> None:
    """Make what was made, renamed or removed in a folder durable, where folders can be synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
