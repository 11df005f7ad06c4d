"""The MQTT side of splitfleet: topics, messages, transports, the embedded broker, Mosquitto."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from broker.config import BrokerConfig, load_settings
    from broker.embedded import EmbeddedBroker
    from broker.errors import BrokerError, ConfigError, MessageError, TopicError, TransportError
    from broker.memory import MemoryBroker, MemoryTransport
    from broker.mosquitto import write_mosquitto_config
    from broker.mqtt import MqttTransport
    from broker.topics import Address, Topics
    from broker.transport import Connected, Disconnected, Packet, Transport, Will

__all__ = [
    "Address",
    "BrokerConfig",
    "BrokerError",
    "ConfigError",
    "Connected",
    "Disconnected",
    "EmbeddedBroker",
    "MemoryBroker",
    "MemoryTransport",
    "MessageError",
    "MqttTransport",
    "Packet",
    "TopicError",
    "Topics",
    "Transport",
    "TransportError",
    "Will",
    "load_settings",
    "write_mosquitto_config",
]

_HOME = {
    "config": ("BrokerConfig", "load_settings"),
    "embedded": ("EmbeddedBroker",),
    "errors": ("BrokerError", "ConfigError", "MessageError", "TopicError", "TransportError"),
    "memory": ("MemoryBroker", "MemoryTransport"),
    "mosquitto": ("write_mosquitto_config",),
    "mqtt": ("MqttTransport",),
    "topics": ("Address", "Topics"),
    "transport": ("Connected", "Disconnected", "Packet", "Transport", "Will"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"broker.{module}"), name)
    raise AttributeError(f"module 'broker' has no attribute {name!r}")
