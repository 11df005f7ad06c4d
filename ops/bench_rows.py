"""What benchmarks have in common: where a row was measured, and how rows are shown and kept."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ops.errors import DiskTrouble


def today() -> str:
    """The date of a row."""
    return time.strftime("%Y-%m-%d")


def machine() -> str:
    """The machine of a row."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of a row, as far as it is known."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def show(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console
) -> None:
    """Print rows of cells as a table; brackets in them are no markup."""
    table = Table(title=Text(title))
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def append(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Append rows of cells to a Markdown table at the end of a file."""
    append_text(path, "".join("| " + " | ".join(row) + " |\n" for row in rows))


def append_text(path: Path, text: str) -> None:
    """Append to a file; DiskTrouble if that fails."""
    _write(path, text, "a")


def write_text(path: Path, text: str) -> None:
    """Write a file; DiskTrouble if that fails."""
    _write(path, text, "w")


def _write(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise DiskTrouble(f"cannot write {path}: {exc.strerror}; choose another file") from exc
