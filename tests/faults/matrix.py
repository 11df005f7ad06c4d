"""All rows of the matrix."""

from __future__ import annotations

from tests.faults import matter, messages, processes

FAULTS = [*processes.FAULTS, *messages.FAULTS, *matter.FAULTS]
