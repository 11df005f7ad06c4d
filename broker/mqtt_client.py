"""One connection: aiomqtt's client with its callbacks replaced. Used by `broker.mqtt` only.

This is the only module that touches private parts of aiomqtt and paho-mqtt;
tests/broker/test_mqtt_adapter.py fails when they move. What is changed, and why:

- the reason code of every PUBACK and SUBACK becomes an error of `broker.errors`;
- the server's Receive Maximum and Maximum Packet Size, which the library drops, are kept;
- arriving packets are acknowledged by their receiver, so that our Receive Maximum holds the broker
  back and nothing is acknowledged first and discarded later;
- the properties of arriving packets are skipped (`broker.mqtt_packets`): the library rejects some
  that a broker forwards, which would end the connection whenever that packet comes again;
- a lost connection fails every waiting call at once, and every wait has a bound;
- several packets are read and written in one turn of the event loop.
"""

# ruff: noqa: SLF001 (see above)

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker.config import BrokerConfig
from broker.errors import (
    NotConnected,
    PacketTooLarge,
    PublishRefused,
    SubscribeRefused,
    TransportError,
)
from broker.mqtt_packets import read_publish
from broker.sockets import open_socket, secure
from broker.tls import why_lost
from broker.transport import SESSION_TAKEN_OVER, Capabilities, Packet, Will, packet_size

# Bounds what is copied into the write buffer at once; the server may ask for less.
MAX_IN_FLIGHT = 64
# Packets read in one turn of the event loop before others get theirs.
READS_PER_TURN = 16
UNSPECIFIED_ERROR = 0x80


class Client(aiomqtt.Client):
    """One connection: the library's client with its callbacks replaced by ours."""

    def __init__(
        self,
        config: BrokerConfig,
        client_id: str,
        will: Will | None,
        tls: ssl.SSLContext | None,
        *,
        clean_start: bool,
        deliver: Callable[[Packet], None],
    ) -> None:
        connect = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        connect.SessionExpiryInterval = config.session_expiry_s
        connect.ReceiveMaximum = config.receive_maximum
        connect.MaximumPacketSize = config.max_packet_size
        password = config.password
        super().__init__(
            config.host,
            config.port,
            username=config.username,
            password=None if password is None else password.get_secret_value(),
            identifier=client_id,
            protocol=aiomqtt.ProtocolVersion.V5,
            will=None if will is None else _library_will(will),
            timeout=config.connect_timeout_s,
            keepalive=config.keepalive_s,
            clean_start=clean_start,
            properties=connect,
        )
        self._client.manual_ack_set(on=True)
        self._client.disable_logger()  # what matters is raised or in `lost`
        self._client._handle_publish = self._take_in  # type: ignore[method-assign]
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.taken_over = False
        self.session_present = False
        self.capabilities = Capabilities()
        self._config = config
        self._tls = tls
        self._deliver = deliver
        self._loop_thread = threading.get_ident()
        self._handle: socket.socket | None = None
        self._secured: ssl.SSLSocket | None = None
        self._pending: dict[int, asyncio.Future[list[ReasonCode]]] = {}
        # Arrived packets in order: serial number -> packet id, which the broker uses again.
        self._unacknowledged: dict[int, int] = {}
        self._ready: set[int] = set()
        self._arrived = 0

    async def open(self) -> None:
        """Connect. Raises OSError, TimeoutError or aiomqtt.MqttError, and leaves nothing behind."""
        async with asyncio.timeout(self._config.connect_timeout_s):
            sock = await open_socket(self._config.host, self._config.port)
        # A second handle on the same connection: shutting it down ends even a TLS handshake that a
        # thread is busy with.
        self._handle = sock.dup()
        self._client._create_socket = partial(self._secure, sock)  # type: ignore[method-assign]
        entering = asyncio.ensure_future(self.__aenter__())
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await asyncio.shield(entering)
        except BaseException:
            self.drop()
            await asyncio.wait({entering}, timeout=self._config.connect_timeout_s)
            if entering.done() and not entering.cancelled():
                entering.exception()
            self.kill("the connection could not be made")
            sock.close()
            raise

    def _secure(self, sock: socket.socket) -> socket.socket:
        # Called in the thread in which the library connects. Its own TLS leaks the socket when the
        # handshake fails.
        if self._tls is None:
            return sock
        self._secured = secure(sock, self._tls, self._config.host, self._config.connect_timeout_s)
        return self._secured

    async def close(self) -> None:
        """Say goodbye, so that the will is not published and the session ends."""
        try:
            if not self.lost.done():
                goodbye = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call]
                goodbye.SessionExpiryInterval = 0
                self._client.disconnect(properties=goodbye)
                await asyncio.wait({self.lost}, timeout=self._config.connect_timeout_s)
        finally:
            self.kill("closed")

    def drop(self) -> None:
        """Cut the connection as the network would; `lost` follows."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self._handle.shutdown(socket.SHUT_RDWR)

    def kill(self, reason: str) -> None:
        """Cut the connection and release everything, at once."""
        self.drop()
        self._client._sock_close()
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        self._lose(reason)

    async def send(self, topic: str, payload: bytes, *, qos: int, retain: bool) -> None:
        """Publish; returns when acknowledged (QoS 1) or written to the socket (QoS 0)."""
        size, limit = packet_size(topic, payload, qos), self.capabilities.max_packet_size
        if limit is not None and size > limit:
            raise PacketTooLarge(topic, size, limit)
        info = self._client.publish(topic, payload, qos, retain)
        _check(info.rc, "publish")
        (code,) = await self._answer(info.mid, f"the publish on {topic!r}")
        if code.is_failure:
            raise PublishRefused(topic, code.value, str(code))

    async def add(self, filters: dict[str, int]) -> None:
        """Subscribe to all of `filters` (filter -> QoS) in one packet."""
        result, mid = self._client.subscribe(list(filters.items()))
        _check(result, "subscribe")
        assert mid is not None
        for topic_filter, code in zip(filters, await self._answer(mid, "subscribe"), strict=True):
            if code.is_failure:
                raise SubscribeRefused(topic_filter, code.value, str(code))

    async def remove(self, filters: Iterable[str]) -> None:
        """Unsubscribe from all of `filters` in one packet."""
        result, mid = self._client.unsubscribe(list(filters))
        _check(result, "unsubscribe")
        assert mid is not None
        await self._answer(mid, "unsubscribe")

    async def _answer(self, mid: int, what: str) -> list[ReasonCode]:
        if mid in self._pending:
            raise TransportError(f"{what} failed: all 65535 packet ids wait for an answer")
        answer: asyncio.Future[list[ReasonCode]] = self._loop.create_future()
        self._pending[mid] = answer
        try:
            async with asyncio.timeout(self._config.publish_timeout_s):
                return await answer
        except TimeoutError:
            raise TransportError(
                f"the broker did not acknowledge {what} within {self._config.publish_timeout_s:g} s"
            ) from None
        finally:
            del self._pending[mid]

    def _acknowledge(self, serial: int) -> None:
        if self.lost.done() or serial not in self._unacknowledged:
            return
        self._ready.add(serial)
        # MQTT 5, 4.6: in the order of arrival. rumqttd cuts the connection otherwise.
        while (first := next(iter(self._unacknowledged), None)) in self._ready:
            assert first is not None
            self._ready.discard(first)
            self._client.ack(self._unacknowledged.pop(first), 1)

    def _lose(self, reason: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(reason)
        # The library's own futures must not keep an error that nobody reads: asyncio complains.
        if not self._connected.done():
            self._connected.set_exception(aiomqtt.MqttError(reason))
            self._connected.exception()
        if not self._disconnected.done():
            self._disconnected.set_result(None)
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(NotConnected(f"the connection to the broker ended: {reason}"))

    # What follows replaces the library's reading of PUBLISH packets, and its callbacks.

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        said = properties.json() if properties is not None else {}  # type: ignore[no-untyped-call]
        receive_maximum = said.get("ReceiveMaximum", 65_535)
        self.session_present = flags.session_present
        self.capabilities = Capabilities(
            max_packet_size=min(
                said.get("MaximumPacketSize", self._config.max_packet_size),
                self._config.max_packet_size,
            ),
            receive_maximum=receive_maximum,
            session_expiry_s=said.get("SessionExpiryInterval", self._config.session_expiry_s),
        )
        # The public setter refuses after connecting, but the number is known only now.
        client._max_inflight_messages = min(MAX_IN_FLIGHT, receive_maximum)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self,
        _client: paho.Client,
        _userdata: Any,
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        _properties: Properties | None = None,
    ) -> None:
        self.taken_over = reason_code.value == SESSION_TAKEN_OVER
        told = flags.is_disconnect_packet_from_server or reason_code.value != UNSPECIFIED_ERROR
        lost = why_lost(self._secured, answered=self._connected.done())
        self._lose(str(reason_code) if told else lost)

    def _take_in(self) -> MQTTErrorCode:
        arrived = self._client._in_packet
        packet = read_publish(arrived["command"], arrived["packet"])
        if not packet.qos:
            self._deliver(Packet(packet.topic, packet.payload, 0, packet.retain))
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        self._arrived += 1
        self._unacknowledged[self._arrived] = packet.packet_id
        if len(self._unacknowledged) > self._config.receive_maximum:
            # A broker that ignores our Receive Maximum may stop answering, even our publishes, when
            # too much is unacknowledged (rumqttd at 100). The packets are safe with us.
            self._acknowledge(next(iter(self._unacknowledged)))
        acknowledge = partial(self._acknowledge, self._arrived)
        self._deliver(Packet(packet.topic, packet.payload, packet.qos, packet.retain, acknowledge))
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _on_publish(
        self,
        _client: paho.Client,
        _userdata: Any,
        mid: int,
        reason_code: ReasonCode,
        _properties: Properties,
    ) -> None:
        self._resolve(mid, [reason_code])

    def _on_subscribe(
        self,
        _client: paho.Client,
        _userdata: Any,
        mid: int,
        reason_codes: list[ReasonCode],
        _properties: Properties | None = None,
    ) -> None:
        self._resolve(mid, reason_codes)

    def _on_unsubscribe(
        self,
        _client: paho.Client,
        _userdata: Any,
        mid: int,
        reason_codes: list[ReasonCode],
        _properties: Properties | None = None,
    ) -> None:
        self._resolve(mid, reason_codes)

    def _resolve(self, mid: int, codes: list[ReasonCode]) -> None:
        answer = self._pending.get(mid)
        if answer is not None and not answer.done():
            answer.set_result(codes)

    def _on_socket_open(self, _client: paho.Client, _userdata: Any, sock: Any) -> None:
        # The library calls this from the thread in which it connects.
        def start() -> None:
            self._loop.add_reader(sock.fileno(), self._read)
            self._misc_task = self._loop.create_task(self._misc_loop())

        self._loop.call_soon_threadsafe(start)

    def _on_socket_close(self, _client: paho.Client, _userdata: Any, sock: Any) -> None:
        if sock.fileno() > -1:
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())
        if self._misc_task is not None:
            self._misc_task.cancel()

    def _on_socket_register_write(self, _client: paho.Client, _userdata: Any, _sock: Any) -> None:
        if threading.get_ident() == self._loop_thread:
            self._loop.call_soon(self._write)
        else:
            self._loop.call_soon_threadsafe(self._write)

    def _on_socket_unregister_write(self, _client: paho.Client, _userdata: Any, _sock: Any) -> None:
        """Nothing: `_write` itself stops watching the socket."""

    def _read(self) -> None:
        try:
            for _ in range(READS_PER_TURN):
                packet = self._client._in_packet
                self._client.loop_read()
                # The library replaces this object when a packet is complete; else all is read.
                if self._client._in_packet is packet:
                    break
        except Exception as exc:  # noqa: BLE001 a malformed packet must end the connection, not us
            self.kill(f"{type(exc).__name__}: {exc}")
            return
        sock = self._client.socket()
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            self._loop.call_soon(self._read)  # decrypted already: the loop would not tell

    def _write(self) -> None:
        try:
            self._client.loop_write()
        except Exception as exc:  # noqa: BLE001 as above
            self.kill(f"{type(exc).__name__}: {exc}")
            return
        sock = self._client.socket()
        if sock is None:
            return
        if self._client.want_write():
            self._loop.add_writer(sock.fileno(), self._write)
        else:
            self._loop.remove_writer(sock.fileno())


def _library_will(will: Will) -> aiomqtt.Will:
    properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
    properties.WillDelayInterval = will.delay_s
    return aiomqtt.Will(will.topic, will.payload, 1, will.retain, properties)


def _check(result: int, what: str) -> None:
    if result == paho.MQTT_ERR_NO_CONN:
        raise NotConnected(f"cannot {what}: the connection to the broker is gone")
    if result != paho.MQTT_ERR_SUCCESS:
        raise TransportError(f"cannot {what}: {paho.error_string(MQTTErrorCode(result))}")
