"""run.sh: the broker follows what changes in its folder, and whoever was revoked is out."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
from pathlib import Path

import pytest

from broker.errors import NotConnected
from broker.mosquitto import BrokerLimits
from broker.topics import Topics
from broker.transport import Connected, Disconnected
from tests.broker.test_mosquitto_config import client, up
from tests.guarded_broker import FLEET, GuardedBroker
from tests.raw_client import RawClient

TOPICS = Topics(FLEET)


@pytest.mark.slow
async def test_who_is_revoked_while_connected_is_cut_off_and_stays_out() -> None:
    with GuardedBroker() as broker:
        bad = broker.client("d1")
        absent = RawClient(broker.client("coordinator"))
        absent.subscribe(TOPICS.coordinator_filters()[0])
        absent.lose_connection()
        async with client(bad) as d1, client(broker.client("d2")) as d2:
            await up(d1)
            await up(d2)
            await d2.publish(TOPICS.up("d2", "hello"), b"before", qos=1)
            broker.revoke(bad)
            assert isinstance(await asyncio.wait_for(d1.receive(), 60), Disconnected)
            assert isinstance(await asyncio.wait_for(d2.receive(), 60), Disconnected)
            while not isinstance(event := await asyncio.wait_for(d2.receive(), 60), Connected):
                assert isinstance(event, Disconnected)
            assert event.session_present, "sessions outlive the broker's restart"
            await d2.publish(TOPICS.up("d2", "hello"), b"after", qos=1)
            for _ in range(3):  # d1 tries on, in vain
                assert isinstance(await asyncio.wait_for(d1.receive(), 60), Disconnected)
            with pytest.raises(NotConnected):
                await d1.publish(TOPICS.up("d1", "hello"), b"forged", qos=1)
        coordinator = RawClient(broker.client("coordinator"))
        coordinator.wait_for(b"after")
        assert coordinator.received == [b"before", b"after"], "queued messages outlive it too"
        coordinator.close()


@pytest.mark.slow
async def test_a_renewed_certificate_is_taken_up() -> None:
    with GuardedBroker() as broker:
        async with client(broker.client("d1")) as d1:
            await up(d1)
            before = shown(broker)
            broker.renew()
            assert isinstance(await asyncio.wait_for(d1.receive(), 60), Disconnected)
            while not isinstance(await asyncio.wait_for(d1.receive(), 60), Connected):
                pass
            assert shown(broker) != before


@pytest.mark.slow
def test_run_sh_ends_as_its_broker_does() -> None:
    with GuardedBroker() as broker:
        mosquitto = child(broker)
        broker.signal(signal.SIGTERM)
        assert broker.wait_ended() == 0
        assert not Path(f"/proc/{mosquitto}").exists()
        broker.start()
        os.kill(child(broker), signal.SIGKILL)
        assert broker.wait_ended() == 128 + signal.SIGKILL
        broker.start()
        (broker.broker / "mosquitto.conf").write_text("no_such_option true\n")
        assert broker.wait_ended() not in (0, 128 + signal.SIGKILL)


def test_connections_are_bounded_by_open_files() -> None:
    with GuardedBroker(limits=BrokerLimits(connections=100, claims=20)) as broker:
        limits = Path(f"/proc/{child(broker)}/limits").read_text().splitlines()
    (files,) = (line.split() for line in limits if line.startswith("Max open files"))
    assert files[3:5] == ["184", "184"], "100 + 20, and 64 of its own"


def shown(broker: GuardedBroker) -> str:
    """The broker's certificate."""
    return ssl.get_server_certificate((broker.host, broker.port), timeout=60)


def child(broker: GuardedBroker) -> int:
    """The Mosquitto that run.sh has started."""
    command = ["pgrep", "-P", str(broker.pid), "-f", "mosquitto.conf"]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)
