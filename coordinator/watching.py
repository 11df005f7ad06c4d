"""What a coordinator looks after, about once a second, while its machines run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from broker.branches import Branches
from broker.errors import TransportError
from broker.logs import LogControl
from coordinator.core import CoordinatorCore
from coordinator.errors import StoreError
from coordinator.health import LOOK_S, Vitals
from coordinator.identity.enrolment import Enrolment
from coordinator.log_levels import LogLevels, read_log_levels
from coordinator.serving import TRAINING
from coordinator.settings import CoordinatorSettings
from coordinator.traffic import BROKER_FIGURES

log = logging.getLogger("splitfleet.coordinator")

CHOICE_S = 1.0
"""How often it is looked up what was chosen by hand."""

NOBODY: frozenset[str] = frozenset()

T = TypeVar("T")


async def watch(
    core: CoordinatorCore,
    branches: Branches,
    vitals: Vitals,
    logs: LogControl,
    settings: CoordinatorSettings,
    enrolment: Enrolment | None = None,
) -> None:
    """Look after all of it until cancelled."""
    training = branches[TRAINING]

    def serve(chosen: int | None) -> bool:
        return training.call(partial(core.pin, chosen))

    def log_with(levels: LogLevels) -> bool:
        if not training.call(partial(core.follow, levels)):
            return False
        logs.set_level(levels.coordinator)
        return True

    def without(retired: frozenset[str]) -> bool:
        return training.call(partial(core.retire, retired))

    logs.about(lambda: core.place)
    await asyncio.gather(
        _look_at(vitals, branches),
        _follow(core.versions.chosen, core.versions.pinned, serve),
        _follow(partial(read_log_levels, settings.state_dir), LogLevels(), log_with),
        *([_ask_the_broker(branches)] if settings.broker_figures else []),
        *([_follow(lambda: enrolment.retired, NOBODY, without)] if enrolment else []),
    )


async def _follow(look: Callable[[], T], known: T, take: Callable[[T], bool]) -> None:
    """Let ``take`` have what ``look`` finds whenever that changes; again, if it cannot now."""
    complaint = ""
    while True:
        try:
            found = await asyncio.to_thread(look)
        except StoreError as exc:
            if str(exc) != complaint:
                log.warning("%s", exc)
            complaint = str(exc)
        else:
            if found != known and take(found):
                known = found
        await asyncio.sleep(CHOICE_S)


async def _look_at(vitals: Vitals, branches: Branches) -> None:
    """Note whether the broker is there and the machines' threads go on."""
    calls = {name: branches[name].call for name in vitals.pulses}
    try:
        while True:
            vitals.look(calls, broker_connected=branches.connected)
            await asyncio.sleep(LOOK_S)
    finally:
        vitals.stopped()


async def _ask_the_broker(branches: Branches) -> None:
    """Subscribe to what the broker says of itself, once it is there; it may refuse that.

    Not before, for a subscription that is refused with the others would refuse the connection.
    """
    while True:
        await asyncio.sleep(CHOICE_S)
        if not branches.connected:
            continue
        try:
            await branches[TRAINING].subscribe(*BROKER_FIGURES)
        except TransportError as exc:
            log.info("the broker keeps its own figures to itself: %s", exc)
        return
