"""The machines of a coordinator, driven side by side until the one that trains has finished."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from broker.branches import Branches
from broker.drive import Machine, drive
from coordinator.core import CoordinatorCore
from coordinator.health import Vitals
from coordinator.serving import ANSWERING, TRAINING


async def drive_all(
    core: CoordinatorCore,
    beside: Mapping[str, Machine],
    branches: Branches,
    vitals: Vitals,
    watching: Coroutine[Any, Any, None],
    stop: asyncio.Event,
) -> None:
    """Train, with the machines ``beside`` that, until training has finished or ``stop`` is set."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def prepare() -> None:  # if too much waits there, the next question does it
        branches[ANSWERING].call(core.answering.prepare)

    def changed() -> None:
        loop.call_soon_threadsafe(prepare)

    def start(name: str, machine: Machine, until: asyncio.Event) -> asyncio.Task[None]:
        stepped = vitals.pulses[name].stepped
        driven = drive(machine, branches[name], clock=time.monotonic, stop=until, stepped=stepped)
        return asyncio.create_task(driven, name=name)

    core.versions.changed = changed
    training = start(TRAINING, core, stop)
    others = [start(name, machine, ended) for name, machine in beside.items()]
    aside = [
        asyncio.create_task(branches.run(), name="branches"),
        asyncio.create_task(watching, name="watching"),
    ]
    tasks = [training, *others, *aside]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                await task  # what went wrong
        ended.set()
        await asyncio.gather(*others)
    finally:
        core.versions.changed = lambda: None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
