"""Checkpoints on disk: whole or not at all, verified on load, the last few kept.

{root}/current                      the run to resume
{root}/{run}/run.json               its settings
{root}/{run}/attempt.json           round and attempt that were last announced
{root}/{run}/checkpoints/000003/    model.safetensors  momentum.safetensors  manifest.json
                                    residual.safetensors, if parameters go as differences
{root}/{run}/result.json            after the last round
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from coordinator.aggregation import Model
from coordinator.errors import StoreError
from tensors.networks import State

log = logging.getLogger("splitfleet.store")
FORMAT = 1
_RESIDUAL = "residual.safetensors"


@dataclass(slots=True)
class Checkpoint:
    """The state of a run after ``version`` closed rounds."""

    version: int
    round: int
    model: Model
    trained_cuts: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    registry: list[dict[str, Any]] = field(default_factory=list)
    traffic: dict[str, int] = field(default_factory=dict)
    residual: State = field(default_factory=dict)
    """What quantization has taken from the parameters sent so far; see ``tensors.deltas``."""


class Store:
    """The folder of one coordinator."""

    def __init__(self, root: Path, *, keep: int = 3) -> None:
        self._root = root
        self._keep = keep
        self._run = ""
        with _disk(root):
            root.mkdir(parents=True, exist_ok=True)

    @property
    def folder(self) -> Path:
        """The folder of the current run."""
        return self._root / self._run

    def current(self) -> tuple[str, dict[str, Any]] | None:
        """Name and settings of the run to resume, if there is one."""
        pointer = self._root / "current"
        if not pointer.exists():
            return None
        run = pointer.read_text("utf-8").strip()
        settings = _read_json(self._root / run / "run.json")
        self._run = run
        return run, settings

    def create(self, run: str, settings: dict[str, Any]) -> None:
        """Start a run; the next :meth:`current` finds it. Earlier runs stay where they are."""
        self._run = run
        with _disk(self.folder):
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        _write(self.folder / "run.json", _json(settings))
        _write(self._root / "current", run.encode())

    def announce(self, round_number: int, attempt: int) -> None:
        """Remember an attempt before it is announced, so that none is ever announced twice."""
        _write(self.folder / "attempt.json", _json({"round": round_number, "attempt": attempt}))

    def announced(self) -> tuple[int, int]:
        """Round and attempt last announced; (0, 0) before the first."""
        path = self.folder / "attempt.json"
        if not path.exists():
            return 0, 0
        data = _read_json(path)
        try:
            return int(data["round"]), int(data["attempt"])
        except (KeyError, TypeError, ValueError) as exc:
            raise StoreError(f"{path} is damaged: it names no round and attempt") from exc

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint: into a folder of another name, synced, then renamed."""
        parent = self.folder / "checkpoints"
        final = parent / f"{checkpoint.version:06d}"
        files = {
            "model.safetensors": save(_contiguous(checkpoint.model.state)),
            "momentum.safetensors": save(_contiguous(checkpoint.model.momentum)),
        }
        if checkpoint.residual:
            files[_RESIDUAL] = save(_contiguous(checkpoint.residual))
        manifest = {
            "format": FORMAT,
            "version": checkpoint.version,
            "round": checkpoint.round,
            "trained_cuts": checkpoint.trained_cuts,
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            "history": checkpoint.history,
            "registry": checkpoint.registry,
            "traffic": checkpoint.traffic,
        }
        with _disk(final):
            folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
            try:
                for name, data in [*files.items(), ("manifest.json", _json(manifest))]:
                    _write_synced(folder / name, data)
                _sync(folder)
                if final.exists():
                    shutil.rmtree(final)
                folder.rename(final)
                _sync(parent)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._prune(parent)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are logged and passed over.

        None if the run has none at all. Raises :class:`StoreError` if all it has are damaged.
        """
        folders = sorted((self.folder / "checkpoints").glob("[0-9]*"), reverse=True)
        for folder in folders:
            try:
                checkpoint = _load(folder)
            except StoreError as exc:
                log.warning("%s; going back to the checkpoint before", exc)
                continue
            if folder != folders[0]:
                # A device may hold the damaged version: its number must not mean other weights.
                checkpoint.version = int(folders[0].name) + 1
            return checkpoint
        if folders:
            raise StoreError(
                f"no checkpoint in {self.folder} can be read: restore one from a backup, or start "
                "over with --fresh"
            )
        return None

    def save_result(self, result: dict[str, Any]) -> None:
        """Write the run's result."""
        _write(self.folder / "result.json", _json(result))

    def _prune(self, parent: Path) -> None:
        for old in sorted(parent.glob("[0-9]*"))[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        for leftover in parent.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _load(folder: Path) -> Checkpoint:
    manifest = _read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}"
        )
    try:
        digests = manifest["sha256"]
        state, momentum = (
            _load_arrays(folder / name, digests[name])
            for name in ("model.safetensors", "momentum.safetensors")
        )
        return Checkpoint(
            version=manifest["version"],
            round=manifest["round"],
            model=Model(state, momentum),
            trained_cuts=manifest["trained_cuts"],
            history=manifest["history"],
            registry=manifest["registry"],
            traffic=manifest["traffic"],
            residual=(
                _load_arrays(folder / _RESIDUAL, digests[_RESIDUAL]) if _RESIDUAL in digests else {}
            ),
        )
    except KeyError as exc:
        raise StoreError(f"{folder / 'manifest.json'} is damaged: it lacks {exc}") from exc


def _load_arrays(path: Path, digest: str) -> dict[str, np.ndarray]:
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"{path} is damaged (checksum)")
        return load(data)
    except (OSError, SafetensorError) as exc:
        raise StoreError(f"{path} cannot be read: {exc}") from exc


def _contiguous(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, order="C") for name, values in state.items()}


def _json(data: object) -> bytes:
    return json.dumps(data, indent=1).encode() + b"\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise StoreError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise StoreError(f"{path} is damaged: not a JSON object")
    return data


def _write(path: Path, data: bytes) -> None:
    """Replace a file atomically."""
    with _disk(path):
        temporary = path.with_name(f".{path.name}.writing")
        _write_synced(temporary, data)
        temporary.replace(path)
        _sync(path.parent)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreError(
            f"cannot write {path}: {exc.strerror or exc}; free space or choose another folder, "
            "then start again: the run resumes from its last closed round"
        ) from exc
