"""TLS of a client on a real Mosquitto: files that change while it runs, and refusals in words."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.config import BrokerConfig
from broker.mqtt import MqttTransport
from broker.transport import Connected, Disconnected
from coordinator.identity.authority import Authority
from coordinator.identity.keys import to_pem
from tests.guarded_broker import GuardedBroker

QUICK: dict[str, Any] = {"backoff_initial_s": 0.05, "backoff_max_s": 0.05}


@pytest.fixture(scope="module")
def broker() -> Iterator[GuardedBroker]:
    with GuardedBroker() as running:
        yield running


async def reason(transport: MqttTransport) -> str:
    event = await transport.receive()
    assert isinstance(event, Disconnected)
    return event.reason


async def connected(transport: MqttTransport) -> None:
    while not isinstance(await transport.receive(), Connected):
        pass


def put(config: BrokerConfig, other: BrokerConfig) -> None:
    """Give ``config`` the files of ``other``."""
    for name in ("cert_file", "key_file"):
        shutil.copy(getattr(other, name), getattr(config, name))


async def test_the_next_connection_is_made_with_the_files_as_they_are_then(
    broker: GuardedBroker,
) -> None:
    config = broker.client("a", days=0.5, days_ago=1.0, **QUICK)
    async with MqttTransport(config, "a") as transport:
        assert "certificate" in await reason(transport)
        put(config, broker.client("a"))
        await connected(transport)


async def test_files_that_are_being_replaced_are_waited_for(broker: GuardedBroker) -> None:
    config = broker.client("b", **QUICK)
    async with MqttTransport(config, "b") as transport:
        await connected(transport)
        assert config.key_file is not None
        config.key_file.write_bytes(b"")
        transport.drop()
        await reason(transport)
        assert "cannot use the TLS files" in await reason(transport)
        put(config, broker.client("b"))
        await connected(transport)


@pytest.mark.parametrize("days_ago", [0.0, 2.0])
async def test_who_is_refused_hears_why(broker: GuardedBroker, days_ago: float) -> None:
    """Unless the network loses what the broker said: then what it may be."""
    config = broker.client("c", days_ago=days_ago, **QUICK)
    if not days_ago:
        foreign = Authority.create(broker.folder / "foreign", "lab")
        config = broker.client("c", authority=foreign, **QUICK)
    meaning = "it has ended" if days_ago else "it is of another fleet"
    async with MqttTransport(config, "c") as transport:
        heard = [await reason(transport) for _ in range(5)]
    assert all(one.endswith((meaning, "ended, revoked, or of another fleet")) for one in heard)


async def test_who_has_no_certificate_hears_that_one_is_needed(broker: GuardedBroker) -> None:
    full = broker.client("d", **QUICK)
    config = full.model_copy(update={"cert_file": None, "key_file": None})
    async with MqttTransport(config, "d") as transport:
        assert "certificate" in await reason(transport)


async def test_a_broker_of_another_fleet_is_not_trusted(
    broker: GuardedBroker, tmp_path: Path
) -> None:
    foreign = tmp_path / "ca.pem"
    foreign.write_bytes(to_pem(Authority.create(tmp_path / "foreign", "lab").ca("fleet")))
    config = broker.client("e", **QUICK).model_copy(update={"ca_file": foreign})
    async with MqttTransport(config, "e") as transport:
        assert "ca_file is its fleet's" in await reason(transport)


async def test_a_broker_under_another_name_is_not_trusted(broker: GuardedBroker) -> None:
    url = f"mqtts://127.1:{broker.port}"
    config = broker.client("f", **QUICK).model_copy(update={"url": url})
    async with MqttTransport(config, "f") as transport:
        assert "check the broker's name" in await reason(transport)


async def test_a_broker_whose_certificate_has_ended_asks_for_the_clock(
    broker: GuardedBroker,
) -> None:
    certificate = broker.broker / "broker.pem"
    now = certificate.read_bytes()
    old = broker.authority.issue_broker(["127.0.0.1"], broker._key.public_key(), days=-0.01)
    config = broker.client("g", **QUICK)
    try:
        certificate.write_bytes(to_pem(old))
        async with MqttTransport(config, "g") as transport:
            heard = ""
            while "is that right?" not in heard:
                event = await transport.receive()
                heard = event.reason if isinstance(event, Disconnected) else ""
    finally:
        certificate.write_bytes(now)


async def test_a_port_without_tls_is_told() -> None:
    async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello, this is no TLS\r\n" * 10)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, MqttTransport(BrokerConfig(url=f"mqtts://127.0.0.1:{port}"), "h") as client:
        assert "no TLS is spoken" in await reason(client)
