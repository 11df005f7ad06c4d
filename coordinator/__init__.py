"""The server side of splitfleet: engines, aggregation, rounds, store, service."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator.aggregation import Aggregation, Model
    from coordinator.core import CoordinatorCore
    from coordinator.engines import Averaging, Sequential
    from coordinator.errors import CoordinatorError
    from coordinator.observer import Observer
    from coordinator.service import build_core, run_coordinator
    from coordinator.settings import CoordinatorSettings
    from coordinator.store import Store

__all__ = [
    "Aggregation",
    "Averaging",
    "CoordinatorCore",
    "CoordinatorError",
    "CoordinatorSettings",
    "Model",
    "Observer",
    "Sequential",
    "Store",
    "build_core",
    "run_coordinator",
]

_HOME = {
    "aggregation": ("Aggregation", "Model"),
    "core": ("CoordinatorCore",),
    "engines": ("Averaging", "Sequential"),
    "errors": ("CoordinatorError",),
    "observer": ("Observer",),
    "service": ("build_core", "run_coordinator"),
    "settings": ("CoordinatorSettings",),
    "store": ("Store",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"coordinator.{module}"), name)
    raise AttributeError(f"module 'coordinator' has no attribute {name!r}")
