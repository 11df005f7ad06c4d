"""A simulated MQTT broker: what a real one promises, on virtual time.

Filters with wildcards, retained messages, QoS 1 sessions that outlive a connection, with a bounded
queue and a bounded number of unacknowledged packets, redelivery after a reconnect, wills with
delay, and the end of a connection whose other side has been silent for too long.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from broker.topics import Topics
from broker.transport import Will
from ops.simulator.connection import Connection, Goodbye, Item, Subscription
from ops.simulator.faults import Faults
from ops.simulator.link import Packet
from ops.simulator.tree import Tree
from ops.simulator.world import Event, World

SESSION_EXPIRY_S = 3600.0
RECEIVE_MAXIMUM = 64
MAX_QUEUED = 1000
KEEPALIVE_S = 30.0


@dataclass(slots=True)
class Session:
    """What the broker knows of one client."""

    client: str
    filters: dict[str, None] = field(default_factory=dict)
    queue: deque[Packet] = field(default_factory=deque)
    inflight: deque[Packet] = field(default_factory=deque)
    acks: deque[float] = field(default_factory=deque)
    """When the acknowledgements of the oldest in flight arrive, as far as they are under way."""
    connection: Connection | None = None
    will: Will | None = None
    will_due: Event | None = None
    expiry: Event | None = None
    pump_due: Event | None = None
    most_queued: int = 0
    dropped: int = 0


class Broker:
    """Routes packets between connections. ``faults`` say what happens to single ones.

    ``service_s`` is how long each packet keeps the broker busy.
    """

    def __init__(
        self,
        world: World,
        topics: Topics,
        *,
        max_queued: int = MAX_QUEUED,
        keepalive_s: float = KEEPALIVE_S,
        session_expiry_s: float = SESSION_EXPIRY_S,
    ) -> None:
        self.world = world
        self.topics = topics
        self.keepalive_s = keepalive_s
        self.faults = Faults(world.rng("faults"))
        self.service_s = 0.0
        self.alive = True
        self.frozen = False
        self.routed = 0
        self.most_queued = 0
        self.dropped = 0
        """Packets that found a session's queue full."""
        self._max_queued = max_queued
        self._session_expiry_s = session_expiry_s
        self._sessions: dict[str, Session] = {}
        self._filters: Tree[dict[str, Session]] = Tree()
        self._retained: Tree[Packet] = Tree()
        self._routes: dict[str, list[Session]] = {}
        self._backlog: list[tuple[Connection, Item]] = []
        self._free = 0.0
        self._connections = 0

    # -- faults of the broker itself --------------------------------------------------------------

    def kill(self) -> None:
        """Die: every client's connection breaks, and they see it at once."""
        self.alive = self.frozen = False
        self._backlog.clear()
        for session in list(self._sessions.values()):
            for event in (session.will_due, session.expiry):
                if event is not None:
                    event.cancel()
            session.will_due = session.expiry = None
            if session.connection is not None:
                session.connection.end("the broker closed the connection")

    def restart(self, *, keep_sessions: bool = True) -> None:
        """Come back after :meth:`kill`, with what a persistent broker has on disk, or with nothing.

        Wills are not kept: nobody is announced dead for having been connected to a dead broker.
        """
        self.alive = True
        if not keep_sessions:
            self._sessions.clear()
            self._filters = Tree()
            self._retained = Tree()
            self._routes.clear()
        for session in self._sessions.values():
            self._start_expiry(session)

    def freeze(self) -> None:
        """Do nothing any more; clients give their connections up after a while."""
        self.frozen = True
        for session in self._sessions.values():
            if session.connection is not None:
                session.connection.silence("broker")

    def thaw(self) -> None:
        """Go on where it stood."""
        self.frozen = False
        backlog, self._backlog = self._backlog, []
        for connection, item in backlog:
            self._handle(connection, item)
        for session in list(self._sessions.values()):
            current = session.connection
            if current is not None:
                current.sign_of_life("broker")
                if current.over:
                    current.end_at_broker()

    # -- clients ----------------------------------------------------------------------------------

    @property
    def sessions(self) -> dict[str, Session]:
        """By client; to look at."""
        return self._sessions

    def next_connection(self) -> int:
        """A number for a new connection."""
        self._connections += 1
        return self._connections

    def attach(
        self, connection: Connection, filters: tuple[str, ...], will: Will | None, *, clean: bool
    ) -> bool:
        """Take a client's connection; whether its session was resumed."""
        session = self._sessions.get(connection.client)
        if session is not None and session.connection is not None:
            old = session.connection
            session.connection = None
            old.end("another client took over")
        if session is not None and clean:
            self._end_session(session, with_will=session.will_due is not None)
            session = None
        resumed = session is not None
        if session is None:
            session = self._sessions[connection.client] = Session(connection.client)
        for event in (session.will_due, session.expiry):
            if event is not None:
                event.cancel()
        session.will_due = session.expiry = None
        session.connection, session.will = connection, will
        session.queue.extendleft(reversed(session.inflight))
        session.inflight.clear()
        session.acks.clear()
        self._pump(session)
        self._subscribe(session, Subscription(filters))
        return resumed

    def detached(self, connection: Connection, *, clean: bool) -> None:
        """A connection is over as far as the broker is concerned."""
        session = self._sessions.get(connection.client)
        if session is None or session.connection is not connection:
            return
        self._settle(session)
        session.connection = None
        if clean:
            self._end_session(session, with_will=False)
        elif self.alive:
            self._start_expiry(session)
            will = session.will
            if will is not None:
                session.will_due = self.world.after(
                    min(will.delay_s, self._session_expiry_s), lambda: self._publish_will(session)
                )

    def acknowledged(self, connection: Connection) -> None:
        """The client has taken the oldest packet that it had not acknowledged."""
        session = self._sessions.get(connection.client)
        if session is None or session.connection is not connection:
            return
        session.acks.append(self.world.now + connection.latency_s)
        if session.queue:
            self._pump_when_acknowledged(session)

    def pump(self, client: str) -> None:
        """Send what waits for a client, as far as it may be sent."""
        if client in self._sessions:
            self._pump(self._sessions[client])

    def arrived(self, connection: Connection, item: Item) -> None:
        """Something has come through a client's pipe."""
        if not self.alive:
            return
        if self.frozen:
            self._backlog.append((connection, item))
        elif self.service_s:
            self._free = max(self.world.now, self._free) + self.service_s
            self.world.at(self._free, lambda: self._handle_later(connection, item))
        else:
            self._handle(connection, item)

    # -- inside -----------------------------------------------------------------------------------

    def _handle_later(self, connection: Connection, item: Item) -> None:
        if self.frozen:
            self._backlog.append((connection, item))
        elif self.alive:
            self._handle(connection, item)

    def _handle(self, connection: Connection, item: Item) -> None:
        session = self._sessions.get(connection.client)
        known = session is not None and session.connection is connection
        match item:
            case Packet():
                self._route(item)
                if item.last and item.qos:
                    connection.acks.append(self.world.now + connection.latency_s)
                    if connection.on_ack is not None:
                        connection.on_ack()
            case Subscription():
                if session is not None and known:
                    self._subscribe(session, item)
            case Goodbye():
                connection.end_at_broker(clean=True)

    def _route(self, packet: Packet) -> None:
        self.routed += 1
        if packet.address.retained:
            self._retained.put(packet.topic, packet)
        routes = self._routes.get(packet.topic)
        if routes is None:
            found: dict[str, Session] = {}
            for sessions in self._filters.matching(packet.topic):
                found |= sessions
            routes = self._routes[packet.topic] = list(found.values())
        for session in routes:
            self._deliver(session, packet)

    def _deliver(self, session: Session, packet: Packet) -> None:
        if not self.faults.active:
            self._enqueue(session, packet)
            return
        for delay, copy in self.faults.deliveries(packet, session.client, self.world.now):
            if delay:
                self._enqueue_later(session, copy, delay)
            else:
                self._enqueue(session, copy)

    def _enqueue_later(self, session: Session, packet: Packet, delay: float) -> None:
        def enqueue() -> None:
            if self._sessions.get(session.client) is session and self.alive:
                self._enqueue(session, packet)

        self.world.after(delay, enqueue)

    def _enqueue(self, session: Session, packet: Packet) -> None:
        if packet.qos == 0:
            if session.connection is not None:
                session.connection.down.send(packet.size, packet)
            return
        if len(session.queue) >= self._max_queued:
            session.dropped += 1
            self.dropped += 1
            return
        session.queue.append(packet)
        self._pump(session)
        waiting = len(session.queue)
        if waiting > session.most_queued:
            session.most_queued = waiting
            self.most_queued = max(self.most_queued, waiting)

    def _pump(self, session: Session) -> None:
        connection, queue, inflight = session.connection, session.queue, session.inflight
        if connection is None or self.frozen:
            return
        while queue:
            if len(inflight) >= RECEIVE_MAXIMUM:
                self._settle(session)
                if len(inflight) >= RECEIVE_MAXIMUM:
                    break
            packet = queue.popleft()
            inflight.append(packet)
            connection.down.send(packet.size, packet)
        if queue:
            self._pump_when_acknowledged(session)

    def _pump_when_acknowledged(self, session: Session) -> None:
        connection, acks = session.connection, session.acks
        # An acknowledgement that is cut off on its way arrives with the next sign of life.
        if (
            session.pump_due is None
            and connection is not None
            and acks
            and acks[0] <= connection.cut_off
        ):
            session.pump_due = self.world.at(acks[0], lambda: self._pump_again(session))

    def _pump_again(self, session: Session) -> None:
        session.pump_due = None
        self._pump(session)

    def _settle(self, session: Session) -> None:
        """Forget what is acknowledged."""
        connection = session.connection
        assert connection is not None
        limit = min(self.world.now, connection.cut_off)
        while session.acks and session.acks[0] <= limit:
            session.acks.popleft()
            session.inflight.popleft()

    def _subscribe(self, session: Session, wanted: Subscription) -> None:
        self._routes.clear()
        for topic_filter in wanted.drop:
            if session.filters.pop(topic_filter, True) is None:
                self._holders(topic_filter).pop(session.client, None)
        for topic_filter in wanted.add:
            session.filters[topic_filter] = None
            self._holders(topic_filter)[session.client] = session
            for packet in self._retained.matched(topic_filter):
                self._deliver(session, packet)

    def _holders(self, topic_filter: str) -> dict[str, Session]:
        holders = self._filters.get(topic_filter)
        if holders is None:
            holders = {}
            self._filters.put(topic_filter, holders)
        return holders

    def _publish_will(self, session: Session) -> None:
        session.will_due = None
        will, session.will = session.will, None
        if will is not None and self.alive:
            address, size = self.topics.parse(will.topic), len(will.payload)
            self._route(Packet(address, will.topic, will.payload, 1, size))

    def _start_expiry(self, session: Session) -> None:
        if session.connection is None and session.expiry is None:
            session.expiry = self.world.after(
                self._session_expiry_s, lambda: self._end_session(session, with_will=True)
            )

    def _end_session(self, session: Session, *, with_will: bool) -> None:
        if self._sessions.get(session.client) is not session:
            return
        del self._sessions[session.client]
        self._routes.clear()
        for topic_filter in session.filters:
            self._holders(topic_filter).pop(session.client, None)
        for event in (session.will_due, session.expiry, session.pump_due):
            if event is not None:
                event.cancel()
        if with_will:
            self._publish_will(session)
