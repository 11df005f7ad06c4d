"""A machine that has finished says its last words also when the connection is lost with them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from broker.drive import Effect, drive
from broker.link import Link
from broker.topics import COORDINATOR
from tests.broker.test_drive import TOPICS, Puppet, Stage, ask, driven, say


def last_words(machine: Puppet, *again: int) -> Sequence[Effect]:
    """It finishes, saying 1; on a new connection it says ``again``."""
    machine.finished = True
    machine.script = {"connected": say(*again)}
    return say(1)


async def lose_the_connection(stage: Stage) -> None:
    """With what is being sent."""
    await stage.wire.called(1)
    stage.hub.disconnect(COORDINATOR)
    stage.wire.open.set()


async def test_what_was_lost_is_said_again_on_the_next_connection() -> None:
    machine = Puppet()
    machine.script = {7: lambda: last_words(machine, 1, 2)}
    async with driven(machine, is_open=False) as stage:
        await stage.send(ask(7))
        await lose_the_connection(stage)
        await stage.driving
        assert (await stage.said(2)) == [1, 2]


async def test_what_arrived_is_not_said_again() -> None:
    machine = Puppet()
    machine.script = {7: lambda: last_words(machine, 9)}
    async with driven(machine) as stage:
        await stage.send(ask(7))
        await stage.driving
        assert await stage.said(1) == [1]
        assert "connected" not in (await machine.heard(2))[1:]


async def test_a_connection_that_does_not_come_back_is_not_waited_for_without_end() -> None:
    machine, clock = Puppet(), asyncio.get_event_loop().time
    machine.script = {"disconnected": lambda: last_words(machine)}
    async with driven(Puppet()) as stage:
        stage.stop.set()
        await stage.driving
        stage.hub.stop()
        link = Link(stage.wire, TOPICS, observer=stage.witness, clock=clock)
        await drive(machine, link, clock=clock, stop=asyncio.Event(), farewell_s=0.02)
        assert machine.finished
        assert stage.wire.published == 0
