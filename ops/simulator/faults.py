"""Faults of single messages, made by the broker when it hands a packet to who subscribed to it."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from ops.simulator.link import Packet

Action = Literal["lose", "duplicate", "reorder", "truncate", "flip", "late"]
Way = Literal["up", "down"]


@dataclass(slots=True)
class Fault:
    """What happens to the packets it applies to, until ``times`` of them have been hit.

    ``kind`` is the last part of the topic, ``way`` *up* for what devices send and *down* for all
    they receive, ``device`` the device that sent or receives; None means any. It applies from
    ``start`` to ``end``, in seconds of virtual time, to a ``share`` of the packets.

    - lose: never delivered; with QoS 1 too, as when a broker's queue is full
    - duplicate: delivered again ``delay_s`` later
    - reorder: delivered up to ``delay_s`` later, so that others overtake it
    - late: delivered ``delay_s`` later
    - truncate, flip: a random tail is cut off, or one random bit is inverted
    """

    action: Action
    kind: str | None = None
    way: Way | None = None
    device: str | None = None
    start: float = 0.0
    end: float = math.inf
    share: float = 1.0
    times: int | None = None
    delay_s: float = 1.0
    hits: int = 0

    def applies(self, packet: Packet, way: Way, device: str | None, now: float) -> bool:
        """Whether this packet may be hit."""
        return (
            (self.kind is None or packet.address.kind == self.kind)
            and (self.way is None or way == self.way)
            and (self.device is None or device == self.device)
            and self.start <= now < self.end
            and (self.times is None or self.hits < self.times)
        )


@dataclass(slots=True)
class Faults:
    """All that are in force; ``counts`` by (action, way, kind)."""

    rng: random.Random
    by_reference: bool = False
    """Whether messages are not in frames that something could happen to."""
    active: list[Fault] = field(default_factory=list)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, fault: Fault) -> Fault:
        """Put a fault in force; the same object, to read its ``hits``."""
        assert not self.by_reference, "messages that pass by reference have no faults"
        self.active.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults."""
        self.active.clear()

    def deliveries(self, packet: Packet, receiver: str, now: float) -> list[tuple[float, Packet]]:
        """When, in seconds from now, and as what a packet for ``receiver`` is delivered."""
        way: Way = "up" if packet.address.direction == "up" else "down"
        device = packet.address.device if way == "up" else receiver
        copies = [(0.0, packet)]
        for fault in self.active:
            if not fault.applies(packet, way, device, now) or self.rng.random() >= fault.share:
                continue
            fault.hits += 1
            self.counts[fault.action, way, packet.address.kind] += 1
            copies = [hit for delay, copy in copies for hit in self._hit(fault, delay, copy)]
        return copies

    def _hit(self, fault: Fault, delay: float, packet: Packet) -> list[tuple[float, Packet]]:
        payload = packet.payload
        assert isinstance(payload, bytes)
        match fault.action:
            case "lose":
                return []
            case "duplicate":
                return [(delay, packet), (delay + fault.delay_s, packet)]
            case "reorder":
                return [(delay + self.rng.random() * fault.delay_s, packet)]
            case "late":
                return [(delay + fault.delay_s, packet)]
            case "truncate":
                kept = self.rng.randrange(len(payload)) if payload else 0
                return [(delay, self._damaged(packet, payload[:kept]))]
            case "flip":
                damaged = bytearray(payload)
                if damaged:
                    damaged[self.rng.randrange(len(damaged))] ^= 1 << self.rng.randrange(8)
                return [(delay, self._damaged(packet, bytes(damaged)))]

    def _damaged(self, packet: Packet, payload: bytes) -> Packet:
        return replace(packet, payload=payload, opened=None)
