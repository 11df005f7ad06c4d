"""What a coordinator looks after, about once a second, while its machines run."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from broker.branches import Branch, Branches
from coordinator.core import CoordinatorCore
from coordinator.errors import StoreError
from coordinator.health import LOOK_S, Vitals

log = logging.getLogger("splitfleet.coordinator")

CHOICE_S = 1.0
"""How often it is looked up which version was chosen to serve."""


async def watch_choice(core: CoordinatorCore, branch: Branch) -> None:
    """Have the version that is chosen by hand served."""
    before, complaint = core.versions.pinned, ""
    while True:
        await asyncio.sleep(CHOICE_S)
        try:
            chosen = await asyncio.to_thread(core.versions.chosen)
        except StoreError as exc:
            if str(exc) != complaint:
                log.warning("%s", exc)
            complaint = str(exc)
            continue
        if chosen != before and branch.call(partial(core.pin, chosen)):
            before = chosen


async def watch_vitals(vitals: Vitals, branches: Branches) -> None:
    """Note whether the broker is there and the machines' threads go on."""
    calls = {name: branches[name].call for name in vitals.pulses}
    try:
        while True:
            vitals.look(calls, broker_connected=branches.connected)
            await asyncio.sleep(LOOK_S)
    finally:
        vitals.stopped()
