"""A coordinator's state folder with a few versions of a tiny network, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coordinator.aggregation import Model
from coordinator.checkpoint import Checkpoint
from coordinator.store import Store
from tensors.networks import NetworkSpec, build_network, read_state
from tests.tiny import SPEC, make_settings

TRAINED = (2, 3)


def make_version(
    version: int, *, spec: NetworkSpec = SPEC, score: float | None = None
) -> Checkpoint:
    """Weights drawn from the version's number; as a round leaves them behind."""
    network = build_network(spec, seed=version)
    record: dict[str, Any] = {"round": version, "attempt": 0, "devices": {"cam-1": {}, "cam-2": {}}}
    if score is not None:
        record["server_accuracy"] = score
        record["exit_accuracy"] = {str(cut): score - 0.1 * cut for cut in TRAINED}
    return Checkpoint(
        version=version,
        round=version,
        model=Model(read_state(network), {}),
        trained_cuts=list(TRAINED) if version else [],
        history=[record] if version else [],
        score=score,
    )


def make_state(
    root: Path,
    scores: tuple[float | None, ...] = (0.5, 0.9, 0.7),
    *,
    spec: NetworkSpec = SPEC,
    keep: int = 5,
    **settings: Any,
) -> Store:
    """A folder with version 0 and one for each score; the run's name is ``run-1``."""
    store = Store(root, keep=keep)
    store.create("run-1", make_settings(**settings).identity(), make_version(0, spec=spec))
    for version, score in enumerate(scores, start=1):
        store.save(make_version(version, spec=spec, score=score))
    return store
