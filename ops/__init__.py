"""Everything around a fleet: the command line, metrics, reports, containers and experiments."""

from __future__ import annotations

__all__: list[str] = []
