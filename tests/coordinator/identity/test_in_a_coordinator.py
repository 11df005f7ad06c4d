"""Enrolment beside training: a whole coordinator on a broker in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.drive import Event
from broker.envelopes import Envelope, up
from broker.fields import Message
from broker.identity_messages import Certificate, Enrol, Renew
from broker.link import Arrival, Link
from broker.memory import MemoryBroker, MemoryTransport
from broker.messages import Status
from broker.topics import COORDINATOR, Address, Topics
from coordinator import watching
from coordinator.identity import enrolment as enrolment_module
from coordinator.identity.enrolment import open_enrolment
from coordinator.identity.keys import Key, new_key
from coordinator.observer import Observer
from coordinator.service import build_core, new_boot, new_vitals, run_coordinator
from coordinator.traffic import Traffic
from coordinator.updates.rollouts import open_rollouts
from ops.identity import FleetFolder, init_fleet
from tests.coordinator.identity.requests import csr
from tests.tiny import make_settings

TOPICS = Topics("fleet")
LIMIT_S = 60.0


class Peer:
    """Whoever says something to the coordinator, and hears its answers."""

    def __init__(self, hub: MemoryBroker, name: str) -> None:
        self.transport = MemoryTransport(hub, name)
        self._link = Link(
            self.transport, TOPICS, observer=Traffic(lambda reason: None), clock=time.monotonic
        )

    async def ask(self, question: Envelope, answers: str) -> Certificate:
        """Until it is answered, as the protocol has it."""
        await self._link.subscribe(answers)
        while True:
            await self._link.send(question)
            try:
                async with asyncio.timeout(1.0):
                    while not _is_certificate(event := await self._link.receive()):
                        pass
            except TimeoutError:
                continue
            assert isinstance(event, Arrival)
            assert isinstance(event.envelope.message, Certificate)
            return event.envelope.message

    async def say(self, message: Message) -> None:
        await self._link.send(up("cam-1", message))


def _is_certificate(event: Event) -> bool:
    return isinstance(event, Arrival) and isinstance(event.envelope.message, Certificate)


def enrol(claim: str, key: Key) -> Envelope:
    message = Enrol(nonce="n1", wanted="cam-1", csr=csr(key))
    return Envelope(Address("claim", "enrol", device=claim, direction="up"), message)


async def until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


async def test_a_device_enrols_renews_and_is_retired_while_the_coordinator_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "CHOICE_S", 0.05)
    monkeypatch.setattr(enrolment_module, "LOOK_S", 0.05)
    made = init_fleet(tmp_path / "fleet", "fleet", broker_names=["localhost"])
    with made:
        claim = made.write_token(1, 1.0).stem
    settings = make_settings(
        state_dir=made.folder / "coordinator" / "state", fleet_dir=made.folder, min_devices=2
    )
    hub, key, traffic = MemoryBroker(), new_key(), Traffic(lambda reason: None)
    core = build_core(
        settings,
        observer=Observer(),
        traffic=traffic.totals,
        boot=new_boot(),
        clock=time.monotonic,
    )
    peer, stop, vitals = Peer(hub, "peer"), asyncio.Event(), new_vitals(settings)
    running = asyncio.create_task(
        run_coordinator(
            settings,
            MemoryTransport(hub, COORDINATOR),
            core,
            traffic,
            stop=stop,
            vitals=vitals,
            enrolment=open_enrolment(settings, {}, Observer()),
            rollouts=open_rollouts(settings),
        )
    )

    def known() -> list[str]:
        return [device.name for device in core.status(vitals.health()).devices]

    async with asyncio.timeout(LIMIT_S), peer.transport:
        down_to_claim = TOPICS.format(
            Address("claim", "certificate", device=claim, direction="down")
        )
        enrolled = await peer.ask(enrol(claim, key), down_to_claim)
        assert enrolled.refused is None
        question = up("cam-1", Renew(nonce="n2", csr=csr(key)))
        renewed = await peer.ask(question, TOPICS.down("cam-1", "certificate"))
        assert renewed.certificate == enrolled.certificate
        await peer.say(Status(state="online", connection="c"))
        await until(lambda: known() == ["cam-1"])
        with FleetFolder.open(made.folder) as command:
            command.retire("cam-1")
        await until(lambda: known() == [])
        stop.set()
        await running
