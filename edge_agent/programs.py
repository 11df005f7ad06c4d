"""The program that a device without torch runs: given by the coordinator, kept on its disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import ValidationError

from broker.messages import Assignment, Program
from edge_agent.disk import make_folder
from edge_agent.errors import StateError
from edge_agent.snapshots import read_tensors, write_tensors


class Programs(Protocol):
    """The program of a device that does not have its half of the network as code."""

    def has_program(self, assignment: Assignment) -> bool:
        """Whether that for this assignment is here; if not, it is to be asked for."""
        ...

    def take(self, program: Program) -> None:
        """Keep it. Raises :class:`AssignmentError` if it is a refusal."""
        ...


class ProgramStore(Protocol):
    """Where the program of a device is kept."""

    def save(self, program: Program) -> None:
        """Replace what is kept. Raises :class:`StateError`."""
        ...

    def load(self, run: str, cut: int) -> Program | None:
        """The program for this run and cut, if it is the one that is kept.

        Raises :class:`StateError` if it is damaged.
        """
        ...


class DiskPrograms:
    """One safetensors file in ``folder``, replaced atomically."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "program.safetensors"
        make_folder(folder)

    def save(self, program: Program) -> None:
        """Replace what is kept. Raises :class:`StateError` if the disk will not have it."""
        assert program.graph is not None
        metadata = {
            "run": program.run,
            "cut": str(program.cut),
            "parameters": json.dumps(program.parameters),
        }
        write_tensors(self._path, {"graph": np.frombuffer(program.graph, np.uint8)}, metadata)

    def load(self, run: str, cut: int) -> Program | None:
        """See :class:`ProgramStore`."""
        kept = read_tensors(
            self._path, lambda about: (about["run"], about["cut"]) == (run, str(cut))
        )
        if kept is None:
            return None
        about, tensors = kept
        try:
            return Program(
                run=run,
                cut=cut,
                graph=tensors["graph"].tobytes(),
                parameters=json.loads(about["parameters"]),
            )
        except (KeyError, ValueError, ValidationError) as exc:
            raise StateError(f"{self._path} is not of this version of splitfleet") from exc
