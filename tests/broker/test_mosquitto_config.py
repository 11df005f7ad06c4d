"""The written configuration, judged by what a real Mosquitto then delivers."""

from __future__ import annotations

import asyncio
import socket
import stat
from pathlib import Path

import pytest

from broker.config import BrokerConfig
from broker.errors import ConfigError, PublishRefused, TopicError
from broker.mosquitto import write_mosquitto_config
from broker.mqtt import MqttTransport
from broker.topics import Topics
from broker.transport import Connected, Packet, Transport
from tests.guarded_broker import FLEET, GuardedBroker

TOPICS = Topics(FLEET)


def client(config: BrokerConfig) -> MqttTransport:
    return MqttTransport(config, "any client id")  # the broker takes the certificate's name for it


async def up(transport: Transport) -> Connected:
    event = await asyncio.wait_for(transport.receive(), 60)
    assert isinstance(event, Connected), event
    return event


async def packet(transport: Transport) -> Packet:
    event = await asyncio.wait_for(transport.receive(), 60)
    assert isinstance(event, Packet), event
    event.ack()
    return event


async def test_devices_and_coordinator_reach_each_other_and_nobody_else() -> None:
    with GuardedBroker() as broker:
        async with (
            client(broker.client("coordinator")) as coordinator,
            client(broker.client("d1")) as d1,
            client(broker.client("d2")) as d2,
        ):
            await coordinator.subscribe(*TOPICS.coordinator_filters())
            # d2 listens to everything it can name; only what it may read must come.
            await d2.subscribe("#", *TOPICS.device_filters("d1"))
            await d1.subscribe(*TOPICS.device_filters("d1"), *TOPICS.cut_filters(2))
            for transport in (coordinator, d1, d2):
                await up(transport)
            await d1.publish(TOPICS.up("d1", "hello"), b"1", qos=1)
            assert (await packet(coordinator)).topic == TOPICS.up("d1", "hello")
            await coordinator.publish(TOPICS.down("d1", "gradients"), b"2", qos=1)
            assert (await packet(d1)).payload == b"2"
            await coordinator.publish(TOPICS.cut(2, "manifest"), b"3", qos=1)
            assert (await packet(d1)).payload == b"3"
            # The first thing d2 was given is public: neither d1's mail nor d1's up/ was delivered.
            assert (await packet(d2)).topic == TOPICS.cut(2, "manifest")
            own = TOPICS.up("d1", "hello")
            for topic in (
                f"{own}/more",
                own.replace("hello", "unheard-of"),
                TOPICS.up("d2", "hello"),
                TOPICS.down("d1", "assignment"),
                TOPICS.all("round"),
                TOPICS.cut(2, "manifest"),
                f"{TOPICS.claims}claim.t1/up/enrol",
                Topics("other").up("d1", "hello"),
                "elsewhere",
            ):
                with pytest.raises(PublishRefused):
                    await d1.publish(topic, b"forged", qos=1)
            # The next that each is given was sent after all of that: nothing forged arrived.
            await d1.publish(TOPICS.up("d1", "report"), b"4", qos=1)
            assert (await packet(coordinator)).topic == TOPICS.up("d1", "report")
            await coordinator.publish(TOPICS.all("serving"), b"5", qos=1)
            assert (await packet(d2)).topic == TOPICS.all("serving")


async def test_a_claim_reaches_the_coordinator_and_sees_nothing_else_of_the_fleet() -> None:
    own, other = TOPICS.claims + "claim.t1", TOPICS.claims + "claim.t2"
    with GuardedBroker() as broker:
        async with (
            client(broker.client("coordinator")) as coordinator,
            client(broker.client("d1")) as d1,
            client(broker.claim("t1")) as claimant,
        ):
            await coordinator.subscribe(f"{TOPICS.claims}+/up/#", "splitfleet/lab/device/#")
            await claimant.subscribe(
                "#", "claim.t1/down/#", "claim.t2/down/#", "splitfleet/lab/all/#", "$SYS/#"
            )
            for transport in (coordinator, d1, claimant):
                await up(transport)
            for topic in (
                "claim.t2/up/enrol",
                "claim.t1/down/certificate",
                "claim.t1/up/enrol/more",
                "splitfleet/lab/all/round",
                TOPICS.up("d1", "hello"),
                "../device/d1/up/hello",
            ):
                with pytest.raises(PublishRefused):
                    await claimant.publish(topic, b"forged", qos=1)
            await claimant.publish("claim.t1/up/enrol", b"1", qos=1)
            assert (await packet(coordinator)).topic == f"{own}/up/enrol"
            await d1.publish(TOPICS.up("d1", "hello"), b"2", qos=1)
            assert (await packet(coordinator)).topic == TOPICS.up("d1", "hello")
            for topic in (
                TOPICS.all("round"),
                TOPICS.down("d1", "assignment"),
                TOPICS.cut(2, "manifest"),
                f"{other}/down/certificate",
            ):
                await coordinator.publish(topic, b"not for a claim", qos=1)
            await coordinator.publish(f"{own}/down/certificate", b"3", qos=1)
            answer = await packet(claimant)
            # Mosquitto 2.0.11 leaves the mount point in what it delivers, newer ones take it off.
            assert answer.topic.removeprefix(TOPICS.claims) == "claim.t1/down/certificate"
            assert answer.payload == b"3"


async def test_the_limits_are_announced() -> None:
    with GuardedBroker() as broker:
        async with client(broker.client("d1")) as d1:
            capabilities = (await up(d1)).capabilities
            assert capabilities.max_packet_size == 131_072
            assert capabilities.receive_maximum == 64


async def test_who_is_on_the_machine_comes_in_without_tls_only_where_asked() -> None:
    with GuardedBroker(loopback=True) as broker:
        assert broker.loopback_port is not None
        anybody = BrokerConfig(url=f"mqtt://127.0.0.1:{broker.loopback_port}")
        named = anybody.model_copy(update={"username": "d2"})
        async with (
            client(anybody) as operator,
            MqttTransport(named, "d2") as d2,
            client(broker.client("d1")) as d1,
        ):
            await d1.subscribe(*TOPICS.device_filters("d1"))
            await operator.subscribe(*TOPICS.coordinator_filters())
            for transport in (operator, d1, d2):
                await up(transport)
            await operator.publish(TOPICS.down("d1", "command"), b"1", qos=1)
            assert (await packet(d1)).payload == b"1"
            await d1.publish(TOPICS.up("d1", "hello"), b"2", qos=1)
            assert (await packet(operator)).payload == b"2"
            with pytest.raises(PublishRefused):  # who gives a name there has that name's rights
                await d2.publish(TOPICS.up("d1", "hello"), b"3", qos=1)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", broker.loopback_port), timeout=5)


def test_without_being_asked_there_is_no_listener_without_certificates(tmp_path: Path) -> None:
    lines = write_mosquitto_config(tmp_path, "lab").configuration.read_text().splitlines()
    assert [line for line in lines if line.startswith("listener")] == [
        "listener 8883",
        "listener 8884",
    ]
    assert lines.count("require_certificate true") == 2
    assert "allow_anonymous false" in lines


def test_the_files_can_be_moved_and_only_the_owner_reads_the_rules(tmp_path: Path) -> None:
    files = write_mosquitto_config(tmp_path / "broker", "lab", loopback_port=1883)
    for file in (files.configuration, files.acl, files.start):
        assert str(tmp_path) not in file.read_text()
    assert stat.S_IMODE(files.acl.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.start.stat().st_mode) == 0o755


def test_bad_names_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TopicError, match="a/b"):
        write_mosquitto_config(tmp_path, "a/b")
    with pytest.raises(ConfigError, match="no address"):
        write_mosquitto_config(tmp_path, "lab", host="0.0.0.0\nlistener 1")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_mosquitto_config(tmp_path / "file", "lab")
