"""Where the script is that starts agents."""

from __future__ import annotations

from pathlib import Path

START = Path(__file__).with_name("start.sh")
"""``start.sh UPDATES FLASHED ARGUMENT...``, see there; POSIX sh, to be installed on a device."""
