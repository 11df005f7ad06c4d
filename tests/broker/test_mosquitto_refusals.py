"""Who is kept out by the written configuration, and what nobody can do to the others."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.config import BrokerConfig
from broker.errors import NotConnected, PublishRefused
from broker.mosquitto import BrokerLimits
from broker.mqtt import MqttTransport
from broker.topics import Topics
from broker.transport import Disconnected
from coordinator.identity.authority import Authority
from tests.broker.test_mosquitto_config import client, packet, up
from tests.guarded_broker import FLEET, GuardedBroker
from tests.raw_client import RawClient

TOPICS = Topics(FLEET)
HELLO = TOPICS.up("d1", "hello")


async def kept_out(config: BrokerConfig) -> str:
    """The reason for which this client gets no connection."""
    async with MqttTransport(config, "d1") as transport:
        event = await asyncio.wait_for(transport.receive(), 60)
        assert isinstance(event, Disconnected), event
        with pytest.raises(NotConnected):
            await transport.publish(HELLO, b"", qos=1)
        return event.reason


def without_certificate(broker: GuardedBroker, folder: Path) -> BrokerConfig:
    return broker.client("d1").model_copy(update={"cert_file": None, "key_file": None})


def expired(broker: GuardedBroker, folder: Path) -> BrokerConfig:
    return broker.client("d1", days_ago=3)


def revoked(broker: GuardedBroker, folder: Path) -> BrokerConfig:
    config = broker.client("d1")
    broker.revoke(config)
    return config


def foreign(broker: GuardedBroker, folder: Path) -> BrokerConfig:
    return broker.client("d1", authority=Authority.create(folder, FLEET))


def claim_at_the_fleet(broker: GuardedBroker, folder: Path) -> BrokerConfig:
    return broker.claim("t1").model_copy(update={"url": broker.url})


def device_at_the_claims(broker: GuardedBroker, folder: Path) -> BrokerConfig:
    return broker.client("d1").model_copy(update={"url": broker.claim("t1").url})


def revoked_claim(broker: GuardedBroker, folder: Path) -> BrokerConfig:
    config = broker.claim("t1")
    broker.revoke(config)
    return config


def without_tls(broker: GuardedBroker, folder: Path) -> BrokerConfig:
    return BrokerConfig(url=f"mqtt://{broker.host}:{broker.port}", username="d1")


@pytest.mark.parametrize(
    "config",
    [
        without_certificate,
        expired,
        revoked,
        foreign,
        claim_at_the_fleet,
        device_at_the_claims,
        revoked_claim,
        without_tls,
    ],
)
async def test_who_cannot_show_the_right_certificate_is_kept_out(
    config: Callable[[GuardedBroker, Path], BrokerConfig], tmp_path: Path
) -> None:
    broker = GuardedBroker(loopback=True)  # what is open to the machine opens nothing else
    excluded = config(broker, tmp_path)
    with broker:
        async with client(broker.client("coordinator")) as coordinator:
            await coordinator.subscribe("#")
            await up(coordinator)
            await kept_out(excluded)
            async with client(broker.client("d2")) as d2:
                await up(d2)
                await d2.publish(TOPICS.up("d2", "hello"), b"2", qos=1)
            assert (await packet(coordinator)).topic == TOPICS.up("d2", "hello")


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_tls_before_1_2_is_refused(version: str) -> None:
    with GuardedBroker() as broker:
        config = broker.client("d1")
        assert shake_hands(config, "TLSv1_2") == "TLSv1.2"
        with (
            pytest.warns(DeprecationWarning, match="deprecated"),
            pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
        ):
            shake_hands(config, version)


def shake_hands(config: BrokerConfig, version: str) -> str | None:
    """With a client that speaks no other version of TLS, and all that it ever had."""
    assert config.cert_file is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(config.ca_file)
    context.load_cert_chain(config.cert_file, config.key_file)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with socket.create_connection((config.host, config.port), timeout=60) as plain:
        secured = context.wrap_socket(plain, server_hostname=config.host)
        spoken = secured.version()
        secured.close()
        return spoken


async def test_nobody_takes_another_s_name_or_client_id() -> None:
    with GuardedBroker() as broker:
        claimed = broker.client("d2", username="d1")
        async with (
            client(broker.client("coordinator")) as coordinator,
            MqttTransport(broker.client("d1"), "d1") as d1,
        ):
            await coordinator.subscribe(*TOPICS.coordinator_filters())
            await d1.subscribe(*TOPICS.device_filters("d1"))
            await up(coordinator)
            await up(d1)
            async with MqttTransport(claimed, "d1") as d2:
                await d2.subscribe(*TOPICS.device_filters("d1"))
                await up(d2)
                with pytest.raises(PublishRefused):
                    await d2.publish(HELLO, b"forged", qos=1)
                await d2.publish(TOPICS.up("d2", "hello"), b"2", qos=1)
                assert (await packet(coordinator)).topic == TOPICS.up("d2", "hello")
                await coordinator.publish(TOPICS.down("d1", "command"), b"for d1", qos=1)
                await coordinator.publish(TOPICS.down("d2", "command"), b"for d2", qos=1)
                await coordinator.publish(TOPICS.all("round"), b"for all", qos=1)
                # Still d1's connection, and none of its mail went to d2, who asked for it.
                assert [(await packet(d1)).payload for _ in range(2)] == [b"for d1", b"for all"]
                assert (await packet(d2)).payload == b"for all"


async def test_an_identity_has_one_connection_the_newest() -> None:
    with GuardedBroker() as broker:
        config = broker.client("d1")
        async with MqttTransport(config, "one") as one:
            await up(one)
            async with MqttTransport(config, "another") as another:
                await up(another)
                assert isinstance(await asyncio.wait_for(one.receive(), 60), Disconnected)


async def test_more_than_the_packet_limit_reaches_nobody() -> None:
    with GuardedBroker() as broker:
        async with (
            client(broker.client("coordinator", max_packet_size=1 << 20)) as coordinator,
            client(broker.client("d2")) as d2,
        ):
            await coordinator.subscribe(*TOPICS.coordinator_filters())
            await up(coordinator)
            await up(d2)
            oversized = RawClient(broker.client("d1"))
            oversized.publish(HELLO, bytes(131_072))
            await asyncio.to_thread(oversized.wait_ended)
            oversized.close()
            await d2.publish(TOPICS.up("d2", "hello"), b"2", qos=1)
            assert (await packet(coordinator)).topic == TOPICS.up("d2", "hello")


async def test_properties_that_the_library_refuses_cut_off_nobody() -> None:
    with GuardedBroker() as broker:
        odd = RawClient(broker.client("d1"))
        # Kept by the broker: a coordinator that stumbled over it would do so at every start.
        odd.publish(HELLO, b"1", retain=True, UserProperty=("\ufeff", ""))
        odd.publish(HELLO, b"2", retain=True, ResponseTopic="\ufeff", ContentType="\ufeff")
        await asyncio.to_thread(odd.wait_published)
        async with client(broker.client("coordinator")) as coordinator:
            await coordinator.subscribe(*TOPICS.coordinator_filters())
            await up(coordinator)
            assert (await packet(coordinator)).payload == b"2"
            odd.publish(HELLO, b"3", UserProperty=("", "\ufeff"))
            assert (await packet(coordinator)).payload == b"3"
        odd.close()


async def test_a_flood_is_bounded_and_holds_up_nobody_else() -> None:
    limits = BrokerLimits(queue_messages=100)
    with GuardedBroker(limits=limits) as broker:
        coordinator = RawClient(broker.client("coordinator"))
        coordinator.subscribe(TOPICS.coordinator_filters()[0])
        coordinator.lose_connection()
        flood = RawClient(broker.client("d1"))
        for number in range(1000):
            flood.publish(HELLO, b"%d" % number)
        async with client(broker.client("d2")) as d2, client(broker.client("d3")) as d3:
            # Those that nobody floods are served as ever.
            await d2.subscribe(*TOPICS.device_filters("d2"))
            await up(d2)
            await up(d3)
            with pytest.raises(PublishRefused):
                await d3.publish(TOPICS.down("d2", "command"), b"", qos=1)
            await asyncio.to_thread(flood.wait_published)
            coordinator = RawClient(broker.client("coordinator"))
            await asyncio.to_thread(coordinator.wait_quiet)
            kept = len(coordinator.received)
            await d2.publish(TOPICS.up("d2", "hello"), b"d2", qos=1)
            await asyncio.to_thread(coordinator.wait_for, b"d2")
        flood.close()
        coordinator.close()
    assert 0 < kept <= limits.queue_messages + limits.inflight_messages


async def test_a_long_silence_is_not_granted() -> None:
    with GuardedBroker() as broker:
        patient = RawClient(broker.client("d1"), keepalive_s=65_535)
        assert patient.granted_keepalive_s == BrokerLimits().keepalive_s
        patient.close()
