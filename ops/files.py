"""Files that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.atomic_files import make_folder, write_file
from ops.errors import DiskTrouble, SettingsWrong


def write_whole(path: Path, text: str) -> None:
    """Write a file, and its folder if need be. Raises ``DiskTrouble``; then it is as before."""
    try:
        make_folder(path.parent)
        write_file(path, text.encode())
    except OSError as exc:
        raise DiskTrouble(f"cannot write {path}: {exc.strerror}; choose another place") from exc


def check_output(path: Path) -> None:
    """Raise ``SettingsWrong`` if replacing ``path`` would replace a device or link of the system.

    To write a file whole is to put a new one in its place: of ``/dev/stdout``, too.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise SettingsWrong(f"{path} is a link or no file: name a file to be made")


def to_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of settings as TOML; a value that is a mapping is a section within its own."""
    text = ""
    for section, values in sections.items():
        inner = {f"{section}.{key}": v for key, v in values.items() if isinstance(v, Mapping)}
        # A JSON string, number or list is a TOML one.
        plain = (f"{k} = {json.dumps(v)}" for k, v in values.items() if not isinstance(v, Mapping))
        text += "\n".join([f"[{section}]", *plain, ""]) + to_toml(inner)
    return text
