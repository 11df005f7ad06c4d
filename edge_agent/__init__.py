"""The device side of splitfleet: trainer, predictor, state machine, service."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.answers import Answer
    from edge_agent.core import AgentCore
    from edge_agent.data import DeviceData, load_device_data
    from edge_agent.edge import Edge, EdgeService
    from edge_agent.errors import AgentError, InputError, Unanswered
    from edge_agent.pictures import PictureSpec
    from edge_agent.predictor import InferenceRun
    from edge_agent.service import run_agent
    from edge_agent.settings import AgentSettings
    from edge_agent.trainer import DeviceTrainer

__all__ = [
    "AgentCore",
    "AgentError",
    "AgentSettings",
    "Answer",
    "DeviceData",
    "DeviceTrainer",
    "Edge",
    "EdgeService",
    "InferenceRun",
    "InputError",
    "PictureSpec",
    "Unanswered",
    "load_device_data",
    "run_agent",
]

_HOME = {
    "answers": ("Answer",),
    "core": ("AgentCore",),
    "data": ("DeviceData", "load_device_data"),
    "edge": ("Edge", "EdgeService"),
    "errors": ("AgentError", "InputError", "Unanswered"),
    "pictures": ("PictureSpec",),
    "predictor": ("InferenceRun",),
    "service": ("run_agent",),
    "settings": ("AgentSettings",),
    "trainer": ("DeviceTrainer",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"edge_agent.{module}"), name)
    raise AttributeError(f"module 'edge_agent' has no attribute {name!r}")
