"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from coordinator.atomic_files import make_folder, write_file
from ops.errors import DiskTrouble


def write_whole(path: Path, text: str) -> None:
    """Write a file, and its folder if need be. Raises ``DiskTrouble``; then it is as before."""
    try:
        make_folder(path.parent)
        write_file(path, text.encode())
    except OSError as exc:
        raise DiskTrouble(f"cannot write {path}: {exc.strerror}; choose another place") from exc
