"""The seam between splitfleet and MQTT: what a transport promises, whatever carries it.

Two twins implement it: `broker.mqtt.MqttTransport` and `broker.memory.MemoryTransport`. One
contract suite (tests/broker/test_contract.py) holds both to the same behaviour.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sized
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

NOT_AUTHORIZED = 0x87
SESSION_TAKEN_OVER = 0x8E

# QoS 0 promises nothing, so beyond this many waiting packets it is dropped and counted. QoS 1 is
# never dropped: Receive Maximum bounds it.
MAX_WAITING_QOS0 = 1024


def _no_ack() -> None:
    """Nothing to acknowledge at QoS 0."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A message that arrived.

    Call `ack()` once it is safe (at QoS 1): until then it counts against this client's Receive
    Maximum and is delivered again after a reconnect. A second call, or one after the connection it
    came on was lost, does nothing. Acknowledgements reach the broker in the order of arrival, so
    one that is kept back keeps back those after it.
    """

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    ack: Callable[[], None] = _no_ack


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the broker announced when it accepted the connection; None means no limit announced."""

    max_packet_size: int | None = None
    """Largest whole packet in bytes the broker accepts."""
    receive_maximum: int | None = None
    """How many QoS 1 publishes the broker takes before it has acknowledged the first."""
    session_expiry_s: float | None = None
    """How long the broker keeps the session of a client that is away."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection is up and every remembered subscription is in place."""

    session_present: bool
    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone, or an attempt failed; the transport goes on trying by itself."""

    reason: str


Event = Packet | Connected | Disconnected


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes (QoS 1) for a client that vanished without saying goodbye."""

    topic: str
    payload: bytes
    retain: bool = False
    delay_s: int = 0


@dataclass(frozen=True, slots=True)
class Features:
    """What a kind of broker does beyond the core that every broker here must have."""

    receive_maximum: bool
    """Stops sending when the client's Receive Maximum is reached."""
    max_packet_size: bool
    """Announces its Maximum Packet Size, so that too large a packet is refused at once."""
    access_control: bool
    """Enforces access rules, and refuses a foreign publish with 0x87."""
    will_delay: bool
    """Waits for the will's delay, and forgets the will when the client is back before."""


class Transport(Protocol):
    """One MQTT client that reconnects by itself. Belongs to one event loop.

    `async with` returns at once; `Connected` arrives through `receive()`. Leaving it disconnects
    cleanly, so that the will is not published.
    """

    @property
    def client_id(self) -> str: ...

    @property
    def connected(self) -> bool: ...

    @property
    def dropped(self) -> int:
        """QoS 0 packets dropped because nobody received them, since the start."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        """Send one packet; at QoS 1 return when the broker acknowledged it.

        Concurrent calls (`asyncio.gather`) are sent in the order in which they were made. Raises
        NotConnected, PublishRefused, PacketTooLarge, or TransportError when the time is up. After
        any error but the two refusals the packet may or may not have been delivered.
        """
        ...

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Add subscriptions.

        They are remembered and made again on every new connection; without a connection this
        returns at once. Raises SubscribeRefused and forgets the refused ones.
        """
        ...

    async def unsubscribe(self, *filters: str) -> None:
        """Drop subscriptions, here and at the broker."""
        ...

    async def receive(self) -> Event:
        """The next event, in order. May be cancelled without losing one.

        Raises ConnectRefused when the broker refused this client for good, and NotConnected after
        the transport was closed.
        """
        ...

    def drop(self) -> None:
        """Cut the connection as a broken network would; the transport reconnects by itself."""
        ...

    def abort(self) -> None:
        """Cut the connection and stay away, as `kill -9` would: the broker publishes the will."""
        ...


class Backoff:
    """Jittered exponential back-off: delay n is uniform in [d/2, d], d = initial·2ⁿ, capped."""

    def __init__(self, initial_s: float, maximum_s: float, rng: random.Random) -> None:
        self._initial_s = initial_s
        self._maximum_s = maximum_s
        self._rng = rng
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        # 2**62 keeps the float finite; the cap is reached long before.
        delay = min(self._maximum_s, self._initial_s * 2.0 ** min(self._failures, 62))
        self._failures += 1
        return delay * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """The last attempt worked; start small again."""
        self._failures = 0


class Inbox:
    """The events waiting for `receive()`: first in, first out; an error ends it for good."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._qos0 = 0
        self._error: Exception | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.dropped = 0

    def put(self, event: Event) -> None:
        """Add an event; too many waiting QoS 0 packets are dropped and counted."""
        if isinstance(event, Packet) and event.qos == 0:
            if self._qos0 >= MAX_WAITING_QOS0:
                self.dropped += 1
                return
            self._qos0 += 1
        if (
            isinstance(event, Disconnected)
            and self._events
            and isinstance(self._events[-1], Disconnected)
        ):
            self._events.pop()  # while nobody listens, the newest reason is enough
        self._events.append(event)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Raise `error` from `get()` once the waiting events are read. The first error counts."""
        self._error = self._error or error
        self._wake()

    def discard_unacknowledged(self) -> None:
        """Forget QoS 1 packets of lost connections: the resumed session delivers them again."""
        kept = [event for event in self._events if not isinstance(event, Packet) or event.qos == 0]
        self._events = deque(kept)

    async def get(self) -> Event:
        """The next event, or the error."""
        while not self._events:
            if self._error is not None:
                self._wake()
                raise self._error
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        event = self._events.popleft()
        if isinstance(event, Packet) and event.qos == 0:
            self._qos0 -= 1
        if self._events:
            self._wake()
        return event

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


def packet_size(topic: str, payload: Sized, qos: int) -> int:
    """Bytes of a whole MQTT 5 PUBLISH packet without properties."""
    remaining = 2 + len(topic.encode()) + (2 if qos else 0) + 1 + len(payload)
    length_bytes = 1 + (remaining > 127) + (remaining > 16_383) + (remaining > 2_097_151)
    return 1 + length_bytes + remaining
