"""The adapter around the MQTT library: what the library does not do, and what it must not move.

A scripted server stands in for brokers that behave badly or in ways no broker here does.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import aiomqtt
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from broker.config import BrokerConfig
from broker.errors import (
    ConfigError,
    ConnectRefused,
    NotConnected,
    SubscribeRefused,
    TransportError,
)
from broker.mqtt import MqttTransport
from broker.mqtt_client import Client
from broker.transport import Connected, Disconnected, Event, Packet
from tests.guarded_broker import GuardedBroker

ACCEPTED = bytes([0x20, 3, 0, 0, 0])
CONNECT, PUBLISH, PUBACK, SUBSCRIBE, DISCONNECT = 1, 3, 4, 8, 14
LIMIT_S = 60.0

Script = Callable[["Session"], Awaitable[None]]


class Session:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> tuple[int, bytes]:
        """Packet type, and the packet behind its length."""
        kind = (await self._reader.readexactly(1))[0] >> 4
        length, shift = 0, 0
        while True:
            byte = (await self._reader.readexactly(1))[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return kind, await self._reader.readexactly(length)

    async def expect(self, wanted: int) -> bytes:
        kind, body = await self.read()
        assert kind == wanted, kind
        return body

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def accept(self, connack: bytes = ACCEPTED) -> None:
        await self.expect(CONNECT)
        await self.send(connack)


class Server:
    """Plays a script on every connection after the one with which a client cleans its session."""

    def __init__(self, script: Script, *, cleaning: bool = True) -> None:
        self._script = script
        self._cleaning = cleaning
        self.sessions = 0
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"mqtt://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(reader, writer)
        try:
            if self._cleaning:
                self._cleaning = False
                await session.accept()
                await session.expect(DISCONNECT)
            else:
                self.sessions += 1
                await self._script(session)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def against(
    script: Script,
    *,
    cleaning: bool = True,
    publish_timeout_s: float = 20,
    connect_timeout_s: float = 20,
    connected: bool = True,
    receive_maximum: int = 64,
) -> AsyncIterator[MqttTransport]:
    async with Server(script, cleaning=cleaning) as server:
        config = BrokerConfig(
            url=server.url,
            receive_maximum=receive_maximum,
            publish_timeout_s=publish_timeout_s,
            connect_timeout_s=connect_timeout_s,
            backoff_initial_s=0.01,
            backoff_max_s=0.05,
        )
        async with MqttTransport(config, "client") as transport:
            if connected:
                assert isinstance(await event(transport), Connected)
            yield transport


async def event(transport: MqttTransport) -> Event:
    return await asyncio.wait_for(transport.receive(), LIMIT_S)


async def silent(session: Session) -> None:
    await session.accept()
    while True:
        await session.read()


@pytest.mark.parametrize("size", [1, 100_000])
async def test_a_publish_without_acknowledgement_ends_in_time(size: int) -> None:
    async with against(silent, publish_timeout_s=0.3) as transport:
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(TransportError, match="did not acknowledge"):
                await transport.publish("t", bytes(size), qos=1)


async def test_a_subscription_without_acknowledgement_ends_in_time() -> None:
    async with against(silent, publish_timeout_s=0.3) as transport:
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(TransportError, match="did not acknowledge"):
                await transport.subscribe("t")


async def test_a_qos_0_publish_to_a_stuck_server_ends_in_time() -> None:
    stuck = asyncio.Event()

    async def never_reads(session: Session) -> None:
        await session.accept()
        await stuck.wait()

    async with against(never_reads, publish_timeout_s=0.3) as transport:
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(TransportError, match="did not acknowledge"):
                await asyncio.gather(
                    *(transport.publish("t", bytes(100_000), qos=0) for _ in range(300))
                )
        stuck.set()


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_lost_connection_fails_all_waiting_publishes_at_once(qos: int) -> None:
    async def hangs_up(session: Session) -> None:
        await session.accept()
        await session.expect(PUBLISH)

    async with against(hangs_up) as transport:
        async with asyncio.timeout(LIMIT_S):
            results = await asyncio.gather(
                *(transport.publish("t", bytes(100_000), qos=qos) for _ in range(100)),
                return_exceptions=True,
            )
        lost = [result for result in results if isinstance(result, NotConnected)]
        # At QoS 0 the first ones were done when they were written.
        assert results[-len(lost) :] == lost
        assert len(lost) == 100 if qos == 1 else lost


async def test_the_servers_receive_maximum_is_kept() -> None:
    in_flight: list[int] = []

    async def takes_two(session: Session) -> None:
        await session.accept(bytes([0x20, 6, 0, 0, 3, 0x21, 0, 2]))
        waiting = []
        for _ in range(5):
            for _ in range(2):
                body = await session.expect(PUBLISH)
                waiting.append(body[3:5])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.read(), 0.05)
            in_flight.append(len(waiting))
            for mid in waiting:
                await session.send(bytes([0x40, 2]) + mid)
            waiting.clear()
        await session.read()

    async with against(takes_two) as transport:
        await asyncio.gather(*(transport.publish("t", b"x", qos=1) for _ in range(10)))
    assert in_flight == [2] * 5


async def test_a_refused_subscription_is_an_error_and_forgotten() -> None:
    async def refuses(session: Session) -> None:
        await session.accept()
        while True:
            kind, body = await session.read()
            if kind == SUBSCRIBE:
                await session.send(bytes([0x90, 4]) + body[:2] + bytes([0, 0x87]))

    async with against(refuses) as transport:
        with pytest.raises(SubscribeRefused, match="'t'") as caught:
            await transport.subscribe("t")
        assert caught.value.reason_code == 0x87
        transport.drop()
        assert isinstance(await event(transport), Disconnected)
        # A second SUBSCRIBE would come before Connected, and be refused.
        assert isinstance(await event(transport), Connected)


@pytest.mark.parametrize("code", [0x84, 0x85, 0x86, 0x87, 0x8A])
async def test_a_refusal_for_good_is_raised_and_not_repeated(code: int) -> None:
    async def refuses(session: Session) -> None:
        await session.accept(bytes([0x20, 3, 0, code, 0]))

    async with against(refuses, cleaning=False, connected=False) as transport:
        with pytest.raises(ConnectRefused) as caught:
            await event(transport)
        assert caught.value.reason_code == code


@pytest.mark.parametrize("answer", [bytes([0x20, 3, 0, 0x88, 0]), b"", b"HTTP/1.1 400\r\n\r\n"])
async def test_any_other_failure_is_tried_again(answer: bytes) -> None:
    async def fails(session: Session) -> None:
        await session.accept(answer)

    async with against(fails, cleaning=False, connected=False) as transport:
        async with asyncio.timeout(LIMIT_S):
            for _ in range(2):
                assert isinstance(await event(transport), Disconnected)


async def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    async def mute(session: Session) -> None:
        await session.read()
        await session.read()

    async with against(mute, cleaning=False, connected=False, connect_timeout_s=0.2) as transport:
        happened = await event(transport)
        assert isinstance(happened, Disconnected)
        assert "did not answer" in happened.reason or "timed out" in happened.reason


async def test_a_client_that_was_taken_over_does_not_come_back() -> None:
    async def takes_over(session: Session) -> None:
        await session.accept()
        await session.send(bytes([0xE0, 2, 0x8E, 0]))

    async with against(takes_over) as transport:
        assert isinstance(await event(transport), Disconnected)
        with pytest.raises(ConnectRefused, match="its own"):
            await event(transport)


@pytest.mark.parametrize(
    "garbage",
    [
        bytes([0x00, 0]),
        bytes([0xF0, 255, 255, 255, 255, 127]),
        bytes([0x32, 1, 0]),
        bytes([0x32, 5, 0, 200, 0, 0, 0]),
        bytes([0x30, 7, 0, 1]) + b"t" + bytes([255, 255, 255, 255]),
        bytes([0x30, 4, 0, 1]) + b"t" + bytes([9]),
        bytes([0x34, 6, 0, 1]) + b"t" + bytes([0, 1, 0]),
        bytes([0x30, 4, 0, 1]) + bytes([255, 0]),
        bytes([0x40, 1, 0]),
        bytes([0x90, 2, 0, 9]),
    ],
)
async def test_a_malformed_packet_ends_the_connection_and_nothing_else(garbage: bytes) -> None:
    served = 0

    async def talks_nonsense(session: Session) -> None:
        nonlocal served
        served += 1
        await session.accept()
        if served == 1:
            await session.send(garbage)
            await session.read()
            await session.read()
        await session.send(bytes([0x30, 5, 0, 1]) + b"t\x00x")
        await session.read()

    async with against(talks_nonsense) as transport:
        while not isinstance(happened := await event(transport), Packet):
            pass
        assert happened.payload == b"x"


NO_STRING = bytes([0x26, 0, 3]) + "\ufeff".encode() + bytes([0, 0])
"""A user property that the library refuses, Mosquitto does not."""


@pytest.mark.parametrize(
    "properties",
    [NO_STRING, bytes([0x03, 0, 1, 0xFF]), bytes([0x7F]), 20_000 * bytes([0x26, 0, 0, 0, 0])],
)
async def test_what_a_stranger_puts_into_properties_is_not_looked_at(properties: bytes) -> None:
    count = len(properties)
    length = bytes([count & 127 | 128, count >> 7 & 127 | 128, count >> 14])

    async def forwards(session: Session) -> None:
        await session.accept()
        for first, mid in ((0x30, b""), (0x32, bytes([0, 1])), (0x33, bytes([0, 2]))):
            body = bytes([0, 1]) + b"t" + mid + length + properties + b"x"
            size = len(body)
            packed = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
            await session.send(bytes([first]) + packed + body)
        await session.expect(PUBACK)

    async with against(forwards) as transport:
        for qos, retain in ((0, False), (1, False), (1, True)):
            packet = await event(transport)
            assert isinstance(packet, Packet)
            assert (packet.topic, packet.payload) == ("t", b"x")
            assert (packet.qos, packet.retain) == (qos, retain)
            packet.ack()


async def test_many_packets_in_one_read_all_arrive() -> None:
    async def sends_many(session: Session) -> None:
        await session.accept()
        await session.send(
            b"".join(bytes([0x30, 5, 0, 1]) + b"t\x00" + bytes([i]) for i in range(200))
        )
        await session.read()

    async with against(sends_many) as transport:
        for i in range(200):
            packet = await event(transport)
            assert isinstance(packet, Packet)
            assert packet.payload == bytes([i])


async def test_a_server_above_our_receive_maximum_gets_the_oldest_acknowledged() -> None:
    answered: list[int] = []
    enough = asyncio.Event()

    async def sends_too_many(session: Session) -> None:
        await session.accept()
        for mid in range(1, 101):
            await session.send(bytes([0x32, 7, 0, 1]) + b"t" + bytes([0, mid, 0]) + b"x")
        while True:
            kind, body = await session.read()
            if kind != PUBACK:
                return
            answered.append(body[1])
            if len(answered) == 36:
                enough.set()

    async with against(sends_too_many) as transport:
        await asyncio.wait_for(enough.wait(), LIMIT_S)
        assert answered == list(range(1, 37))
        for _ in range(100):
            assert isinstance(await event(transport), Packet)


async def test_an_old_acknowledgement_does_not_count_for_a_new_packet_of_the_same_id() -> None:
    heard: list[int] = []

    async def uses_an_id_again(session: Session) -> None:
        await session.accept()
        for mid in (1, 2, 1):
            await session.send(bytes([0x32, 7, 0, 1]) + b"t" + bytes([0, mid, 0]) + b"x")
        while True:
            heard.append((await session.read())[0])

    async with against(uses_an_id_again, receive_maximum=1) as transport:
        first = await event(transport)
        for _ in range(2):
            assert isinstance(await event(transport), Packet)
        assert isinstance(first, Packet)
        first.ack()
        await transport.publish("t", b"marker", qos=0)
    assert heard[:3] == [PUBACK, PUBACK, PUBLISH]


async def test_leaving_while_connecting_leaves_nothing_behind() -> None:
    async def mute(session: Session) -> None:
        await session.read()
        await session.read()

    async with against(mute, cleaning=False, connected=False):
        await asyncio.sleep(0.05)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if "mqtt" in task.get_name()]


async def test_nobody_listening_is_said() -> None:
    config = BrokerConfig(url="mqtt://127.0.0.1:1")
    async with MqttTransport(config, "client") as transport:
        happened = await event(transport)
        assert isinstance(happened, Disconnected)
        assert happened.reason.startswith("nobody listens at mqtt://127.0.0.1:1;")


async def test_an_unknown_host_is_said() -> None:
    config = BrokerConfig(url="mqtt://nowhere.invalid")
    async with MqttTransport(config, "client") as transport:
        happened = await event(transport)
        assert isinstance(happened, Disconnected)
        assert "nowhere.invalid" in happened.reason


async def test_packets_pass_over_tls() -> None:
    with GuardedBroker() as broker:
        async with MqttTransport(broker.client("coordinator"), "coordinator") as transport:
            await transport.subscribe("splitfleet/lab/#")
            assert isinstance(await event(transport), Connected)
            payloads = [i.to_bytes(2, "big") + bytes(98_000) for i in range(50)]
            sending = asyncio.gather(
                *(transport.publish("splitfleet/lab/all/round", p, qos=1) for p in payloads)
            )
            for payload in payloads:
                packet = await event(transport)
                assert isinstance(packet, Packet)
                assert packet.payload == payload
                packet.ack()
            await sending


async def test_an_untrusted_certificate_is_said_and_tried_again() -> None:
    with GuardedBroker() as broker:
        async with MqttTransport(BrokerConfig(url=broker.url), "d1") as transport:
            happened = await event(transport)
            assert isinstance(happened, Disconnected)
            assert "certificate does not hold" in happened.reason


async def test_why_a_certificate_was_refused_is_said() -> None:
    with GuardedBroker() as broker:
        config = broker.client("d1", days_ago=3, backoff_initial_s=0.1)
        async with MqttTransport(config, "d1") as transport:
            # The broker's last words may be lost with the connection, but not every time.
            reasons = [await event(transport) for _ in range(8)]
    assert any("certificate: it has ended" in str(reason) for reason in reasons)


def test_unusable_tls_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    for ca_file in (file, tmp_path / "nothing.pem"):
        with pytest.raises(ConfigError, match=ca_file.name):
            MqttTransport(BrokerConfig(url="mqtts://x", ca_file=ca_file), "d1")


def test_the_parts_of_the_library_we_replace_or_touch_are_there() -> None:
    replaced = [
        name
        for name, member in vars(Client).items()
        if name.startswith("_on_") and inspect.isfunction(member)
    ]
    assert len(replaced) == 9
    for name in replaced:
        theirs = inspect.signature(getattr(aiomqtt.Client, name)).parameters
        ours = inspect.signature(getattr(Client, name)).parameters
        assert len(theirs) == len(ours), name
    for name in ("_create_socket", "_sock_close", "ack", "manual_ack_set"):
        assert callable(getattr(paho.Client, name))
    library = paho.Client(CallbackAPIVersion.VERSION2)
    assert isinstance(library._in_packet, dict)
    assert library._max_inflight_messages > 0
    assert not inspect.signature(library._handle_publish).parameters
    assert "self._handle_publish()" in inspect.getsource(paho.Client._packet_handle)


def test_the_library_replaces_a_complete_packet() -> None:
    # Client._read relies on it to know that more may be waiting.
    source = inspect.getsource(paho.Client._packet_read)
    assert source.count("self._in_packet = {") == 1
