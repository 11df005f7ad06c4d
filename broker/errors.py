"""Everything the broker package raises.

BrokerError
├── TransportError          the MQTT connection did not do what was asked
│   ├── NotConnected        there is no connection now, or it went away while waiting
│   ├── ConnectRefused      the broker said no in a way that retrying cannot change
│   ├── SubscribeRefused    the broker refused a subscription
│   ├── PublishRefused      the broker refused one publish (access rules, quota, ...)
│   └── PacketTooLarge      the packet is above the broker's announced maximum
├── TopicError              a topic or name that is not part of the tree (also a ValueError)
├── MessageError            a payload that is not a valid message
├── ConfigError             a setting that is missing or wrong (also a ValueError)
└── EmbeddedBrokerError     the embedded broker did not start
    └── PortTaken           something else listens on the wanted port
"""

from __future__ import annotations


class BrokerError(Exception):
    """Base of every error of this package."""


class TransportError(BrokerError):
    """The connection did not do what was asked, e.g. no acknowledgement in time."""


class NotConnected(TransportError):
    """There is no connection to the broker, or it was lost before the acknowledgement."""


class ConnectRefused(TransportError):
    """The broker refused this client for good: wrong credentials, not authorised, taken over."""

    def __init__(self, message: str, reason_code: int) -> None:
        super().__init__(message)
        self.reason_code = reason_code


class SubscribeRefused(TransportError):
    """The broker refused to add a subscription."""

    def __init__(self, topic_filter: str, reason_code: int, reason: str) -> None:
        super().__init__(
            f"the broker refused the subscription to {topic_filter!r}: {reason} "
            f"(0x{reason_code:02x}); check the client's name and the broker's access rules"
        )
        self.topic_filter = topic_filter
        self.reason_code = reason_code


class PublishRefused(TransportError):
    """The broker answered a publish with an error, e.g. 0x87 not authorised."""

    def __init__(self, topic: str, reason_code: int, reason: str) -> None:
        super().__init__(
            f"the broker refused to publish on {topic!r}: {reason} (0x{reason_code:02x}); "
            "check the client's name and the broker's access rules"
        )
        self.topic = topic
        self.reason_code = reason_code


class PacketTooLarge(TransportError):
    """A whole MQTT packet would exceed what the broker accepts; sizes in bytes."""

    def __init__(self, topic: str, size: int, limit: int) -> None:
        super().__init__(
            f"a packet of {size} bytes for {topic!r} is above the broker's limit of {limit} bytes; "
            "send smaller chunks or raise the broker's maximum packet size"
        )
        self.topic = topic
        self.size = size
        self.limit = limit


class TopicError(BrokerError, ValueError):
    """A topic, fleet or device name outside the topic tree."""


class MessageError(BrokerError):
    """A payload that is not a valid message; `reason` is a short snake_case name for counters."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConfigError(BrokerError, ValueError):
    """A setting is missing or wrong; the message names the key, the value and what is allowed."""


class EmbeddedBrokerError(BrokerError):
    """The embedded broker could not be started or died."""


class PortTaken(EmbeddedBrokerError):
    """Another program listens on the port the broker should use."""
