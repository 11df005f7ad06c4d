"""The in-memory twin of an MQTT broker and its clients: same promises, one process, no sockets.

`MemoryBroker` routes between the `MemoryTransport`s of one event loop. It keeps what the system
relies on: wildcards, retained messages, wills with delay, QoS 1 sessions that outlive a connection,
a bounded queue per session, Receive Maximum, Maximum Packet Size and access rules.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Literal, Self

from broker.errors import ConnectRefused, NotConnected, PacketTooLarge, PublishRefused
from broker.topics import matches
from broker.transport import (
    NOT_AUTHORIZED,
    SESSION_TAKEN_OVER,
    Backoff,
    Capabilities,
    Connected,
    Disconnected,
    Event,
    Features,
    Inbox,
    Packet,
    Will,
    packet_size,
)

FEATURES = Features(
    receive_maximum=True, max_packet_size=True, access_control=True, will_delay=True
)

AccessRule = Callable[[str, Literal["read", "write"], str], bool]
"""(client id, access, topic) -> allowed."""


@dataclass(frozen=True, slots=True)
class _Message:
    topic: str
    payload: bytes
    qos: int
    retain: bool


@dataclass(slots=True)
class _Session:
    client_id: str
    receive_maximum: int
    will: Will | None
    connection: MemoryTransport | None = None
    subscriptions: dict[str, int] = field(default_factory=dict)
    waiting: deque[_Message] = field(default_factory=deque)
    unacknowledged: dict[int, _Message] = field(default_factory=dict)
    acknowledged: set[int] = field(default_factory=set)
    next_id: int = 0
    will_timer: asyncio.TimerHandle | None = None


class MemoryBroker:
    """Routes packets between transports.

    `max_queued` bounds the QoS 1 messages a session holds; beyond it they are dropped as Mosquitto
    does, and counted in `dropped`. `allow` is asked for every publish and every delivery.
    """

    def __init__(
        self,
        *,
        max_packet_size: int | None = None,
        max_queued: int = 10_000,
        allow: AccessRule | None = None,
    ) -> None:
        self.capabilities = Capabilities(max_packet_size=max_packet_size)
        self.dropped = 0
        self._max_queued = max_queued
        self._allow = allow
        self._running = True
        self._sessions: dict[str, _Session] = {}
        self._retained: dict[str, _Message] = {}

    @property
    def running(self) -> bool:
        return self._running

    def stop(self) -> None:
        """Go away, losing every connection but no session, until `start()`."""
        self._running = False
        for client_id in list(self._sessions):
            self.disconnect(client_id)

    def start(self) -> None:
        """Come back after `stop()`."""
        self._running = True

    def disconnect(self, client_id: str) -> None:
        """Cut one client off as a broken network would."""
        session = self._sessions.get(client_id)
        if session is not None and session.connection is not None:
            session.connection.drop()

    def connect(self, transport: MemoryTransport, *, clean_start: bool) -> bool:
        """Attach a transport; returns whether it resumed a session."""
        old = self._sessions.get(transport.client_id)
        if old is not None and old.connection is not None:
            old.connection.taken_over()
        if old is not None and clean_start:
            self._end_session(old)
            old = None
        session = old or _Session(transport.client_id, transport.receive_maximum, None)
        if session.will_timer is not None:
            session.will_timer.cancel()
            session.will_timer = None
        session.connection, session.will = transport, transport.will
        self._sessions[transport.client_id] = session
        return old is not None

    def deliver_waiting(self, client_id: str) -> None:
        """Send again what a resumed session had not acknowledged, then what waited for it."""
        session = self._sessions[client_id]
        session.waiting.extendleft(reversed(session.unacknowledged.values()))
        session.unacknowledged.clear()
        session.acknowledged.clear()
        self._pump(session)

    def detach(self, client_id: str, *, clean: bool) -> None:
        """A connection ended; unless it ended cleanly the will is due."""
        session = self._sessions[client_id]
        session.connection = None
        if clean:
            self._end_session(session, with_will=False)
        elif session.will is not None:
            delay_s = session.will.delay_s
            loop = asyncio.get_running_loop()
            session.will_timer = loop.call_later(delay_s, self._publish_will, session)

    def publish(self, client_id: str, message: _Message) -> None:
        """Check and route one message."""
        limit = self.capabilities.max_packet_size
        size = packet_size(message.topic, message.payload, message.qos)
        if limit is not None and size > limit:
            raise PacketTooLarge(message.topic, size, limit)
        if not self._allowed(client_id, "write", message.topic):
            if message.qos == 0:
                return
            raise PublishRefused(message.topic, NOT_AUTHORIZED, "Not authorized")
        self._route(message)

    def subscribe(self, client_id: str, topic_filter: str, qos: int) -> None:
        """Add a subscription and deliver the retained messages it matches."""
        session = self._sessions[client_id]
        session.subscriptions[topic_filter] = qos
        for message in list(self._retained.values()):
            if matches(topic_filter, message.topic):
                self._deliver(session, message, min(qos, message.qos), retain=True)

    def unsubscribe(self, client_id: str, topic_filter: str) -> None:
        """Remove a subscription."""
        self._sessions[client_id].subscriptions.pop(topic_filter, None)

    def _allowed(self, client_id: str, access: Literal["read", "write"], topic: str) -> bool:
        return self._allow is None or self._allow(client_id, access, topic)

    def _route(self, message: _Message) -> None:
        if message.retain and message.payload:
            self._retained[message.topic] = message
        elif message.retain:
            self._retained.pop(message.topic, None)
        for session in list(self._sessions.values()):
            granted = [
                qos
                for filter_, qos in session.subscriptions.items()
                if matches(filter_, message.topic)
            ]
            if granted:
                self._deliver(session, message, min(max(granted), message.qos), retain=False)

    def _deliver(self, session: _Session, message: _Message, qos: int, *, retain: bool) -> None:
        if not self._allowed(session.client_id, "read", message.topic):
            return
        if qos == 0:
            if session.connection is not None:
                packet = Packet(message.topic, message.payload, 0, retain)
                session.connection.inbox.put(packet)
            return
        if len(session.waiting) >= self._max_queued:
            self.dropped += 1
            return
        session.waiting.append(_Message(message.topic, message.payload, qos, retain))
        self._pump(session)

    def _pump(self, session: _Session) -> None:
        while (
            session.connection is not None
            and session.connection.connected
            and session.waiting
            and len(session.unacknowledged) < session.receive_maximum
        ):
            message = session.waiting.popleft()
            session.next_id += 1
            session.unacknowledged[session.next_id] = message
            acknowledge = partial(
                self._acknowledge, session, session.connection.generation, session.next_id
            )
            session.connection.inbox.put(
                Packet(message.topic, message.payload, message.qos, message.retain, acknowledge)
            )

    def _acknowledge(self, session: _Session, generation: int, message_id: int) -> None:
        connection = session.connection
        if connection is None or connection.generation != generation:
            return
        session.acknowledged.add(message_id)
        # As over MQTT, acknowledgements leave in the order of arrival.
        while (first := next(iter(session.unacknowledged), None)) in session.acknowledged:
            assert first is not None
            session.acknowledged.discard(first)
            del session.unacknowledged[first]
        self._pump(session)

    def _publish_will(self, session: _Session) -> None:
        session.will_timer = None
        will, session.will = session.will, None
        if will is not None and self._allowed(session.client_id, "write", will.topic):
            self._route(_Message(will.topic, will.payload, 1, will.retain))

    def _end_session(self, session: _Session, *, with_will: bool = True) -> None:
        del self._sessions[session.client_id]
        if session.will_timer is not None:
            session.will_timer.cancel()
            # MQTT 5, 3.1.3.2.2: the will is due when the session ends, if that is before its delay.
            if with_will:
                self._publish_will(session)


class MemoryTransport:
    """A client of a `MemoryBroker`; see `broker.transport.Transport` for what it promises."""

    def __init__(
        self,
        broker: MemoryBroker,
        client_id: str,
        *,
        will: Will | None = None,
        receive_maximum: int = 64,
        backoff: Backoff | None = None,
    ) -> None:
        self.client_id = client_id
        self.will = will
        self.receive_maximum = receive_maximum
        self.inbox = Inbox()
        self.connected = False
        self.generation = 0
        self._broker = broker
        self._backoff = backoff or Backoff(0.001, 0.05, random.Random(client_id))
        self._filters: dict[str, int] = {}
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def dropped(self) -> int:
        return self.inbox.dropped

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._stay_connected())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()
        self._detach("closed", clean=True)
        self._finish()

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        self._require_connection()
        self._broker.publish(self.client_id, _Message(topic, bytes(payload), qos, retain))
        await asyncio.sleep(0)

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        for topic_filter in filters:
            self._filters[topic_filter] = qos
            if self.connected:
                self._broker.subscribe(self.client_id, topic_filter, qos)
        await asyncio.sleep(0)

    async def unsubscribe(self, *filters: str) -> None:
        for topic_filter in filters:
            self._filters.pop(topic_filter, None)
            if self.connected:
                self._broker.unsubscribe(self.client_id, topic_filter)
        await asyncio.sleep(0)

    async def receive(self) -> Event:
        return await self.inbox.get()

    def drop(self) -> None:
        self._detach("the connection was cut", clean=False)

    def abort(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._detach("aborted", clean=False)
        self._finish()

    def taken_over(self) -> None:
        """Another client connected with this one's id."""
        if self._task is not None:
            self._task.cancel()
        self._detach("taken over", clean=False)
        self.inbox.fail(
            ConnectRefused(
                f"another client took over the client id {self.client_id!r}; "
                "give every client its own",
                SESSION_TAKEN_OVER,
            )
        )

    def _require_connection(self) -> None:
        if not self.connected:
            raise NotConnected("there is no connection to the broker; wait for Connected")

    async def _stay_connected(self) -> None:
        while True:
            if self._broker.running:
                self._connect()
                self._backoff.reset()
                await self._lost.wait()
            else:
                self.inbox.put(Disconnected("the broker is not running"))
            await asyncio.sleep(self._backoff.next())

    def _connect(self) -> None:
        self._lost.clear()
        first = self.generation == 0
        self.generation += 1
        session_present = self._broker.connect(self, clean_start=first)
        if session_present:
            self.inbox.discard_unacknowledged()
        self.inbox.put(Connected(session_present, self._broker.capabilities))
        self.connected = True
        self._broker.deliver_waiting(self.client_id)
        for topic_filter, qos in self._filters.items():
            self._broker.subscribe(self.client_id, topic_filter, qos)

    def _detach(self, reason: str, *, clean: bool) -> None:
        if not self.connected:
            return
        self.connected = False
        self.inbox.put(Disconnected(reason))
        self._broker.detach(self.client_id, clean=clean)
        self._lost.set()

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _finish(self) -> None:
        self.inbox.fail(NotConnected("the transport is closed"))
