"""When a device reports what it counts, and from whom it gathers that."""

from __future__ import annotations

from collections.abc import Callable

from broker.messages import Telemetry
from edge_agent.meters import Meters

Source = Callable[[Meters], None]
"""Enters what has been counted since the start, and how it is now."""


class Reporter:
    """Gathers what is counted in this life of the device, ``boot``. Pure.

    ``own`` is for who reports to count in, with ``cpu_clock`` as the processor time of its thread;
    the others are asked when it is time, every ``period_s`` seconds. ``heartbeat_s`` is how often
    the device says that it is there at all.
    """

    def __init__(
        self,
        boot: str,
        *,
        clock: Callable[[], float],
        cpu_clock: Callable[[], float] | None = None,
        heartbeat_s: float = 30.0,
        period_s: float = 60.0,
        device_class: str = "generic",
        radio: str = "none",
    ) -> None:
        self.own = Meters()
        self.cpu_clock = cpu_clock or clock
        self.heartbeat_s = heartbeat_s
        self._boot = boot
        self._clock = clock
        self._period_s = period_s
        self._device_class = device_class
        self._radio = radio
        self._started = clock()
        self._sources: list[Source] = []
        self._number = 0
        self.due = clock() + period_s
        """When the next report is due, on the clock."""

    def add(self, source: Source) -> None:
        """Ask this one, too."""
        self._sources.append(source)

    def meters(self) -> Meters:
        """All that is counted, now."""
        gathered = Meters()
        gathered.add(self.own)
        gathered.gauge("uptime_seconds", self._clock() - self._started)
        for source in self._sources:
            source(gathered)
        return gathered

    def report(self, cut: int | None) -> Telemetry:
        """The report of now, for the cut in use; the next one is due a period later."""
        now = self._clock()
        self.due = now + self._period_s
        number, self._number = self._number, self._number + 1
        return self.meters().message(
            boot=self._boot,
            number=number,
            uptime_s=now - self._started,
            cut=cut or 0,
            device_class=self._device_class,
            radio=self._radio,
        )
