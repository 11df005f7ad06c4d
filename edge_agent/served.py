"""What a device answers with, kept on its disk: it answers before it has a connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import ValidationError

from broker.messages import Assignment
from broker.serving_messages import Serving
from edge_agent.disk import make_folder
from edge_agent.errors import StateError
from edge_agent.snapshots import read_tensors, write_tensors


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """The parameters of the version that ``serving`` names, for the network of ``assignment``."""

    assignment: Assignment
    serving: Serving
    state: Mapping[str, np.ndarray]

    @property
    def key(self) -> tuple[str, int, int]:
        """Run, cut and version."""
        assert self.assignment.cut is not None
        return self.serving.run, self.assignment.cut, self.serving.version


class ServedStore(Protocol):
    """Where it is kept."""

    def save(self, served: Served) -> None:
        """Replace what is kept. Raises :class:`StateError`."""
        ...

    def load(self) -> Served | None:
        """What is kept, if there is anything. Raises :class:`StateError` if it is damaged."""
        ...


class DiskServed:
    """One safetensors file in ``folder``, replaced atomically."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "serving.safetensors"
        make_folder(folder)

    def save(self, served: Served) -> None:
        """Replace what is kept. Raises :class:`StateError` if the disk will not have it."""
        metadata = {
            "assignment": served.assignment.model_dump_json(),
            "serving": served.serving.model_dump_json(),
        }
        write_tensors(self._path, served.state, metadata)

    def load(self) -> Served | None:
        """What is kept. Raises :class:`StateError` if it is damaged, or of another version."""
        kept = read_tensors(self._path)
        if kept is None:
            return None
        about, state = kept
        try:
            assignment = Assignment.model_validate_json(about["assignment"])
            serving = Serving.model_validate_json(about["serving"])
        except (KeyError, ValidationError) as exc:
            raise StateError(f"{self._path} is not of this version of splitfleet") from exc
        if assignment.cut is None or assignment.run != serving.run:
            raise StateError(f"{self._path} does not fit together")
        return Served(assignment, serving, state)
