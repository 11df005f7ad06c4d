"""One checkpoint: what it holds, and the files it is on disk, verified when they are read.

model.safetensors  momentum.safetensors  manifest.json
residual.safetensors, if parameters go as differences
velocity.safetensors, if versions have a momentum
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from coordinator.aggregation import Model
from coordinator.errors import StoreError
from tensors.networks import State

FORMAT = 1
_RESIDUAL = "residual.safetensors"
_VELOCITY = "velocity.safetensors"


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
    scheduler: dict[str, Any] = field(default_factory=dict)
    """What the scheduler has learnt about the fleet, as JSON."""
    score: float | None = None
    """How good the model is, higher is better; None if that was not measured."""
    policies: dict[str, Any] = field(default_factory=dict)
    """What its exits are to do, as JSON; see ``coordinator.exit_policies``."""


def files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Name → content of the files in its folder."""
    files = {
        "model.safetensors": save(_contiguous(checkpoint.model.state)),
        "momentum.safetensors": save(_contiguous(checkpoint.model.momentum)),
    }
    for name, arrays in ((_RESIDUAL, checkpoint.residual), (_VELOCITY, checkpoint.model.velocity)):
        if arrays:
            files[name] = save(_contiguous(arrays))
    manifest = {
        "format": FORMAT,
        "version": checkpoint.version,
        "round": checkpoint.round,
        "trained_cuts": checkpoint.trained_cuts,
        "sha256": {name: _sha256(data) for name, data in files.items()},
        "score": checkpoint.score,
        "policies": checkpoint.policies,
        "scheduler": checkpoint.scheduler,
        "history": checkpoint.history,
        "registry": checkpoint.registry,
        "traffic": checkpoint.traffic,
    }
    files["manifest.json"] = to_json(manifest | {"checksum": _checksum(manifest)})
    return files


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises :class:`StoreError` if any of its files is damaged."""
    manifest = read_manifest(folder)
    try:
        digests = manifest["sha256"]
        state, momentum = (
            _load_arrays(folder / name, digests[name])
            for name in ("model.safetensors", "momentum.safetensors")
        )
        residual, velocity = (
            _load_arrays(folder / name, digests[name]) if name in digests else {}
            for name in (_RESIDUAL, _VELOCITY)
        )
        return Checkpoint(
            version=manifest["version"],
            round=manifest["round"],
            model=Model(state, momentum, velocity),
            trained_cuts=manifest["trained_cuts"],
            history=manifest["history"],
            registry=manifest["registry"],
            traffic=manifest["traffic"],
            residual=residual,
            scheduler=manifest.get("scheduler", {}),
            score=manifest.get("score"),
            policies=manifest.get("policies", {}),
        )
    except (KeyError, TypeError) as exc:
        raise StoreError(f"{folder / 'manifest.json'} is damaged: {exc!r}") from exc


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder, verified; old ones have no checksum.

    Raises :class:`StoreError`.
    """
    manifest = read_json(folder / "manifest.json")
    checksum = manifest.pop("checksum", None)
    if checksum not in (None, _checksum(manifest)):
        raise StoreError(f"{folder / 'manifest.json'} is damaged (checksum)")
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}"
        )
    return manifest


def read_score(folder: Path) -> float | None:
    """The score of a checkpoint's folder; None without one, also where that is damaged."""
    try:
        score = read_manifest(folder).get("score")
    except StoreError:
        return None
    return score if isinstance(score, float | int) and math.isfinite(score) else None


def _load_arrays(path: Path, digest: str) -> dict[str, np.ndarray]:
    try:
        data = path.read_bytes()
        if _sha256(data) != digest:
            raise StoreError(f"{path} is damaged (checksum)")
        return load(data)
    except (OSError, SafetensorError) as exc:
        raise StoreError(f"{path} cannot be read: {exc}") from exc


def _contiguous(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, order="C") for name, values in state.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    return _sha256(json.dumps(manifest).encode())


def to_json(data: object) -> bytes:
    """As the files of a run are written."""
    return json.dumps(data, indent=1).encode() + b"\n"


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run. Raises :class:`StoreError` if it cannot be read or is no JSON object."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise StoreError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise StoreError(f"{path} is damaged: not a JSON object")
    return data
