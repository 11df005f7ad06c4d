"""Messages on their way into a process: in order, and read only as far as there is room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from broker.drive import HOUSEKEEPING_S, INBOX, Event
from broker.envelopes import Envelope
from broker.link import Arrival, Framing
from broker.transport import MAX_WAITING_QOS0
from ops.simulator.broker import Broker
from ops.simulator.by_reference import ReferenceFraming
from ops.simulator.connection import Connection
from ops.simulator.link import Packet
from ops.simulator.program import Tally
from ops.simulator.world import Event as Due
from ops.simulator.world import World


class Receiver:
    """The receiving half of a process in one of its lives, over all of its connections.

    What is not read is not acknowledged; of QoS 0 only so much waits, the rest is lost. A frozen
    process is given what is to be done then by ``is_frozen``, to do it later.
    """

    def __init__(
        self,
        world: World,
        broker: Broker,
        framing: Framing,
        tally: Tally,
        is_frozen: Callable[[Callable[[], None]], bool],
    ) -> None:
        self._world = world
        self._broker = broker
        self._framing = framing
        self._tally = tally
        self._is_frozen = is_frozen
        self._arrived: deque[tuple[Packet, Connection]] = deque()
        self._arrived_qos0 = 0
        self._house_due: Due | None = None

    def __len__(self) -> int:
        """Packets that have not been read."""
        return len(self._arrived)

    def arrive(self, packet: Packet, connection: Connection) -> bool:
        """A packet is there; False if it is lost."""
        if packet.qos == 0:
            if self._arrived_qos0 >= MAX_WAITING_QOS0:
                self._tally.lost_qos0 += 1
                return False
            self._arrived_qos0 += 1
        self._arrived.append((packet, connection))
        self._tally.most_arrived = max(self._tally.most_arrived, len(self._arrived))
        return True

    def resume(self) -> None:
        """The session goes on with a new connection: what was not acknowledged comes again."""
        self._arrived = deque(pair for pair in self._arrived if pair[0].qos == 0)

    def read(self, inbox: deque[Event]) -> None:
        """Take what has arrived into the inbox as far as there is room; the rest is not read."""
        while self._arrived and len(inbox) < INBOX:
            packet, connection = self._arrived.popleft()
            envelope = self._open(packet)
            if packet.qos:
                self._broker.acknowledged(connection)
            else:
                self._arrived_qos0 -= 1
            if envelope is not None:
                inbox.append(Arrival(envelope))
            elif self._framing.held_bytes and self._house_due is None:
                self._house_due = self._world.after(HOUSEKEEPING_S, self._keep_house)
        self._tally.most_inbox = max(self._tally.most_inbox, len(inbox))

    def close(self) -> None:
        """The life is over."""
        if self._house_due is not None:
            self._house_due.cancel()
        self._house_due = None

    def _open(self, packet: Packet) -> Envelope | None:
        # What goes to many is the same for all of them, and decoded for the first.
        if packet.opened is not None:
            return Envelope(packet.address, packet.opened)
        framing = self._framing
        if isinstance(packet.payload, bytes):
            envelope = framing.open(packet.topic, packet.payload)
        else:
            assert isinstance(framing, ReferenceFraming)
            envelope = framing.unwrap(packet.address, packet.payload)
        if envelope is not None and packet.whole:
            packet.opened = envelope.message
        return envelope

    def _keep_house(self) -> None:
        self._house_due = None
        if self._is_frozen(self._keep_house):
            return
        self._framing.expire()
        if self._framing.held_bytes:
            self._house_due = self._world.after(HOUSEKEEPING_S, self._keep_house)
