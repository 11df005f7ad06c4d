"""Devices and coordinator about identities, on the in-memory broker: both ends as they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.config import BrokerConfig
from broker.drive import drive
from broker.link import Link
from broker.memory import MemoryBroker, MemoryTransport
from broker.topics import ClaimTopics, Topics
from coordinator.identity.enrolment import open_enrolment
from coordinator.identity.registration import Lifetimes
from coordinator.observer import Observer
from edge_agent.identity import claimant
from edge_agent.identity.claimant import Claimant
from edge_agent.identity.clock import ClockFloor
from edge_agent.identity.folder import Credentials, IdentityFolder
from edge_agent.identity.keeper import IdentityKeeper
from edge_agent.identity.keys import valid_until
from edge_agent.readings import LinkMeters
from edge_agent.settings import AgentSettings
from ops.identity import FleetFolder, init_fleet
from tests.fleet_in_process import Fleet, in_memory
from tests.tiny import make_device_data, make_settings

DAY_S = 86_400.0
TOPICS = Topics("fleet")
QUICK_S = 0.05


class Claimed(MemoryTransport):
    """At the broker's door for claims: what is said there is hung below the fleet's claims."""

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        await super().publish(TOPICS.claims + topic, payload, qos=qos, retain=retain)

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        await super().subscribe(*(TOPICS.claims + one for one in filters), qos=qos)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetFolder]:
    """Its devices' certificates are for 30 days, of which 25 have passed."""
    with init_fleet(
        tmp_path / "fleet",
        "fleet",
        broker_names=["127.0.0.1"],
        lifetimes=Lifetimes(device_days=30.0),
        clock=lambda: time.time() - 25 * DAY_S,
    ) as made:
        yield made


@asynccontextmanager
async def desk(fleet: FleetFolder, broker: MemoryBroker, state: Path) -> AsyncIterator[None]:
    """What the coordinator does for who comes with a claim."""
    settings = make_settings(state_dir=state, fleet_dir=fleet.folder)
    enrolment, stop = open_enrolment(settings, {}, Observer()), asyncio.Event()
    assert enrolment is not None
    async with MemoryTransport(broker, "coordinator") as transport:
        link = Link(transport, TOPICS, observer=LinkMeters(), clock=time.monotonic)
        await link.subscribe(*TOPICS.claims_filters())
        serving = asyncio.create_task(drive(enrolment, link, clock=time.monotonic, stop=stop))
        yield
        stop.set()
        await serving
    enrolment.close()


def claimant_of(broker: MemoryBroker, identity: IdentityFolder, device: str) -> Claimant:
    def connect(credentials: Credentials) -> Claimed:
        return Claimed(broker, credentials.name)

    return Claimant(
        device,
        identity,
        ClockFloor(identity),
        connect,
        ClaimTopics("fleet"),
        observer=LinkMeters(),
        clock=time.monotonic,
    )


async def refused(device: Claimant) -> str:
    """Why the coordinator will not have it."""
    stop = asyncio.Event()
    enrolling = asyncio.create_task(device.enrol(stop))
    while device.problem is None:  # noqa: ASYNC110 it tells nobody
        await asyncio.sleep(0.01)
    stop.set()
    assert not await enrolling
    return device.problem


async def test_a_device_renews_its_certificate_beside_its_training(
    fleet: FleetFolder, tmp_path: Path
) -> None:
    identity = IdentityFolder(fleet.add_device("a"))
    settings = AgentSettings(device="a", identity_dir=identity.folder)
    keeper = IdentityKeeper(settings, BrokerConfig(url="mqtts://127.0.0.1"))
    run = Fleet(
        tmp_path,
        in_memory(MemoryBroker()),
        {"a": 2},
        lambda name: make_device_data(),
        fleet_dir=fleet.folder,
    )
    run.start_coordinator()
    run.start_agent("a", identity=keeper)
    await run.finish()
    certificate = identity.certificate()
    assert certificate is not None
    assert valid_until(certificate) > time.time() + 29 * DAY_S


async def test_a_token_lets_in_as_many_as_it_is_for(
    fleet: FleetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimant, "AGAIN_S", (QUICK_S, QUICK_S))
    broker, token = MemoryBroker(), fleet.token(uses=2, days=60.0)
    folders = {name: IdentityFolder(tmp_path / name) for name in ("a", "b", "c")}
    for folder in folders.values():
        folder.put_token(token)
    async with desk(fleet, broker, tmp_path / "state"):
        stop = asyncio.Event()
        for name in ("a", "b"):
            assert await claimant_of(broker, folders[name], name).enrol(stop)
        assert "coordinator refuses" in await refused(claimant_of(broker, folders["c"], "c"))
    assert [folder.enrolled for folder in folders.values()] == [True, True, False]
    assert [one.member.name for one in fleet.fleet.members()] == ["a", "b"]


async def test_a_device_that_died_before_the_answer_asks_again_and_uses_up_nothing(
    fleet: FleetFolder, tmp_path: Path
) -> None:
    broker, identity = MemoryBroker(), IdentityFolder(tmp_path / "a")
    token = fleet.token(uses=1, days=60.0)
    identity.put_token(token)
    async with desk(fleet, broker, tmp_path / "state"):
        assert await claimant_of(broker, identity, "a").enrol(asyncio.Event())
        for file in (identity.device_file, identity.return_file):
            file.unlink()
        identity.put_token(token)
        assert await claimant_of(broker, identity, "a").enrol(asyncio.Event())
    assert identity.for_fleet().name == "a"


async def test_a_name_that_another_key_has_is_refused(fleet: FleetFolder, tmp_path: Path) -> None:
    broker, identity = MemoryBroker(), IdentityFolder(tmp_path / "thief")
    fleet.add_device("a")
    identity.put_token(fleet.token(uses=1, days=60.0))
    async with desk(fleet, broker, tmp_path / "state"):
        assert "coordinator refuses" in await refused(claimant_of(broker, identity, "a"))


async def test_a_device_comes_back_with_its_key_unless_it_is_revoked(
    fleet: FleetFolder, tmp_path: Path
) -> None:
    broker, identity = MemoryBroker(), IdentityFolder(fleet.add_device("a"))
    before = identity.device_file.read_bytes()
    async with desk(fleet, broker, tmp_path / "state"):
        assert await claimant_of(broker, identity, "a").enrol(asyncio.Event())
        assert identity.device_file.read_bytes() != before
        fleet.revoke("a")
        assert "coordinator refuses" in await refused(claimant_of(broker, identity, "a"))
