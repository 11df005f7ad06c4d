"""What is new in the reports of devices: differences of cumulative counts. Pure.

A device may say what it likes. What goes back, jumps further than any device can, or has a name
that is not in the table of ``broker.telemetry`` is left out; a report that is repeated or overtaken
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from broker.messages import Telemetry
from broker.telemetry import METRICS, Kind, Metric

BOOTS = 4
"""Lives of a device that are remembered: a report of an earlier one may still come."""
SLACK_S = 60.0
"""Added to the time in which something was counted before it is judged."""

ROUNDING = 1e-6
"""A sum of seconds may fall by so little: its parts may have been added in another order."""

Series = tuple[str, str]
"""Metric and label value."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What a device has done since its last report that was believed, and how it is now.

    ``histograms`` have counts per bucket and the sum of the values. ``faults`` are reasons why
    something was left out, each once.
    """

    device: str
    cut: int
    device_class: str
    radio: str
    counters: dict[Series, float] = field(default_factory=dict)
    histograms: dict[Series, tuple[list[int], float]] = field(default_factory=dict)
    gauges: dict[Series, float] = field(default_factory=dict)
    faults: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Life:
    """One boot of a device: its last report, when it came, and the counts that were believed."""

    number: int
    heard: float
    numbers: dict[Series, list[float]] = field(default_factory=dict)
    """A counter's value; a histogram's buckets and then its sum."""
    unknown: bool = False


class TelemetryLedger:
    """Keeps the last counts of every device, by its boot.

    ``cuts`` is how many cut layers there are. The caller bounds the number of devices.
    """

    def __init__(self, *, cuts: int, clock: Callable[[], float]) -> None:
        self._cuts = cuts
        self._clock = clock
        self._started = clock()
        self._lives: dict[str, dict[str, _Life]] = {}

    def forget(self, devices: Collection[str]) -> None:
        """Keep nothing of these devices."""
        for device in devices:
            self._lives.pop(device, None)

    def enter(self, device: str, report: Telemetry) -> Gain | None:
        """Enter a report; None for one that was entered before, or came later than a newer one."""
        now = self._clock()
        lives = self._lives.setdefault(device, {})
        life = lives.get(report.boot)
        if life is not None and report.number <= life.number:
            return None
        gain = Gain(
            device,
            report.cut if report.cut <= self._cuts else 0,
            report.device_class,
            report.radio,
        )
        # What a device counted before this coordinator began may have been counted by another.
        baseline = life is None and report.uptime_s > now - self._started
        if life is None:
            since = min(report.uptime_s, now - self._started)
            life = lives[report.boot] = _Life(report.number, now - since)
            while len(lives) > BOOTS:
                del lives[next(iter(lives))]
        seconds = now - life.heard + SLACK_S
        life.number, life.heard = report.number, now
        for metric, label, numbers in self._read(report, life, gain):
            before = life.numbers.get((metric.name, label), [0.0] * len(numbers))
            gained = [new - old for new, old in zip(numbers, before, strict=True)]
            most = math.inf if baseline else metric.most_per_s * seconds
            if min(gained) < -ROUNDING or max(gained) > most:
                gain.faults.add("implausible_telemetry")
                continue
            life.numbers[metric.name, label] = numbers
            if not baseline:
                _enter(gain, metric, label, [max(0.0, amount) for amount in gained])
        return gain

    def _read(
        self, report: Telemetry, life: _Life, gain: Gain
    ) -> Iterator[tuple[Metric, str, list[float]]]:
        """The counts whose meaning is known; gauges are entered as they are."""
        for name, gauges in report.gauges.items():
            for label, value in gauges.items():
                if self._known("gauge", name, label, life, gain):
                    gain.gauges[name, label] = value
        for name, counters in report.counters.items():
            for label, value in counters.items():
                if self._known("counter", name, label, life, gain):
                    yield METRICS[name], label, [value]
        for name, histograms in report.histograms.items():
            for label, found in histograms.items():
                if self._known("histogram", name, label, life, gain, buckets=len(found.counts)):
                    yield METRICS[name], label, [*found.counts, found.total]

    def _known(
        self, kind: Kind, name: str, label: str, life: _Life, gain: Gain, *, buckets: int = 1
    ) -> bool:
        metric = METRICS.get(name)
        same = metric is not None and metric.kind == kind and buckets == len(metric.bounds) + 1
        if same and label in METRICS[name].values:
            return True
        if not life.unknown:
            life.unknown = True
            gain.faults.add("unknown_telemetry")
        return False


def _enter(gain: Gain, metric: Metric, label: str, gained: Sequence[float]) -> None:
    if metric.kind == "counter":
        gain.counters[metric.name, label] = gained[0]
    else:
        *buckets, total = gained
        gain.histograms[metric.name, label] = [int(count) for count in buckets], total
