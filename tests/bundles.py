"""Bundles for tests: wheels that are none, signed as real ones are."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from coordinator.identity.authority import Authority
from ops.bundles import make_bundle

FLEET = "lab"


def make(folder: Path, authority: Authority, version: str = "1.1.0", *, signed: int = 100) -> Path:
    """A bundle of two files; what is in them is not looked at before it is installed."""
    wheels = folder / "wheelhouse"
    wheels.mkdir()
    (wheels / f"splitfleet-{version}-py3-none-any.whl").write_bytes(b"software" * 1000)
    (wheels / "numpy-2.1.0-py3-none-any.whl").write_bytes(b"numbers" * 50_000)
    bundle = folder / "bundle.tar"
    make_bundle(wheels, bundle, authority, signed=signed, extras=["lite"])
    return bundle


def rewrite(bundle: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Have ``change`` alter the files of a bundle, and keep their order."""
    with tarfile.open(bundle) as tar:
        files = {}
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            files[member.name] = stream.read()
    change(files)
    with tarfile.open(bundle, "w:") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
