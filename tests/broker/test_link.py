from __future__ import annotations

import logging
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any, Self

import msgpack
import pytest

from broker.envelopes import Envelope, encode_message, to_all, to_cut, up
from broker.errors import PacketTooLarge, TransportError
from broker.fields import Message
from broker.frames import OVERHEAD, Limits, split
from broker.link import Arrival, Link, single_frame
from broker.maps import Pieces
from broker.memory import MemoryBroker, MemoryTransport
from broker.messages import Coordinator, Parameters, Request, Status
from broker.topics import Address, Topics
from broker.training_messages import Activations, Report
from broker.transport import Connected, Disconnected
from tests.server_side import make_activations
from tests.tiny import Clock

TOPICS = Topics("fleet")
HELLO = TOPICS.up("d", "hello")
STATUS = Status(state="online", connection="c1")


class Counting:
    def __init__(self) -> None:
        self.sizes: Counter[str] = Counter()
        self.drops: list[tuple[str, str | None]] = []

    def sent(self, address: Address, size: int) -> None:
        self.sizes[f"sent {address.kind}"] += size

    def received(self, address: Address, size: int) -> None:
        self.sizes[f"received {address.kind}"] += size

    def dropped(self, reason: str, device: str | None) -> None:
        self.drops.append((reason, device))


class End:
    """One end: a link over the in-memory broker, and what its observer saw."""

    def __init__(
        self,
        broker: MemoryBroker,
        name: str,
        filters: tuple[str, ...],
        transport: type[MemoryTransport] = MemoryTransport,
        **link: Any,
    ) -> None:
        self.clock = Clock()
        self.observer = Counting()
        self.transport = transport(broker, name)
        self.link = Link(self.transport, TOPICS, observer=self.observer, clock=self.clock, **link)
        self._filters = filters

    async def __aenter__(self) -> Self:
        await self.transport.__aenter__()
        await self.link.subscribe(*self._filters)
        assert isinstance(await self.link.receive(), Connected)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.transport.__aexit__(None, None, None)

    async def arrival(self) -> Envelope:
        event = await self.link.receive()
        assert isinstance(event, Arrival), event
        return event.envelope

    async def message(self) -> Message:
        return (await self.arrival()).message


def coordinator(broker: MemoryBroker, **link: Any) -> End:
    return End(broker, "coordinator", TOPICS.coordinator_filters(), **link)


def device(broker: MemoryBroker, name: str = "d", **link: Any) -> End:
    return End(broker, name, (*TOPICS.device_filters(name), *TOPICS.cut_filters(2)), **link)


def parameters(size: int) -> Parameters:
    return Parameters(run="r", version=1, cut=2, state=bytes(range(256)) * (size // 256))


async def test_a_message_says_whom_it_comes_from_by_its_topic() -> None:
    broker = MemoryBroker()
    async with coordinator(broker) as server, device(broker) as agent:
        await agent.link.send(up("d", STATUS))
        arrived = await server.arrival()
        assert arrived == up("d", STATUS)


async def test_what_the_broker_says_of_itself_is_no_message() -> None:
    broker, told = MemoryBroker(), []
    filters = (*TOPICS.coordinator_filters(), "$SYS/#")
    said = End(broker, "coordinator", filters, system=lambda *what: told.append(what))
    async with said as server, device(broker) as agent:
        await agent.transport.publish("$SYS/broker/uptime", b"7 seconds", qos=1)
        await agent.link.send(up("d", STATUS))
        assert await server.arrival() == up("d", STATUS)
    assert told == [("$SYS/broker/uptime", b"7 seconds")]
    assert not server.observer.drops


async def test_a_large_message_crosses_a_broker_with_small_packets() -> None:
    broker = MemoryBroker(max_packet_size=4096)
    async with coordinator(broker) as server, device(broker) as agent:
        sent = parameters(100_000)
        await server.link.send(to_cut(2, sent))
        assert await agent.message() == sent
        assert agent.observer.sizes["received parameters"] > 99_840
        assert (
            agent.observer.sizes["received parameters"]
            == (server.observer.sizes["sent parameters"])
        )


async def test_a_batch_of_4_mib_passes_a_broker_that_takes_128_kib() -> None:
    broker = MemoryBroker(max_packet_size=131_072)
    async with coordinator(broker) as server, device(broker) as agent:
        sent = make_activations(("r", 1, 0), 3, cut=2, version=0)
        sent = sent.model_copy(update={"tensor": bytes(range(256)) * (4 << 12)})
        await agent.link.send(up("d", sent))
        assert await server.message() == sent


async def test_without_an_announced_limit_chunks_are_as_configured() -> None:
    broker = MemoryBroker()
    async with coordinator(broker, chunk_bytes=1000) as server, device(broker) as agent:
        await server.link.send(to_cut(2, parameters(10_240)))
        packets = 0
        while True:
            event = await agent.transport.receive()
            assert not isinstance(event, (Connected, Disconnected))
            packets += 1
            assert len(event.payload) < 1100
            if packets == 11:
                break


async def test_retained_state_is_there_for_who_comes_later() -> None:
    broker = MemoryBroker()
    async with coordinator(broker) as server:
        await server.link.send(to_all(Coordinator(state="online", boot="b1")))
        await server.link.send(to_cut(2, parameters(256)))
        async with device(broker) as agent:
            assert await agent.message() == Coordinator(state="online", boot="b1")
            await server.link.send(to_all(Coordinator(state="offline", boot="b1")))
            assert await agent.message() == Coordinator(state="offline", boot="b1")


async def test_messages_sent_at_once_keep_their_order() -> None:
    broker = MemoryBroker()
    async with coordinator(broker) as server, device(broker, chunk_bytes=50) as agent:
        for number in range(20):
            await agent.link.send(up("d", Request(what="parameters", version=number)))
        versions = [await server.message() for _ in range(20)]
        assert [m.version for m in versions if isinstance(m, Request)] == list(range(20))


GARBAGE: dict[str, tuple[bytes, str]] = {
    "no MessagePack": (b"rubbish", "malformed"),
    "nothing": (b"", "malformed"),
    "a list": (msgpack.packb([1, 2]), "malformed"),
    "no frame": (msgpack.packb({"state": "online"}), "foreign_version"),
    "another version": (
        single_frame(STATUS).replace(b"\xa1v\x01", b"\xa1v\x02"),
        "foreign_version",
    ),
    "a flipped bit": (single_frame(STATUS).replace(b"online", b"onlinf"), "corrupt"),
    "no message in the frame": (next(iter(split(Pieces((b"rubbish",)), 1, 100))), "malformed"),
    "another message": (single_frame(Coordinator(state="online", boot="b")), "invalid"),
    "cut short": (single_frame(STATUS)[:-1], "malformed"),
    "too large": (
        next(iter(split(Pieces((bytes(5000),)), 1, 100))),
        "oversized",
    ),
}


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_is_counted_by_reason_and_never_raises(what: str) -> None:
    payload, reason = GARBAGE[what]
    broker = MemoryBroker()
    limits = Limits(message_bytes=4000)
    async with coordinator(broker, limits=limits) as server, device(broker) as agent:
        await agent.transport.publish(TOPICS.up("d", "status"), payload, qos=1)
        await agent.link.send(up("d", STATUS))
        assert await server.arrival() == up("d", STATUS), "the next one is not lost"
        assert server.observer.drops == [(reason, "d")]


@pytest.mark.parametrize(
    "topic",
    [
        "splitfleet/fleet/device/coordinator/up/hello",
        "splitfleet/fleet/device/d/up/nonsense",
        "splitfleet/fleet/device/d d/up/hello",
    ],
)
async def test_topics_that_do_not_exist_are_counted(topic: str) -> None:
    broker = MemoryBroker()
    async with coordinator(broker) as server, device(broker) as agent:
        await agent.transport.publish(topic, single_frame(STATUS), qos=1)
        await agent.link.send(up("d", STATUS))
        await server.arrival()
        assert server.observer.drops == [("unexpected_topic", None)]


async def test_garbage_is_acknowledged_and_does_not_block_the_sender() -> None:
    broker = MemoryBroker()
    async with coordinator(broker) as server, device(broker) as agent:
        for _ in range(3 * server.transport.receive_maximum):
            await agent.transport.publish(HELLO, b"rubbish", qos=1)
        await agent.link.send(up("d", STATUS))
        assert await server.arrival() == up("d", STATUS)
        assert len(server.observer.drops) == 3 * server.transport.receive_maximum


async def test_more_chunks_than_the_receive_maximum_arrive() -> None:
    broker = MemoryBroker()
    async with coordinator(broker, chunk_bytes=100) as server, device(broker) as agent:
        sent = parameters(100 * 3 * agent.transport.receive_maximum)
        await server.link.send(to_cut(2, sent))
        assert await agent.message() == sent


async def test_what_stays_incomplete_is_counted() -> None:
    broker = MemoryBroker()
    async with coordinator(broker) as server, device(broker) as agent:
        first, _ = split(encode_message(STATUS), 1, 30)
        await agent.transport.publish(HELLO, first, qos=1)
        await agent.link.send(up("d", STATUS))
        await server.arrival()
        server.link.expire()
        assert server.observer.drops == []
        server.clock.advance(61)
        server.link.expire()
        assert server.observer.drops == [("reassembly_timeout", "d")]


async def test_what_is_dropped_is_logged_with_its_device_and_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "splitfleet.link")
    broker = MemoryBroker()
    async with coordinator(broker) as server, device(broker) as agent:

        async def complain(topic: str, payload: bytes) -> None:
            await agent.transport.publish(topic, payload, qos=1)
            await agent.link.send(up("d", STATUS))
            await server.arrival()

        await complain(HELLO, b"rubbish")
        await complain(TOPICS.up("e", "hello"), single_frame(Coordinator(state="online", boot="b")))
        assert server.observer.drops == [("malformed", "d"), ("invalid", "e")]
        logged = [record.__dict__ for record in caplog.records]
        assert [(each["reason"], each["device"]) for each in logged] == server.observer.drops


async def test_after_a_reconnect_unfinished_messages_arrive() -> None:
    broker = MemoryBroker()
    async with coordinator(broker) as server, device(broker) as agent:
        broker.disconnect("coordinator")
        await agent.link.send(up("d", STATUS))
        events = [await server.link.receive() for _ in range(3)]
        assert isinstance(events[0], Disconnected)
        assert isinstance(events[1], Connected)
        assert events[2] == Arrival(up("d", STATUS))


async def test_without_a_connection_sending_fails_and_is_not_counted() -> None:
    broker = MemoryBroker()
    async with coordinator(broker) as server:
        broker.stop()
        with pytest.raises(TransportError):
            await server.link.send(to_all(Coordinator(state="online", boot="b")))
        assert not server.observer.sizes


async def test_the_uplink_is_measured_on_a_large_message() -> None:
    broker = MemoryBroker()
    async with device(broker) as agent:
        await agent.link.send(up("d", STATUS))
        assert agent.link.uplink_bytes_per_s == 0
        await agent.link.send(up("d", Request(what="probe", padding=bytes(256 << 10))))
        assert agent.link.uplink_bytes_per_s > 0


class SlowTransport(MemoryTransport):
    """A link with latency and a speed, on the clock of its end."""

    latency_s, bytes_per_s = 0.2, 1000.0
    clock: Clock

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        await super().publish(topic, payload, qos=qos, retain=retain)
        self.clock.advance(self.latency_s + len(payload) / self.bytes_per_s)


def activations(size: int) -> Envelope:
    return up(
        "d",
        Activations(
            run="r", round=1, attempt=0, batch=0, version=0, labels=[1], tensor=bytes(size)
        ),
    )


async def test_the_uplink_is_measured_on_activations_without_its_latency() -> None:
    async with device(MemoryBroker(), transport=SlowTransport) as agent:
        assert isinstance(agent.transport, SlowTransport)
        agent.transport.clock = agent.clock
        await agent.link.send(activations(1000))
        assert agent.link.uplink_bytes_per_s == pytest.approx(850, rel=0.1)
        agent.transport.bytes_per_s = 100_000.0
        await agent.link.send(up("d", STATUS))
        for speed in (1000.0, 100_000.0, 2000.0):
            agent.transport.bytes_per_s = speed
            await agent.link.send(activations(20_000))
            assert agent.link.uplink_bytes_per_s == pytest.approx(speed, rel=0.05), speed


async def test_a_link_that_only_has_latency_counts_as_fast() -> None:
    async with device(MemoryBroker(), transport=SlowTransport) as agent:
        assert isinstance(agent.transport, SlowTransport)
        agent.transport.clock = agent.clock
        agent.transport.bytes_per_s = 1e12
        await agent.link.send(up("d", STATUS))
        await agent.link.send(activations(20_000))
        assert agent.link.uplink_bytes_per_s > 20_000 / agent.transport.latency_s


async def test_reports_are_sent_without_a_promise() -> None:
    broker = MemoryBroker()
    async with device(broker) as agent, AsyncExitStack() as stack:
        report = up("d", Report(run="r", round=1, attempt=0))
        await agent.link.send(report)
        server = await stack.enter_async_context(coordinator(broker))
        await agent.link.send(report)
        event = await server.transport.receive()
        assert not isinstance(event, (Connected, Disconnected))
        assert event.qos == 0
        await agent.link.send(up("d", STATUS))
        event = await server.transport.receive()
        assert not isinstance(event, (Connected, Disconnected))
        assert (event.qos, event.retain) == (1, False)


@pytest.mark.parametrize("size", [200, OVERHEAD])
async def test_a_broker_that_takes_almost_nothing_is_an_error_not_a_crash(size: int) -> None:
    broker = MemoryBroker(max_packet_size=size)
    async with coordinator(broker) as server:
        with pytest.raises(PacketTooLarge):
            await server.link.send(to_cut(2, parameters(2560)))
