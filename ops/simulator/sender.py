"""Messages on their way out of a process: in order, and only so many at once."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

from broker.drive import SENDING
from broker.envelopes import Envelope
from broker.link import MEASURED_BYTES, Framing
from broker.topics import Address
from broker.transport import packet_size
from ops.simulator.by_reference import ReferenceFraming
from ops.simulator.connection import Connection, Subscription
from ops.simulator.link import Packet, Parcel
from ops.simulator.world import Event, World

Wire = Callable[[Envelope], int]
"""A message → bytes that it takes on the wire in addition, where what is sent is a stand-in."""


class Sender:
    """The sending half of a connection. A QoS 1 message has a slot until it is acknowledged."""

    def __init__(
        self,
        world: World,
        connection: Connection,
        framing: Framing,
        freed: Callable[[], None],
        wire: Wire | None,
        sent_bytes: Counter[str],
    ) -> None:
        self.connection = connection
        self._world = world
        self._framing = framing
        self._freed = freed
        self._wire = wire
        self._sent_bytes = sent_bytes
        self._waiting: deque[tuple[float, int, Address]] = deque()
        self._due: Event | None = None

    @property
    def ready(self) -> bool:
        """Whether a slot is free."""
        if len(self._waiting) < SENDING:
            return True
        self.settle()
        return len(self._waiting) < SENDING

    @property
    def idle(self) -> bool:
        """Whether everything has been acknowledged."""
        self.settle()
        return not self._waiting

    def send(self, envelope: Envelope) -> None:
        """Put a message on its way."""
        topic, qos, frames = self._close(envelope)
        extra = self._wire(envelope) if self._wire is not None else 0
        size = extra
        to_many = len(frames) == 1 and envelope.address.scope != "device"
        for index, frame in enumerate(frames, 1 - len(frames)):
            length = packet_size(topic, frame, qos)
            if not index:
                length += extra
            size += len(frame)
            packet = Packet(
                envelope.address, topic, frame, qos, length, last=not index, whole=to_many
            )
            self._sent_bytes[envelope.address.kind] += length
            self.connection.up.send(length, packet)
        if qos:
            self._waiting.append((self._world.now, size, envelope.address))
            if size >= MEASURED_BYTES:
                self.wait()  # the machine may want to know how long it took
        else:
            self._framing.sent(envelope.address, size, None)

    def subscribe(self, add: tuple[str, ...], drop: tuple[str, ...]) -> None:
        """Change what is subscribed to, after everything that was sent before."""
        size = sum(map(len, (*add, *drop)))
        self.connection.up.send(size, Subscription(add, drop))

    def settle(self) -> None:
        """Free the slots of what has been acknowledged by now."""
        acks = self.connection.acks
        limit = min(self._world.now, self.connection.cut_off)
        while acks and acks[0] <= limit:
            started, size, address = self._waiting.popleft()
            self._framing.sent(address, size, acks.popleft() - started)

    def wait(self) -> None:
        """Call ``freed`` as soon as something is acknowledged."""
        acks = self.connection.acks
        if self._due is not None:
            return
        if not acks:
            self.connection.on_ack = self._acknowledged
        elif acks[0] <= self.connection.cut_off:
            self._due = self._world.at(acks[0], self._free)

    def _close(self, envelope: Envelope) -> tuple[str, int, Sequence[bytes | Parcel]]:
        framing = self._framing
        if isinstance(framing, ReferenceFraming):
            return framing.wrap(envelope)
        return framing.close(envelope)

    def _acknowledged(self) -> None:
        self.connection.on_ack = None
        self.wait()

    def _free(self) -> None:
        self._due = None
        self.settle()
        self._freed()
