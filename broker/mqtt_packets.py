"""MQTT 5 PUBLISH packets as they arrive, without what their sender says beside topic and payload.

Brokers forward properties (section 3.3.2.3 of the standard) from any client as they are. Nobody
here asks for them, so they are not read: what is put there can neither be wrong nor take time.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.errors import TransportError

_LONGEST_NUMBER = 4
"""Bytes of a variable byte integer (section 1.5.5)."""


@dataclass(frozen=True, slots=True)
class Publish:
    """A PUBLISH packet; ``packet_id`` is 0 at QoS 0."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    packet_id: int


def read_publish(first: int, rest: bytes | bytearray) -> Publish:
    """The packet with this first byte and this behind its length; QoS 0 or 1.

    Raises TransportError for what is no such packet.
    """
    qos = (first >> 1) & 3
    if qos > 1:
        raise TransportError(f"the broker sent a packet of QoS {qos}, which nobody asked for")
    name, at = _read(rest, 2, int.from_bytes(rest[:2]))
    number, at = _read(rest, at, 2 if qos else 0)
    length, at = _read_length(rest, at)
    _, at = _read(rest, at, length)
    return Publish(
        name.decode(), bytes(memoryview(rest)[at:]), qos, bool(first & 1), int.from_bytes(number)
    )


def _read(rest: bytes | bytearray, at: int, size: int) -> tuple[bytes | bytearray, int]:
    """So many bytes, and where what follows them begins."""
    if at + size > len(rest):
        raise TransportError("the broker sent a packet that is too short")
    return rest[at : at + size], at + size


def _read_length(rest: bytes | bytearray, at: int) -> tuple[int, int]:
    """A variable byte integer, and where what follows it begins."""
    length = 0
    for index, byte in enumerate(rest[at : at + _LONGEST_NUMBER]):
        length |= (byte & 127) << (7 * index)
        if byte < 128:
            return length, at + index + 1
    raise TransportError("the broker sent a packet whose properties have no length")
