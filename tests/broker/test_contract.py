"""What every transport must do, on the in-memory twin, the embedded broker and a real Mosquitto.

The core holds everywhere. What only some brokers can do is declared as their `Features` and tested
where it exists.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Protocol

import pytest

from broker import embedded, memory, mosquitto
from broker.config import BrokerConfig
from broker.embedded import EmbeddedBroker
from broker.errors import (
    NotConnected,
    PacketTooLarge,
    PublishRefused,
    TransportError,
)
from broker.memory import MemoryBroker, MemoryTransport
from broker.mqtt import MqttTransport
from broker.transport import (
    Backoff,
    Connected,
    Disconnected,
    Event,
    Features,
    Packet,
    Transport,
    Will,
)
from tests.mosquitto_process import Mosquitto

MAX_PACKET_SIZE = 131_072
# Long enough that a test can do something while a client is away.
BACKOFF_S = 0.4
LIMIT_S = 60.0


class Broker(Protocol):
    """A broker under test. Only topics below open/ are allowed where there is access control."""

    features: Features

    def client(
        self, name: str, *, will: Will | None = None, receive_maximum: int = 64
    ) -> Transport: ...

    async def stop(self) -> None: ...

    async def start(self) -> None: ...


class InMemory:
    features = memory.FEATURES

    def __init__(self) -> None:
        self.broker = MemoryBroker(
            max_packet_size=MAX_PACKET_SIZE,
            allow=lambda client, access, topic: topic.startswith("open/"),
        )

    async def stop(self) -> None:
        self.broker.stop()

    async def start(self) -> None:
        self.broker.start()

    def client(
        self, name: str, *, will: Will | None = None, receive_maximum: int = 64
    ) -> Transport:
        backoff = Backoff(BACKOFF_S, BACKOFF_S, random.Random(0))
        return MemoryTransport(
            self.broker, name, will=will, receive_maximum=receive_maximum, backoff=backoff
        )


class OverMqtt:
    def __init__(self, broker: EmbeddedBroker | Mosquitto, features: Features) -> None:
        self.features = features
        self.url = broker.url
        self._broker = broker

    async def stop(self) -> None:
        await asyncio.to_thread(self._broker.stop)

    async def start(self) -> None:
        await asyncio.to_thread(self._broker.start)

    def client(
        self, name: str, *, will: Will | None = None, receive_maximum: int = 64
    ) -> Transport:
        config = BrokerConfig(
            url=self.url,
            receive_maximum=receive_maximum,
            backoff_initial_s=BACKOFF_S,
            backoff_max_s=BACKOFF_S,
            max_packet_size=MAX_PACKET_SIZE,
            publish_timeout_s=LIMIT_S,
            connect_timeout_s=LIMIT_S,
        )
        return MqttTransport(config, name, will=will)


@pytest.fixture(params=["memory", "embedded", "mosquitto"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    if request.param == "memory":
        yield InMemory()
    elif request.param == "embedded":
        with EmbeddedBroker() as running:
            yield OverMqtt(running, embedded.FEATURES)
    else:
        process = Mosquitto(
            "allow_anonymous true",
            f"max_packet_size {MAX_PACKET_SIZE}",
            "max_queued_messages 10000",
        )
        acl = process.folder / "acl"
        acl.write_text("topic readwrite open/#\n")
        with process.file.open("a") as file:
            file.write(f"acl_file {acl}\n")
        with process:
            yield OverMqtt(process, mosquitto.FEATURES)


def needs(broker: Broker, feature: str) -> None:
    if not getattr(broker.features, feature):
        pytest.skip(f"this broker declares that it lacks {feature}")


async def next_packet(client: Transport) -> Packet:
    event = await next_event(client)
    assert isinstance(event, Packet), event
    return event


async def next_event(client: Transport) -> Event:
    async with asyncio.timeout(LIMIT_S):
        return await client.receive()


async def until_connected(client: Transport) -> Connected:
    while True:
        event = await next_event(client)
        if isinstance(event, Connected):
            return event


@asynccontextmanager
async def connected(
    broker: Broker,
    name: str,
    *filters: str,
    will: Will | None = None,
    receive_maximum: int = 64,
) -> AsyncIterator[Transport]:
    async with broker.client(name, will=will, receive_maximum=receive_maximum) as client:
        await client.subscribe(*filters)
        await until_connected(client)
        yield client


async def take(client: Transport, count: int) -> list[Packet]:
    packets = []
    for _ in range(count):
        packets.append(await next_packet(client))
        packets[-1].ack()
    return packets


async def test_connected_is_the_first_event_and_tells_of_no_session(broker: Broker) -> None:
    async with broker.client("a") as client:
        event = await next_event(client)
        assert isinstance(event, Connected)
        assert not event.session_present
        assert client.connected


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("size", [1, 200, 100_000, 130_000])
async def test_a_payload_arrives_as_it_was_sent(broker: Broker, qos: int, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        await b.publish("open/x", payload, qos=qos)
        packet = await next_packet(a)
        packet.ack()
        assert (packet.topic, packet.payload, packet.retain) == ("open/x", payload, False)
        assert packet.qos >= qos  # the embedded broker delivers QoS 0 as the subscription's QoS 1


async def test_concurrent_publishes_arrive_in_order(broker: Broker) -> None:
    payloads = [i.to_bytes(4, "big") + bytes(50_000) for i in range(300)]
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        sending = asyncio.gather(*(b.publish("open/x", p, qos=1) for p in payloads))
        packets = await take(a, len(payloads))
        await sending
        assert [p.payload for p in packets] == payloads


async def test_every_subscriber_gets_what_its_wildcards_match(broker: Broker) -> None:
    async with (
        connected(broker, "one", "open/f/device/+/up/#") as one,
        connected(broker, "two", "open/f/device/d1/#") as two,
        connected(broker, "sender") as sender,
    ):
        for topic in ("open/f/device/d1/up/x", "open/f/device/d2/up/y", "open/f/device/d1/down/z"):
            await sender.publish(topic, b"1", qos=1)
        await sender.publish("open/f/device/d1/up/end", b"1", qos=1)
        assert {p.topic for p in await take(one, 3)} == {
            "open/f/device/d1/up/x",
            "open/f/device/d2/up/y",
            "open/f/device/d1/up/end",
        }
        assert {p.topic for p in await take(two, 3)} == {
            "open/f/device/d1/up/x",
            "open/f/device/d1/down/z",
            "open/f/device/d1/up/end",
        }


async def test_a_late_subscriber_gets_the_newest_retained_message(broker: Broker) -> None:
    async with connected(broker, "b") as b:
        await b.publish("open/state", b"old", qos=1, retain=True)
        await b.publish("open/state", b"new", qos=1, retain=True)
        async with connected(broker, "a", "open/state") as a:
            packet = await next_packet(a)
            packet.ack()
            assert (packet.payload, packet.retain) == (b"new", True)


async def test_a_wildcard_subscriber_gets_every_retained_message(broker: Broker) -> None:
    async with connected(broker, "b") as b:
        for device in ("d1", "d2", "d3"):
            await b.publish(f"open/{device}/up/status", device.encode(), qos=1, retain=True)
        async with connected(broker, "a", "open/+/up/#") as a:
            assert {p.payload for p in await take(a, 3)} == {b"d1", b"d2", b"d3"}


async def test_an_empty_retained_message_clears_the_topic(broker: Broker) -> None:
    async with connected(broker, "b") as b:
        await b.publish("open/state", b"x", qos=1, retain=True)
        await b.publish("open/state", b"", qos=1, retain=True)
        async with connected(broker, "a", "open/state") as a:
            await b.publish("open/state", b"marker", qos=1)
            assert (await next_packet(a)).payload == b"marker"


async def test_a_client_that_vanishes_leaves_its_will(broker: Broker) -> None:
    will = Will("open/status", b"offline", retain=True)
    async with connected(broker, "a", "open/#") as a:
        async with connected(broker, "b", will=will) as b:
            b.abort()
            packet = await next_packet(a)
            packet.ack()
            assert (packet.topic, packet.payload) == ("open/status", b"offline")
        async with connected(broker, "late", "open/status") as late:
            assert (await next_packet(late)).payload == b"offline"


async def test_a_client_that_says_goodbye_leaves_no_will(broker: Broker) -> None:
    async with connected(broker, "a", "open/#") as a:
        async with connected(broker, "b", will=Will("open/status", b"offline")):
            pass
        async with connected(broker, "c") as c:
            await c.publish("open/marker", b"1", qos=1)
        assert (await next_packet(a)).topic == "open/marker"


async def test_what_was_sent_while_a_client_was_away_arrives_when_it_is_back(
    broker: Broker,
) -> None:
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        a.drop()
        assert isinstance(await next_event(a), Disconnected)
        assert not a.connected
        for i in range(50):
            await b.publish("open/x", bytes([i]), qos=1)
        event = await next_event(a)
        assert isinstance(event, Connected)
        assert event.session_present
        assert [p.payload[0] for p in await take(a, 50)] == list(range(50))


async def test_only_what_was_not_acknowledged_is_delivered_again(broker: Broker) -> None:
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        for i in range(4):
            await b.publish("open/x", bytes([i]), qos=1)
        packets = [await next_packet(a) for _ in range(4)]
        packets[0].ack()
        packets[1].ack()
        await b.publish("open/x", b"\x04", qos=1)
        packets.append(await next_packet(a))
        await a.publish("open/y", b"", qos=1)  # answered after the two acks
        a.drop()
        await until_connected(a)
        packets[2].ack()  # of the lost connection: does nothing, or it would confirm another packet
        assert [(await next_packet(a)).payload[0] for _ in range(3)] == [2, 3, 4]


async def test_subscriptions_are_made_again_after_the_broker_restarted(broker: Broker) -> None:
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        await broker.stop()
        assert isinstance(await next_event(a), Disconnected)
        assert isinstance(await next_event(b), Disconnected)
        with pytest.raises(NotConnected):
            await b.publish("open/x", b"lost", qos=1)
        await broker.start()
        await until_connected(a)
        await until_connected(b)
        await b.publish("open/x", b"back", qos=1)
        assert (await next_packet(a)).payload == b"back"


async def test_a_broker_that_goes_away_fails_what_is_on_its_way(broker: Broker) -> None:
    async with connected(broker, "b") as b:

        async def publish_for_ever() -> None:
            while True:
                await asyncio.gather(
                    *(b.publish("open/x", bytes(100_000), qos=i % 2) for i in range(50))
                )

        publishing = asyncio.create_task(publish_for_ever())
        await asyncio.sleep(0.05)
        await broker.stop()
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(NotConnected):
                await publishing


async def test_nothing_can_be_published_before_the_first_connection(broker: Broker) -> None:
    client = broker.client("a")
    with pytest.raises(NotConnected):
        await client.publish("open/x", b"1", qos=1)


async def test_an_unsubscribed_topic_is_not_delivered(broker: Broker) -> None:
    async with connected(broker, "a", "open/x", "open/y") as a, connected(broker, "b") as b:
        await a.unsubscribe("open/x")
        await b.publish("open/x", b"1", qos=1)
        await b.publish("open/y", b"2", qos=1)
        assert (await next_packet(a)).topic == "open/y"


async def test_a_subscription_made_while_connected_works(broker: Broker) -> None:
    async with connected(broker, "a") as a, connected(broker, "b") as b:
        await a.subscribe("open/late")
        await b.publish("open/late", b"1", qos=1)
        assert (await next_packet(a)).topic == "open/late"


async def test_a_slow_receiver_loses_nothing_of_thousands(broker: Broker) -> None:
    count, payload = 3000, bytes(1000)
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        for start in range(0, count, 100):
            numbers = range(start, start + 100)
            await asyncio.gather(
                *(b.publish("open/x", i.to_bytes(4, "big") + payload, qos=1) for i in numbers)
            )
        packets = await take(a, count)
        assert [int.from_bytes(p.payload[:4], "big") for p in packets] == list(range(count))


async def test_a_receiver_that_is_behind_can_still_publish(broker: Broker) -> None:
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        for i in range(300):
            await b.publish("open/x", i.to_bytes(2, "big"), qos=1)
        for i in range(300):
            packet = await next_packet(a)
            assert int.from_bytes(packet.payload, "big") == i
            await a.publish("open/answer", packet.payload, qos=1)
            packet.ack()


async def test_acknowledgements_count_in_the_order_of_arrival(broker: Broker) -> None:
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        for i in range(3):
            await b.publish("open/x", bytes([i]), qos=1)
        packets = [await next_packet(a) for _ in range(3)]
        packets[1].ack()
        await a.publish("open/y", b"", qos=1)  # answered after what was sent before
        a.drop()
        await until_connected(a)
        again = await take(a, 3)
        assert [p.payload[0] for p in again] == [0, 1, 2]
        # In any order, once all are acknowledged nothing comes again.
        await b.publish("open/x", b"\x03", qos=1)
        assert (await next_packet(a)).payload == b"\x03"


async def test_several_publishers_lose_nothing_and_keep_their_orders(broker: Broker) -> None:
    count = 300

    async def publish(name: str) -> None:
        async with connected(broker, name) as client:
            for i in range(count):
                await client.publish(f"open/{name}", i.to_bytes(4, "big"), qos=1)

    names = ["p1", "p2", "p3", "p4"]
    async with connected(broker, "a", "open/+") as a:
        publishing = asyncio.gather(*(publish(name) for name in names))
        packets = await take(a, count * len(names))
        await publishing
        for name in names:
            got = [p.payload for p in packets if p.topic == f"open/{name}"]
            assert got == [i.to_bytes(4, "big") for i in range(count)]


async def test_a_cancelled_receive_loses_no_event(broker: Broker) -> None:
    async with connected(broker, "a", "open/x") as a, connected(broker, "b") as b:
        for _ in range(3):
            receiving = asyncio.create_task(a.receive())
            await asyncio.sleep(0)
            receiving.cancel()
        await b.publish("open/x", b"1", qos=1)
        assert (await next_packet(a)).payload == b"1"


async def test_a_second_client_of_the_same_name_ends_the_first(broker: Broker) -> None:
    async with connected(broker, "same") as first, connected(broker, "same"):
        assert isinstance(await next_event(first), Disconnected)


async def test_a_closed_transport_says_so(broker: Broker) -> None:
    async with connected(broker, "a") as a:
        pass
    assert isinstance(await next_event(a), Disconnected)
    with pytest.raises(NotConnected):
        await a.receive()
    with pytest.raises(NotConnected):
        await a.publish("open/x", b"1", qos=1)


async def test_a_transport_can_be_closed_while_the_broker_is_away(broker: Broker) -> None:
    await broker.stop()
    async with broker.client("a") as a:
        assert isinstance(await next_event(a), Disconnected)
    with pytest.raises(NotConnected):
        await a.receive()


# What follows is declared by the brokers that have it.


async def test_unacknowledged_packets_hold_the_broker_back(broker: Broker) -> None:
    needs(broker, "receive_maximum")
    async with connected(broker, "a", "open/x", receive_maximum=2) as a:
        async with connected(broker, "b") as b:
            for i in range(10):
                await b.publish("open/x", bytes([i]), qos=1)
            await b.publish("open/x", b"end", qos=0)
        waiting = [await next_packet(a) for _ in range(2)]
        # A QoS 0 packet is not held back, so it overtakes what is.
        overtaking = await next_packet(a)
        assert [p.payload for p in waiting] == [b"\x00", b"\x01"]
        assert overtaking.payload == b"end"
        for packet in waiting:
            packet.ack()
        assert [p.payload[0] for p in await take(a, 8)] == list(range(2, 10))


async def test_a_packet_above_the_brokers_maximum_is_refused_at_once(broker: Broker) -> None:
    needs(broker, "max_packet_size")
    async with connected(broker, "a", "open/x") as a:
        for qos in (0, 1):
            with pytest.raises(PacketTooLarge, match="131072"):
                await a.publish("open/x", bytes(MAX_PACKET_SIZE), qos=qos)
        await a.publish("open/x", b"still connected", qos=1)
        assert (await next_packet(a)).payload == b"still connected"


async def test_a_forbidden_publish_is_refused(broker: Broker) -> None:
    needs(broker, "access_control")
    async with connected(broker, "a") as a:
        with pytest.raises(PublishRefused) as caught:
            await a.publish("closed/x", b"1", qos=1)
        assert caught.value.reason_code == 0x87
        await a.publish("open/x", b"still connected", qos=1)


async def test_a_forbidden_topic_is_not_delivered(broker: Broker) -> None:
    needs(broker, "access_control")
    async with connected(broker, "a", "#") as a, connected(broker, "b") as b:
        with pytest.raises(TransportError):
            await b.publish("closed/x", b"1", qos=1)
        await b.publish("open/x", b"1", qos=1)
        assert (await next_packet(a)).topic == "open/x"


async def test_a_client_that_is_back_in_time_leaves_no_will(broker: Broker) -> None:
    needs(broker, "will_delay")
    will = Will("open/status", b"offline", delay_s=2)
    async with connected(broker, "a", "open/#") as a, connected(broker, "b", will=will) as b:
        b.drop()
        await until_connected(b)
        await asyncio.sleep(2.5)  # the will would be due now
        await b.publish("open/marker", b"1", qos=1)
        assert (await next_packet(a)).topic == "open/marker"


async def test_a_will_waits_for_its_delay(broker: Broker) -> None:
    needs(broker, "will_delay")
    will = Will("open/status", b"offline", delay_s=1)
    async with connected(broker, "a", "open/#") as a, connected(broker, "b", will=will) as b:
        b.abort()
        async with connected(broker, "c") as c:
            await c.publish("open/marker", b"1", qos=1)
        assert [p.topic for p in await take(a, 2)] == ["open/marker", "open/status"]
