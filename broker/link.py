"""The link: typed messages over a transport, for either end.

Outgoing messages are encoded, cut into frames and published; incoming frames are acknowledged once
they are in the bounded reassembly buffer, put together, decoded and validated. What is wrong with
them is counted by reason, logged and dropped: it never reaches the caller.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from broker.envelopes import Envelope, channel, decode_message, encode_message
from broker.errors import MessageError, TopicError
from broker.fields import Message
from broker.frames import OVERHEAD, Limits, Reassembler, split
from broker.messages import LOSSY
from broker.topics import SYSTEM, Address, Topics
from broker.transport import Connected, Disconnected, Transport

log = logging.getLogger("splitfleet.link")
DEFAULT_CHUNK_BYTES = 96 << 10
MEASURED_BYTES = 64 << 10
LATENCY_BYTES = 2 << 10
"""A message smaller than that takes about as long as an empty one."""


Admit = Callable[[Address, int], str | None]


def _all(address: Address, size: int) -> None:
    del address, size


class LinkObserver(Protocol):
    """Told what crosses a link; sizes are application payload in bytes, frames included."""

    def sent(self, address: Address, size: int) -> None: ...

    def received(self, address: Address, size: int) -> None: ...

    def dropped(self, reason: str, device: str | None) -> None: ...


def single_frame(message: Message) -> bytes:
    """The only frame of a small message, e.g. for a last will."""
    (frame,) = split(encode_message(message), 0, DEFAULT_CHUNK_BYTES)
    return frame


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that arrived whole."""

    envelope: Envelope


class Framing:
    """The part of a link that does no I/O: messages to frames and back, and what was dropped.

    ``first_id`` is the number of the first message sent; see ``broker.frames`` for how long numbers
    must not repeat. ``admit`` says why a packet from there, of so many bytes, is dropped unread, or
    None.
    """

    def __init__(
        self,
        topics: Topics,
        *,
        observer: LinkObserver,
        clock: Callable[[], float],
        first_id: int,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        limits: Limits | None = None,
        admit: Admit = _all,
    ) -> None:
        self._topics = topics
        self._admit = admit
        self._observer = observer
        self._clock = clock
        self._configured_chunk = chunk_bytes
        self._chunk = chunk_bytes
        self._frames = Reassembler(limits or Limits())
        self._next_id = first_id
        self.uplink_bytes_per_s = 0.0
        """Speed to the broker, its latency not counted; 0 if unknown.

        As last measured on activations or on a message of 64 KiB or more.
        """
        self._latency_s: float | None = None

    @property
    def held_bytes(self) -> int:
        """What incomplete messages take."""
        return self._frames.held_bytes

    def connected(self, max_packet_size: int | None) -> None:
        """A new connection, to a broker that takes packets of this size."""
        room = (max_packet_size or 1 << 28) - OVERHEAD
        # Where there is no room at all, PacketTooLarge will say what to do.
        self._chunk = min(self._configured_chunk, room if room > 0 else 1 << 28)
        self._latency_s = None

    def close(self, envelope: Envelope) -> tuple[str, int, list[bytes]]:
        """Topic, QoS and frames of a message."""
        address = envelope.address
        self._next_id += 1
        frames = list(split(encode_message(envelope.message), self._next_id, self._chunk))
        return self._topics.format(address), 0 if channel(address) in LOSSY else 1, frames

    def sent(self, address: Address, size: int, elapsed_s: float | None) -> None:
        """A message of so many bytes was acknowledged after so long; None at QoS 0."""
        if elapsed_s is not None:
            self._measure(address, size, max(1e-6, elapsed_s))
        self._observer.sent(address, size)

    def open(self, topic: str, payload: bytes) -> Envelope | None:
        """The message that this frame completes, unless something is wrong with it."""
        device: str | None = None
        try:
            address = self._topics.parse(topic)
            device = address.device
            self._observer.received(address, len(payload))
            unwanted = self._admit(address, len(payload))
            if unwanted is not None:
                self.drop(unwanted, device, f"it is {unwanted.replace('_', ' ')}")
                return None
            whole = self._frames.add(device or "", topic, payload, self._clock())
            if whole is None:
                return None
            return Envelope(address, decode_message(address, whole))
        except TopicError as exc:
            self.drop("unexpected_topic", None, str(exc))
        except MessageError as exc:
            self.drop(exc.reason, device, str(exc))
        return None

    def expire(self) -> None:
        """Drop messages that have been incomplete for too long. Call now and then."""
        for sender in self._frames.expire(self._clock()):
            self.drop("reassembly_timeout", sender, "a message stayed incomplete")

    def drop(self, reason: str, device: str | None, why: str) -> None:
        """Count and log a dropped message."""
        self._observer.dropped(reason, device)
        about = {"device": device, "reason": reason}
        log.warning("dropped a message of %s: %s", device or "the fleet", why, extra=about)

    def _measure(self, address: Address, size: int, elapsed_s: float) -> None:
        if address.kind == "activations" or size >= MEASURED_BYTES:
            # Latency hides behind other batches; what remains after it may be noise.
            transfer_s = max(elapsed_s - (self._latency_s or 0.0), 0.1 * elapsed_s)
            self.uplink_bytes_per_s = size / transfer_s
        elif size < LATENCY_BYTES:
            self._latency_s = min(elapsed_s, self._latency_s or elapsed_s)


class Link:
    """Sends and receives messages. Belongs to one event loop, as its transport does.

    ``admit`` is asked about every packet, see :class:`Framing`. ``system`` is told what the broker
    says of itself, topic and payload, if that is subscribed to.
    """

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        *,
        observer: LinkObserver,
        clock: Callable[[], float],
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        limits: Limits | None = None,
        admit: Admit = _all,
        system: Callable[[str, bytes], None] | None = None,
    ) -> None:
        self._transport = transport
        self._system = system
        self._clock = clock
        self._framing = Framing(
            topics,
            observer=observer,
            clock=clock,
            first_id=random.getrandbits(32),
            chunk_bytes=chunk_bytes,
            limits=limits,
            admit=admit,
        )
        self.drop = self._framing.drop

    @property
    def uplink_bytes_per_s(self) -> float:
        """See :class:`Framing`."""
        return self._framing.uplink_bytes_per_s

    def expire(self) -> None:
        """See :class:`Framing`."""
        self._framing.expire()

    async def send(self, envelope: Envelope) -> None:
        """Publish a message; returns when the broker has acknowledged every frame (QoS 1).

        Raises the transport's errors; then the message may have arrived or not.
        """
        address = envelope.address
        topic, qos, frames = self._framing.close(envelope)
        started = self._clock()
        # Tasks start in the order of their creation, which is the order on the wire.
        await asyncio.gather(
            *(
                self._transport.publish(topic, frame, qos=qos, retain=address.retained)
                for frame in frames
            )
        )
        elapsed_s = self._clock() - started if qos else None
        self._framing.sent(address, sum(map(len, frames)), elapsed_s)

    async def subscribe(self, *filters: str) -> None:
        """Subscribe now and on every reconnection."""
        await self._transport.subscribe(*filters)

    async def unsubscribe(self, *filters: str) -> None:
        """Drop subscriptions."""
        await self._transport.unsubscribe(*filters)

    async def receive(self) -> Arrival | Connected | Disconnected:
        """The next whole, valid message or change of the connection. May be cancelled."""
        while True:
            event = await self._transport.receive()
            match event:
                case Connected():
                    log.info("connected to the broker")
                    self._framing.connected(event.capabilities.max_packet_size)
                    return event
                case Disconnected(reason):
                    log.warning("no connection to the broker (%s); trying again", reason)
                    return event
            if self._system is not None and event.topic.startswith(SYSTEM):
                self._system(event.topic, event.payload)
                event.ack()
                continue
            envelope = self._framing.open(event.topic, event.payload)
            event.ack()
            if envelope is not None:
                return Arrival(envelope)
