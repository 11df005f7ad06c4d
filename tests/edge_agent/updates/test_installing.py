"""Which commands an installation is; a script stands for Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.errors import BundleError
from edge_agent.updates.bundle import BundleManifest, WheelFile
from edge_agent.updates.installing import VenvInstallation

PYTHON = """#!/bin/sh
echo "$@" >>"{log}"
[ "$2" != venv ] || {{ mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; }}
[ "$1" != "{fails}" ] || {{ echo "No space left on device"; exit 1; }}
"""


def install(folder: Path, fails: str = "") -> list[str]:
    """The commands of an installation; those with this first argument fail."""
    python = folder / "python"
    python.write_text(PYTHON.format(log=folder / "commands", fails=fails))
    python.chmod(0o755)
    manifest = BundleManifest(
        format=1,
        fleet="lab",
        version="1.1",
        signed=1,
        requirement="splitfleet[lite]",
        files=[WheelFile(name="splitfleet-1.1-py3-none-any.whl", sha256="0" * 64, size=1)],
    )
    (folder / "versions").mkdir()
    installation = VenvInstallation(
        manifest,
        folder / "wheels",
        folder / "versions" / "1.1",
        clock=lambda: 0.0,
        python=str(python),
    )
    while not installation.poll():
        pass
    return (folder / "commands").read_text().splitlines()


def test_the_last_command_waits_until_all_is_on_the_disk(tmp_path: Path) -> None:
    *_, pip, last = install(tmp_path)
    assert "--no-index" in pip
    assert pip.endswith("splitfleet[lite]==1.1")
    assert last.endswith("os.sync()")


def test_what_a_command_that_fails_said_last_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No space left on device"):
        install(tmp_path, fails="-m")
