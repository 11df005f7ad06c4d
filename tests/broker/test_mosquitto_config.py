"""The written configuration, judged by what a real Mosquitto then delivers."""

from __future__ import annotations

import asyncio
import base64
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.config import BrokerConfig
from broker.errors import ConfigError, ConnectRefused, PublishRefused, TopicError
from broker.mosquitto import MosquittoFiles, hash_password, write_mosquitto_config
from broker.mqtt import MqttTransport
from broker.topics import Topics
from broker.transport import Connected, Packet, Transport
from tests.mosquitto_process import Mosquitto

TOPICS = Topics("lab")


def client(running: Mosquitto, files: MosquittoFiles, name: str) -> MqttTransport:
    return MqttTransport(
        BrokerConfig(url=running.url, username=name, password=files.credentials[name]),
        "any client id",  # the broker takes the username for it
    )


async def up(transport: Transport) -> Connected:
    event = await asyncio.wait_for(transport.receive(), 15)
    assert isinstance(event, Connected), event
    return event


async def packet(transport: Transport) -> Packet:
    event = await asyncio.wait_for(transport.receive(), 15)
    assert isinstance(event, Packet), event
    event.ack()
    return event


@contextmanager
def fleet() -> Iterator[tuple[Mosquitto, MosquittoFiles]]:
    running = Mosquitto()
    running.file = running.folder / "a folder" / "mosquitto.conf"
    files = write_mosquitto_config(
        running.file.parent, "lab", devices=["d1", "d2"], host=running.host, port=running.port
    )
    with running:
        yield running, files


async def test_devices_and_coordinator_reach_each_other_and_nobody_else() -> None:
    with fleet() as (running, files):
        async with (
            client(running, files, "coordinator") as coordinator,
            client(running, files, "d1") as d1,
            client(running, files, "d2") as d2,
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
            for topic in (
                TOPICS.up("d2", "hello"),
                TOPICS.down("d1", "assignment"),
                TOPICS.all("round"),
                TOPICS.cut(2, "manifest"),
                Topics("other").up("d1", "hello"),
                "elsewhere",
            ):
                with pytest.raises(PublishRefused):
                    await d1.publish(topic, b"forged", qos=1)


async def test_the_limits_are_announced() -> None:
    with fleet() as (running, files):
        async with client(running, files, "d1") as d1:
            capabilities = (await up(d1)).capabilities
            assert capabilities.max_packet_size == 131_072
            assert capabilities.receive_maximum == 64


async def test_a_wrong_password_is_refused_for_good() -> None:
    with fleet() as (running, files):
        config = BrokerConfig(url=running.url, username="d1", password="wrong")
        async with MqttTransport(config, "d1") as transport:
            with pytest.raises(ConnectRefused, match="password"):
                await asyncio.wait_for(transport.receive(), 15)
        async with MqttTransport(BrokerConfig(url=running.url), "d1") as transport:
            with pytest.raises(ConnectRefused, match="password"):
                await asyncio.wait_for(transport.receive(), 15)
    assert set(files.credentials) == {"coordinator", "d1", "d2"}


def test_passwords_are_kept_when_a_device_is_added(tmp_path: Path) -> None:
    first = write_mosquitto_config(tmp_path, "lab", devices=["d1", "gone"])
    before = first.passwords.read_text().splitlines()
    second = write_mosquitto_config(tmp_path, "lab", devices=["d1", "d2"])
    after = second.passwords.read_text().splitlines()
    assert set(second.credentials) == {"d2"}
    assert after[:2] == before[:2]
    assert [line.split(":")[0] for line in after] == ["coordinator", "d1", "d2"]


def test_secrets_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    files = write_mosquitto_config(tmp_path, "lab", devices=["d1"])
    for file in (files.passwords, files.acl):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for password in files.credentials.values():
        assert all(password not in file.read_text() for file in tmp_path.iterdir())


def test_paths_are_those_the_broker_sees(tmp_path: Path) -> None:
    files = write_mosquitto_config(
        tmp_path, "lab", devices=[], seen_as=Path("/mosquitto/config"), persistence=Path("/data")
    )
    text = files.configuration.read_text()
    assert "acl_file /mosquitto/config/acl\n" in text
    assert "persistence_location /data/\n" in text
    assert str(tmp_path) not in text


def test_a_password_is_hashed_as_mosquitto_passwd_does() -> None:
    # Written by mosquitto_passwd 2.0.11 for the password "secret".
    known = (
        "$7$101$g7hs9f0yPgYWmmuH$27QHMrxt1Fhz34EBAZbaB3Ug4EVVuX1Yx5D3"
        "cZ4thYY4KaoylZJm3f7oPtP+ibLMe8QLB5a4vIRn/R95rBfLWw=="
    )
    _, _, _, salt, _ = known.split("$")
    assert hash_password("secret", base64.b64decode(salt)) == known


def test_bad_names_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TopicError, match="reserved"):
        write_mosquitto_config(tmp_path, "lab", devices=["coordinator"])
    with pytest.raises(TopicError, match="d/1"):
        write_mosquitto_config(tmp_path, "lab", devices=["d/1"])
    with pytest.raises(ConfigError, match="twice"):
        write_mosquitto_config(tmp_path, "lab", devices=["d1", "d1"])
    with pytest.raises(ConfigError, match="no address"):
        write_mosquitto_config(tmp_path, "lab", devices=["d1"], host="0.0.0.0\nlistener 1")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_mosquitto_config(tmp_path / "file", "lab", devices=["d1"])
