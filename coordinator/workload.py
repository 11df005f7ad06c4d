"""How long rounds may take and how much each device is given, from how earlier rounds went."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from coordinator.registry import Device, Registry
from coordinator.rounds import Load, Work, deadline, next_load
from coordinator.settings import CoordinatorSettings
from coordinator.training import RoundInProgress

log = logging.getLogger("splitfleet.coordinator")


class Workload:
    """Keeps the seconds per batch of every device, and moves devices' shares of the work.

    ``dumped`` is what :meth:`dump` gave for a checkpoint.
    """

    def __init__(self, settings: CoordinatorSettings, dumped: Mapping[str, Any]) -> None:
        self._settings = settings
        self._paces: dict[str, tuple[int, float]] = {
            name: (int(cut), float(pace)) for name, (cut, pace) in dumped.get("paces", {}).items()
        }
        """Device → the cut layer and the seconds per batch of its last round; of no more devices
        than the registry holds."""

    def dump(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"paces": {name: list(pace) for name, pace in sorted(self._paces.items())}}

    def deadline(self, work: Iterable[Work]) -> float:
        """Seconds for a round in which devices have this to do."""
        most: dict[int, int] = {}
        for one in work:
            most[one.cut] = max(one.quota, most.get(one.cut, 0))
        by_cut: dict[int, list[float]] = {}
        for cut, pace in self._paces.values():
            by_cut.setdefault(cut, []).append(pace)
        by_count = most and self._settings.round_seconds is None
        return deadline(
            by_cut,
            most,
            mads=self._settings.deadline_mads if by_count else None,
            ceiling_s=self._settings.round_deadline_s,
        )

    def note(
        self, ended: RoundInProgress, registry: Registry, deadline_s: float, *, closed: bool
    ) -> list[Device]:
        """Learn from a round that has ended; the devices that are given other work from now on.

        After a round that was abandoned nothing is known of how long the next will take.
        """
        if not closed:
            self._paces.clear()
            return []
        changed = []
        for name, cut in ended.participants.items():
            batches, finished, seconds = ended.progress(name)
            if not batches or name in ended.expelled:
                continue  # it was away; that says nothing about how fast it is
            self._paces[name] = cut, seconds / batches
            if self._adapts:
                device = registry[name]
                spare = finished and seconds < deadline_s / 2
                if self._adapt(device, finished=finished, spare=spare):
                    changed.append(device)
        return changed

    @property
    def _adapts(self) -> bool:
        """Only where a round ends for all at once, after a number of batches."""
        settings = self._settings
        by_count = settings.aggregation == "rounds" and settings.round_seconds is None
        return settings.adapt_work and by_count

    def _adapt(self, device: Device, *, finished: bool, spare: bool) -> bool:
        before = device.load.share
        device.load, shallower = next_load(device.load, finished=finished, spare=spare)
        if shallower:
            fixed = device.hello is None or device.hello.cut is not None or device.frozen
            if fixed or device.cut is None or device.cut == 1:
                device.load = Load(before)
                return False
            device.cut -= 1
            log.warning(
                "%s is late even with little work: cut layer %d now",
                device.name,
                device.cut,
                extra={"device": device.name},
            )
        elif device.load.share != before:
            percent, about = 100 * device.load.share, {"device": device.name}
            log.warning("%s is given %.0f %% of its work", device.name, percent, extra=about)
        return device.load.share != before
