"""The network between a process and the broker: two pipes that keep the order of what they carry.

What a network loses, TCP sends again: to whoever reads it, loss is delay. So packets in a pipe
arrive late, or not at all because the connection broke. Messages that really are lost, doubled or
damaged are made by ``faults``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from broker.fields import Message
from broker.topics import Address
from ops.simulator.world import World

T = TypeVar("T")
RESEND_S = 0.2
"""The least time until TCP sends a lost packet again."""
MOST_RESEND_S = 120.0
"""The most; so has Linux (RFC 6298 wants at least 60). Without it the mean delay would not exist
from a loss of one half on."""


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """One device's way to the broker.

    ``latency_s`` is one way. ``jitter_s`` is the mean of a delay, exponentially distributed, that
    each packet has in addition; ``loss`` the probability that one has to be sent again.
    """

    up_bytes_per_s: float = math.inf
    down_bytes_per_s: float = math.inf
    latency_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0

    @property
    def mean_delay_s(self) -> float:
        """Of a packet, beside the time to send it; each wait is twice as long as the one before."""
        delay, share = self.latency_s + self.jitter_s, self.loss
        wait = self.first_resend_s
        while wait < MOST_RESEND_S:
            delay += share * wait
            share *= self.loss
            wait *= 2
        return delay + MOST_RESEND_S * share / (1 - self.loss)

    @property
    def first_resend_s(self) -> float:
        """How long a packet that is lost for the first time is waited for."""
        return min(MOST_RESEND_S, max(RESEND_S, 2 * self.latency_s))


IDEAL = LinkProfile()


@dataclass(frozen=True, slots=True)
class Parcel:
    """Stands for a frame of ``size`` bytes; ``message`` in the last one of a message."""

    size: int
    message: Message | None = None

    def __len__(self) -> int:
        return self.size


@dataclass(slots=True)
class Packet:
    """One MQTT publish. ``size`` is what it takes on the wire, in bytes."""

    address: Address
    topic: str
    payload: bytes | Parcel
    qos: int
    size: int
    last: bool = True
    """Whether it is the last frame of its message."""
    whole: bool = False
    """Whether it is the only one, of a message to many."""
    opened: Message | None = None
    """The message it holds alone, once somebody has opened it."""


class Pipe(Generic[T]):
    """One direction of a connection."""

    def __init__(
        self,
        world: World,
        profile: LinkProfile,
        bytes_per_s: float,
        rng: random.Random,
        deliver: Callable[[T], None],
    ) -> None:
        self._world = world
        self._profile = profile
        self._bytes_per_s = bytes_per_s
        self._rng = rng
        self._deliver = deliver
        self._free = 0.0
        self._last = 0.0
        self._held: list[T] | None = None
        self._open = True
        self.bytes = 0

    def send(self, size: int, item: T) -> None:
        """Let ``item`` arrive after everything that was sent before it."""
        now, profile = self._world.now, self._profile
        self.bytes += size
        self._free = max(now, self._free) + size / self._bytes_per_s
        delay = profile.latency_s
        if profile.jitter_s:
            delay += self._rng.expovariate(1 / profile.jitter_s)
        if profile.loss:
            wait = profile.first_resend_s
            while self._rng.random() < profile.loss:
                delay += wait
                wait = min(MOST_RESEND_S, 2 * wait)
        self._last = max(self._last, self._free + delay)
        self._world.at(self._last, lambda: self._arrive(item))

    def hold(self) -> None:
        """Keep what arrives until :meth:`release`."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        """Deliver what was held, and the rest as it comes."""
        held, self._held = self._held or [], None
        for item in held:
            self._arrive(item)

    def close(self) -> None:
        """What is still on its way never arrives."""
        self._open = False
        self._held = None

    def _arrive(self, item: T) -> None:
        if not self._open:
            return
        if self._held is not None:
            self._held.append(item)
        else:
            self._deliver(item)
