"""Files and folders that are there whole or not at all, whenever the process or the power goes.

What is new is written under another name, synced and renamed; what is old is renamed before it is
taken apart. :func:`clear_leftovers` removes what was left of either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

PRIVATE, PUBLIC = 0o600, 0o644
_WRITING, _REMOVING = ".writing-", ".removing-"


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_file(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write or replace a file; its rights are ``mode``, or what the umask leaves."""
    temporary = path.with_name(_WRITING + path.name)
    try:
        _write_synced(temporary, data, mode)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder that is not there yet, with these files in it."""
    temporary = folder.with_name(_WRITING + folder.name)
    try:
        temporary.mkdir()
        for name, data in files.items():
            _write_synced(temporary / name, data)
        sync_folder(temporary)
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def remove_folders(parent: Path, names: Iterable[str]) -> None:
    """Remove folders in ``parent``."""
    gone = [(parent / name).rename(parent / (_REMOVING + name)) for name in names]
    if gone:
        sync_folder(parent)
    for folder in gone:
        shutil.rmtree(folder)


def clear_leftovers(parent: Path) -> None:
    """Remove what a killed process left in ``parent``, as far as that can be done."""
    for prefix in (_WRITING, _REMOVING):
        for leftover in parent.glob(prefix + "*"):
            shutil.rmtree(leftover, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed and removed in a folder durable, where folders can be synced.

    Some network file systems refuse (EINVAL); they have ways of their own.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes, mode: int | None = None) -> None:
    with path.open("wb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
