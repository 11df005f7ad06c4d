"""Wheels of this repository's software under another version, with a change if wanted."""

from __future__ import annotations

import base64
import hashlib
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("tensors", "broker", "edge_agent", "coordinator", "ops")


def make_wheel(folder: Path, version: str, changes: Mapping[str, str] | None = None) -> Path:
    """A wheel that needs nothing; ``changes``: a file of the packages → what it is instead."""
    changes = changes or {}
    info = f"splitfleet-{version}.dist-info"
    files = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert changes.keys() <= files.keys()
    files |= {name: text.encode() for name, text in changes.items()}
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: splitfleet\nVersion: {version}\nProvides-Extra: agent\n"
    ).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nsplitfleet = ops.cli:main\n"
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = ("\n".join([*lines, f"{info}/RECORD,,"]) + "\n").encode()
    wheel = folder / f"splitfleet-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


def link_dependencies(folder: Path) -> Path:
    """A folder for PYTHONPATH: all that is installed here, but no splitfleet."""
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for found in Path(place).iterdir():
            if not found.name.lower().startswith(("splitfleet", "_splitfleet", "__editable__")):
                (folder / found.name).symlink_to(found)
    return folder


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
