"""The MQTT 5 transport of splitfleet.

It stands on aiomqtt (with paho-mqtt 2). aiomqtt is the library formerly named asyncio-mqtt: the
last release under that name breaks with paho-mqtt 2, so whoever looks for asyncio-mqtt wants
aiomqtt. Only `broker.mqtt_client` touches the library; here is what keeps a client connected: a new
connection for each attempt, jittered back-off, subscriptions made again, the session resumed. TLS
files are read for each attempt, too: certificates are renewed while a client runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from types import TracebackType
from typing import Self

import aiomqtt
from paho.mqtt.reasoncodes import ReasonCode

from broker.config import BrokerConfig
from broker.errors import (
    ConfigError,
    ConnectRefused,
    NotConnected,
    SubscribeRefused,
    TransportError,
)
from broker.mqtt_client import Client
from broker.tls import explain_tls, tls_context
from broker.transport import (
    SESSION_TAKEN_OVER,
    Backoff,
    Connected,
    Disconnected,
    Event,
    Inbox,
    Packet,
    Will,
)

# CONNACK codes after which trying again cannot help: unsupported version, client id not valid, bad
# credentials, not authorised, banned, bad authentication method.
FATAL_CODES = frozenset({0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C})


class MqttTransport:
    """A client of an MQTT 5 broker; see `broker.transport.Transport` for what it promises.

    Raises ConfigError when the TLS files of `config` cannot be used.
    """

    def __init__(
        self,
        config: BrokerConfig,
        client_id: str,
        *,
        will: Will | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.client_id = client_id
        self._config = config
        self._will = will
        if config.tls:
            tls_context(config)
        self._backoff = Backoff(
            config.backoff_initial_s, config.backoff_max_s, rng or random.Random()
        )
        self._filters: dict[str, int] = {}
        self._inbox = Inbox()
        self._early: list[Packet] | None = None
        self._client: Client | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._client is not None and not self._client.lost.done()

    @property
    def dropped(self) -> int:
        return self._inbox.dropped

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=f"mqtt {self.client_id}")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        if self._client is not None:
            await self._client.close()
        self._finish("closed")

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        client = self._client
        if client is None or client.lost.done():
            raise NotConnected("there is no connection to the broker; wait for Connected")
        await client.send(topic, payload, qos=qos, retain=retain)

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        wanted = dict.fromkeys(filters, qos)
        self._filters |= wanted
        if self._client is not None:
            try:
                await self._client.add(wanted)
            except SubscribeRefused as exc:
                self._filters.pop(exc.topic_filter, None)
                raise
            except NotConnected:
                return  # made on the next connection

    async def unsubscribe(self, *filters: str) -> None:
        for topic_filter in filters:
            self._filters.pop(topic_filter, None)
        if self._client is not None:
            with contextlib.suppress(NotConnected):
                await self._client.remove(filters)

    async def receive(self) -> Event:
        return await self._inbox.get()

    def drop(self) -> None:
        if self._client is not None:
            self._client.drop()

    def abort(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._client is not None:
            self._client.kill("aborted")
        self._finish("aborted")

    def _finish(self, reason: str) -> None:
        if self._client is not None:
            self._client = None
            self._inbox.put(Disconnected(reason))
        self._inbox.fail(NotConnected(f"the transport is {reason}"))

    async def _run(self) -> None:
        try:
            await self._stay_connected()
        except Exception as exc:  # noqa: BLE001 whoever receives must hear of it, not wait for ever
            self._inbox.fail(exc)

    async def _stay_connected(self) -> None:
        clean_start = True
        while True:
            try:
                client = await self._connect(clean_start=clean_start)
            except ConnectRefused as exc:
                self._inbox.fail(exc)
                return
            except (OSError, TimeoutError, aiomqtt.MqttError, TransportError, ConfigError) as exc:
                self._inbox.put(Disconnected(self._explain(exc)))
            else:
                clean_start = False
                self._backoff.reset()
                await asyncio.wait({client.lost})
                self._client = None
                client.kill("lost")
                self._inbox.put(Disconnected(client.lost.result()))
                if client.taken_over:
                    self._inbox.fail(self._taken_over())
                    return
            await asyncio.sleep(self._backoff.next())

    async def _connect(self, *, clean_start: bool) -> Client:
        self._early = []
        if clean_start:
            # A broker may tie the end of a session to its start, as MQTT 3 did (rumqttd does). So
            # what a former process left is cleaned by a connection of its own.
            cleaning = await self._open(clean_start=True)
            await cleaning.close()
        client = await self._open(clean_start=False)
        self._client = client
        try:
            if self._filters:
                await client.add(dict(self._filters))
        except TransportError:
            self._client = None
            client.kill("the subscriptions could not be made")
            raise
        if client.session_present:
            self._inbox.discard_unacknowledged()
        self._inbox.put(Connected(client.session_present, client.capabilities))
        early, self._early = self._early, None
        for packet in early:
            self._inbox.put(packet)
        return client

    async def _open(self, *, clean_start: bool) -> Client:
        client = Client(
            self._config,
            self.client_id,
            self._will,
            tls_context(self._config) if self._config.tls else None,
            clean_start=clean_start,
            deliver=self._deliver,
        )
        try:
            await client.open()
        except aiomqtt.MqttCodeError as exc:
            code = exc.rc.value if isinstance(exc.rc, ReasonCode) else exc.rc
            if code not in FATAL_CODES:
                raise
            raise ConnectRefused(
                f"{self._config.url} refused client {self.client_id!r}: {exc}; "
                "check certificate, username and password, and the broker's access rules",
                code,
            ) from exc
        return client

    def _deliver(self, packet: Packet) -> None:
        # A resumed session delivers at once; its packets must come after Connected.
        if self._early is not None:
            self._early.append(packet)
        else:
            self._inbox.put(packet)

    def _explain(self, exc: Exception) -> str:
        if isinstance(exc, TimeoutError) and not str(exc):
            return f"{self._config.url} did not answer within {self._config.connect_timeout_s:g} s"
        if isinstance(exc, ConnectionRefusedError):
            return f"nobody listens at {self._config.url}; is the broker running?"
        if isinstance(exc, ConfigError):
            return str(exc)
        if isinstance(exc.__context__, ssl.SSLError):  # the library's error says less
            return f"{self._config.url}: {explain_tls(exc.__context__)}"
        return f"{self._config.url}: {exc}"

    def _taken_over(self) -> ConnectRefused:
        return ConnectRefused(
            f"another client took over the client id {self.client_id!r}; give every client its own",
            SESSION_TAKEN_OVER,
        )
