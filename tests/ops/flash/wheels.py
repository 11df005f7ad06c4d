"""Wheels that hold nothing, and a wheelhouse of them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path


def write_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    tag: str = "py3-none-any",
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
) -> Path:
    """A wheel with metadata only."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{version}"
    path = folder / f"{stem}-{tag}.whl"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Provides-Extra: {extra}" for extra in extras]
    metadata += [f"Requires-Dist: {one}" for one in requires]
    files = {
        "METADATA": "\n".join(metadata) + "\n",
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{stem}.dist-info/{file},,\n" for file in (*files, "RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in (files | {"RECORD": record}).items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)
    return path


def write_wheelhouse(folder: Path) -> Path:
    """What devices of Python 3.11 and 3.13 on either machine would install, and more."""
    requires = ["numpy", "torch; extra == 'agent'", "onnxruntime; extra == 'lite'"]
    write_wheel(folder, "splitfleet", "0.1.0", requires=requires, extras=["agent", "lite"])
    write_wheel(folder, "pip", "26.0")
    write_wheel(folder, "unwanted")
    for machine in ("x86_64", "aarch64"):
        write_wheel(folder, "torch", tag=f"cp313-cp313-manylinux_2_28_{machine}")
        write_wheel(folder, "onnxruntime", tag=f"cp313-cp313-manylinux_2_28_{machine}")
        for python in ("cp311", "cp313"):
            write_wheel(folder, "numpy", tag=f"{python}-{python}-manylinux_2_28_{machine}")
    write_wheel(folder, "numpy", "1.1", tag="cp311-cp311-manylinux_2_39_x86_64")
    return folder
