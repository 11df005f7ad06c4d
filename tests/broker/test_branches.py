from __future__ import annotations

import asyncio
import threading
import time
from typing import Self

from broker.branches import WAITING, Branches
from broker.drive import Call, Effect, drive
from broker.envelopes import Envelope, up
from broker.identity_messages import Renew
from broker.link import Arrival, Link
from broker.memory import MemoryBroker, MemoryTransport
from broker.messages import Request, Status
from broker.serving_messages import Features
from broker.topics import COORDINATOR, Address, Topics
from broker.transport import Connected, Disconnected
from tests.broker.test_drive import Puppet, Witness

TOPICS = Topics("fleet")
LIMIT_S = 60.0


def route(address: Address) -> tuple[str, ...]:
    return {"request": ("slow",), "status": ("slow", "quick")}.get(address.kind, ())


def request(version: int) -> Envelope:
    return up("d", Request(what="parameters", version=version))


STATUS = up("d", Status(state="online", connection="c"))


class Fleet:
    """A branched link and a device beside it."""

    async def __aenter__(self) -> Self:
        self.hub, self.witness = MemoryBroker(), Witness()
        self.wire = MemoryTransport(self.hub, COORDINATOR)
        self.device = Link(
            MemoryTransport(self.hub, "d"), TOPICS, observer=Witness(), clock=time.monotonic
        )
        await self.wire.__aenter__()
        await self.device._transport.__aenter__()
        self.link = Link(self.wire, TOPICS, observer=self.witness, clock=time.monotonic)
        await self.link.subscribe(*TOPICS.coordinator_filters())
        self.branches = Branches(self.link, ("slow", "quick"), route)
        self.reader = asyncio.create_task(self.branches.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.reader.cancel()
        await asyncio.gather(self.reader, return_exceptions=True)
        await self.device._transport.__aexit__(None, None, None)
        await self.wire.__aexit__(None, None, None)


async def test_a_message_goes_to_those_it_is_for_and_the_connection_to_all() -> None:
    async with asyncio.timeout(LIMIT_S), Fleet() as fleet:
        await fleet.device.send(request(7))
        await fleet.device.send(STATUS)
        slow, quick = fleet.branches["slow"], fleet.branches["quick"]
        assert isinstance(await slow.receive(), Connected)
        assert await slow.receive() == Arrival(request(7))
        assert await slow.receive() == Arrival(STATUS)
        assert isinstance(await quick.receive(), Connected)
        assert await quick.receive() == Arrival(STATUS)
        fleet.hub.stop()
        assert isinstance(await slow.receive(), Disconnected)
        assert isinstance(await quick.receive(), Disconnected)


async def test_a_machine_with_too_much_to_do_loses_what_may_be_lost_and_holds_nobody_up() -> None:
    async with asyncio.timeout(LIMIT_S), Fleet() as fleet:
        lost: list[str] = []
        fleet.witness.dropped = lambda *what: lost.append(what[0])  # type: ignore[method-assign]
        assert isinstance(await fleet.branches["slow"].receive(), Connected)
        routes = {"features": ("slow",), "status": ("quick",)}
        fleet.branches = Branches(
            fleet.link, ("slow", "quick"), lambda address: routes.get(address.kind, ())
        )
        fleet.reader.cancel()
        fleet.reader = asyncio.create_task(fleet.branches.run())
        question = up("d", Features(run="run", request=1, version=1, deadline_ms=1000, tensor=b""))
        for _ in range(WAITING):
            assert fleet.branches["slow"].offer(Arrival(question))
        await fleet.device.send(question)
        await fleet.device.send(STATUS)
        assert await fleet.branches["quick"].receive() == Arrival(STATUS)
        assert lost == ["too_busy"]


async def test_those_who_ask_again_hold_nobody_up() -> None:
    async with asyncio.timeout(LIMIT_S), Fleet() as fleet:
        lost: list[str] = []
        fleet.witness.dropped = lambda *what: lost.append(what[0])  # type: ignore[method-assign]
        assert isinstance(await fleet.branches["slow"].receive(), Connected)
        routes = {"renew": ("slow",), "status": ("quick",)}
        fleet.branches = Branches(
            fleet.link,
            ("slow", "quick"),
            lambda address: routes.get(address.kind, ()),
            patient=("slow",),
        )
        fleet.reader.cancel()
        fleet.reader = asyncio.create_task(fleet.branches.run())
        question = up("d", Renew(nonce="n", csr=b""))
        for _ in range(WAITING):
            assert fleet.branches["slow"].offer(Arrival(question))
        await fleet.device.send(question)
        await fleet.device.send(STATUS)
        assert await fleet.branches["quick"].receive() == Arrival(STATUS)
        assert lost == ["too_busy"]


async def test_what_is_for_nobody_is_counted() -> None:
    async with asyncio.timeout(LIMIT_S), Fleet() as fleet:
        dropped = asyncio.Event()
        fleet.witness.dropped = lambda *_: dropped.set()  # type: ignore[method-assign]
        fleet.branches = Branches(fleet.link, ("slow",), lambda address: ())
        fleet.reader.cancel()
        fleet.reader = asyncio.create_task(fleet.branches.run())
        await fleet.device.send(request(1))
        await dropped.wait()


async def test_what_is_for_a_machine_that_is_not_there_is_counted() -> None:
    async with asyncio.timeout(LIMIT_S), Fleet() as fleet:
        dropped = asyncio.Event()
        fleet.witness.dropped = lambda *_: dropped.set()  # type: ignore[method-assign]
        fleet.branches = Branches(fleet.link, ("slow",), lambda address: ("identity",))
        fleet.reader.cancel()
        fleet.reader = asyncio.create_task(fleet.branches.run())
        await fleet.device.send(request(1))
        await dropped.wait()


async def test_a_machine_at_work_does_not_hold_up_the_other() -> None:
    async with asyncio.timeout(LIMIT_S), Fleet() as fleet:
        release = threading.Event()

        def wait() -> None:
            release.wait(LIMIT_S)

        slow, quick = Puppet({7: wait}), Puppet()
        slow.receive = lambda envelope: slow._step(7)  # type: ignore[method-assign]
        quick.receive = lambda envelope: quick._step(1)  # type: ignore[method-assign]
        stop = asyncio.Event()
        jobs = [
            asyncio.create_task(
                drive(machine, fleet.branches[name], clock=time.monotonic, stop=stop)
            )
            for name, machine in (("slow", slow), ("quick", quick))
        ]
        try:
            await fleet.device.send(request(7))
            await fleet.device.send(STATUS)
            assert (await quick.heard(2))[1] == 1, "answered while the other is at work"
        finally:
            release.set()
            stop.set()
            await asyncio.gather(*jobs)
        assert slow.threads.isdisjoint(quick.threads)


async def test_a_call_runs_in_the_machines_thread_and_says_what_it_returns() -> None:
    async with asyncio.timeout(LIMIT_S), Fleet() as fleet:
        machine, stop = Puppet(), asyncio.Event()
        seen: list[int] = []

        def run() -> list[Effect]:
            seen.append(threading.get_ident())
            return [request(3)]

        driving = asyncio.create_task(
            drive(machine, fleet.branches["quick"], clock=time.monotonic, stop=stop)
        )
        await machine.heard(1)
        assert fleet.branches["quick"].call(run)
        event = await fleet.branches["slow"].receive()
        while not isinstance(event, Arrival):
            event = await fleet.branches["slow"].receive()
        assert event.envelope == request(3)
        stop.set()
        await driving
        assert set(seen) <= machine.threads


async def test_calls_are_bounded() -> None:
    async with asyncio.timeout(LIMIT_S), Fleet() as fleet:
        branch = fleet.branches["quick"]
        assert isinstance(await branch.receive(), Connected)
        accepted = sum(branch.call(lambda: ()) for _ in range(WAITING + 5))
        assert accepted == WAITING
        assert isinstance(await branch.receive(), Call)
