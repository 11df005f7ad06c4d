"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ops.errors import DiskTrouble


def write_whole(path: Path, text: str) -> None:
    """Write a file, and its folder if need be. Raises ``DiskTrouble``; then it is as before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as exc:
        raise DiskTrouble(f"cannot write {path}: {exc.strerror}; choose another place") from exc
