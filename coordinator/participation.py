"""Who takes part in a round, and with how much work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from broker.envelopes import Envelope
from coordinator import orders
from coordinator.label_counts import LabelCounts
from coordinator.ledger import Stamp
from coordinator.open_rounds import OpenRounds
from coordinator.placement import Placement
from coordinator.registry import Device, Registry
from coordinator.rounds import Work, quorum_of, sample_devices
from coordinator.settings import CoordinatorSettings
from coordinator.training import RoundInProgress

log = logging.getLogger("splitfleet.coordinator")


class Participation:
    """Gathers devices and draws those of a round; without a barrier it lets them in as they ask.

    No more of them than whose batches fit the broker's queue. Those that are turned away wait, in
    order, and are called in when there is room. A coordinator that has ``restarted`` waits some
    time for all that it knows, because they come back one by one.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        registry: Registry,
        placement: Placement,
        rounds: OpenRounds,
        *,
        restarted: bool,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._placement = placement
        self._rounds = rounds
        self._clock = clock
        self._turned_away: dict[str, None] = {}
        self.due: float | None = clock() + settings.return_wait_s if restarted else None
        """When the wait after a restart ends, on the clock; None without one."""

    def tick(self) -> None:
        """The wait after a restart may be over."""
        if self.due is not None and self._clock() >= self.due:
            self.due = None

    def gathered(self, *, first: bool) -> Sequence[Device]:
        """The devices that a round can begin with; none as long as there are too few of them.

        All that the settings want for the ``first`` round, unless some are in quarantine, then a
        quorum of them.
        """
        needed = self._settings.min_devices
        if not first or self._registry.quarantined:
            needed = quorum_of(needed, self._settings.quorum)
        if self._registry.online < needed:
            return ()
        ready = self._registry.ready
        if len(ready) < needed:
            return ()
        if self.due is not None and len(ready) < len(self._registry.devices):
            return ()
        self.due = None
        return ready

    def draw(self, ready: Sequence[Device], stamp: Stamp) -> dict[str, Work]:
        """Those of the devices ``ready`` that take part in this attempt, and what they have to do.

        They follow from the settings' seed and the numbers of round and attempt.
        """
        room = self._placement.room(device.cut or 1 for device in ready)
        if self._settings.participation * len(ready) > room:
            log.warning(
                "only %d of %d devices take part at a time: more batches would not fit the "
                "broker's queue; raise max_queued_messages there and queue_chunks here",
                room,
                len(ready),
            )
        _, number, attempt = stamp
        chosen = sample_devices(
            [device.name for device in ready],
            self._settings.participation,
            most=room,
            seed=self._settings.seed,
            round_number=number,
            attempt=attempt,
        )
        return {name: self._work(self._registry[name]) for name in chosen}

    def ask(self, device: Device, current: RoundInProgress) -> None:
        """A device wants to take part: it is let in, or waits until there is room."""
        if not self._admit(device, current):
            self._turned_away[device.name] = None

    def call_in(self, current: RoundInProgress) -> list[Envelope]:
        """Tell devices that were turned away when there is room."""
        out: list[Envelope] = []
        while self._turned_away:
            name = next(iter(self._turned_away))
            device = self._registry[name]
            if device.online and not self._admit(device, current):
                break
            del self._turned_away[name]
            if device.online:
                out.append(current.join(name))
        return out

    def expel(self, device: str) -> None:
        """It does not wait any more."""
        self._turned_away.pop(device, None)

    def end_round(self) -> None:
        """Nobody waits for room in a round that is over."""
        self._turned_away.clear()

    def _admit(self, device: Device, current: RoundInProgress) -> bool:
        if device.cut is None:
            return False
        ready = self._registry.ready
        room = self._placement.room(d.cut or 1 for d in ready)
        others = self._rounds.at_work - {device.name}
        taken = sum(self._rounds.credits(name) for name in others if self._registry[name].online)
        if taken >= room:
            return False
        current.admit(device.name, self._work(device), devices=len(ready), most=room - taken)
        return True

    def _work(self, device: Device) -> Work:
        assert device.cut is not None
        known = self._settings.labels == "server"
        if self._settings.label_skew != "none" and known and device.labels is None:
            device.labels = LabelCounts([0] * self._settings.network.classes)
        quota = orders.quota(self._settings, device)
        return Work(device.cut, quota, device.labels, device.frozen)
