"""The device's own learning: the start of its round, optimizer included, in memory and on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edge_agent.disk import make_folder, write_file
from edge_agent.errors import StateError

_STATE, _MOMENTUM, _RESIDUAL = "state/", "momentum/", "residual/"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Parameters and buffers of the device's half, and the optimizer's momentum, by name.

    ``residual`` is what quantization has taken from this device's uploads; see ``tensors.deltas``.
    """

    state: Mapping[str, np.ndarray]
    momentum: Mapping[str, np.ndarray]
    residual: Mapping[str, np.ndarray] = field(default_factory=dict)


class DiskSnapshots:
    """Keeps the last snapshot in ``folder``, one safetensors file that is replaced atomically.

    It holds what no one else has (momentum and residual), and spares a returning device the
    download.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "snapshot.safetensors"
        make_folder(folder)

    def save(self, run: str, cut: int, version: int, snapshot: Snapshot) -> None:
        """Replace the kept snapshot. Raises :class:`StateError` if the disk will not have it."""
        tensors = {_STATE + name: values for name, values in snapshot.state.items()}
        tensors |= {_MOMENTUM + name: values for name, values in snapshot.momentum.items()}
        tensors |= {_RESIDUAL + name: values for name, values in snapshot.residual.items()}
        metadata = {"run": run, "cut": str(cut), "version": str(version)}
        write_tensors(self.path, tensors, metadata)

    def load(self, run: str, cut: int) -> tuple[int, Snapshot] | None:
        """Version and snapshot kept for this run and cut, if there is one.

        Raises :class:`StateError` for a file that is damaged.
        """
        kept = read_tensors(
            self.path, lambda about: (about["run"], about["cut"]) == (run, str(cut))
        )
        if kept is None:
            return None
        about, tensors = kept
        version = int(about["version"])
        return version, Snapshot(
            _part(tensors, _STATE), _part(tensors, _MOMENTUM), _part(tensors, _RESIDUAL)
        )


def version_of(path: Path) -> int | None:
    """The version that a kept snapshot begins; None if the file is damaged or not there."""
    try:
        with safe_open(path, "np") as file:
            return int((file.metadata() or {})["version"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Replace a safetensors file atomically. Raises :class:`StateError` if the disk will not."""
    about = {**metadata, "sha256": _checksum(metadata, tensors)}
    write_file(path, save(dict(tensors), about))


def read_tensors(
    path: Path, wanted: Callable[[Mapping[str, str]], bool] = lambda _: True
) -> tuple[dict[str, str], dict[str, np.ndarray]] | None:
    """Metadata and tensors of such a file; None if there is none, or none whose metadata is wanted.

    Raises :class:`StateError` for a file that is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            if not wanted(about):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as exc:
        raise StateError(f"{path} is unusable ({exc})") from exc
    checksum = about.pop("sha256", None)
    if checksum not in (None, _checksum(about, tensors)):
        raise StateError(f"{path} is damaged (checksum)")
    return about, tensors


def _part(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
