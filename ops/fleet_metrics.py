"""What devices report, as Prometheus metrics of the fleet: by the table of ``broker.telemetry``.

Every metric has the labels ``cut`` and ``device_class``, and its own if it has one; few have
``device``, too. A cut and a class that are seen for the first time begin at 0 with all values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from itertools import accumulate
from statistics import fmean

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from broker.telemetry import METRICS
from broker.telemetry import Metric as Reported
from coordinator.telemetry import Gain
from ops.energy import EnergyTable
from ops.flash.classes import CLASSES

OTHER = "other"
FLASHED = frozenset(one.label for one in CLASSES.values())
"""What ``splitfleet flash`` calls its classes of devices; ``generic`` is one."""
FRESH_S = 600.0
"""A gauge that a device has not reported for so long says nothing of now."""
RETIRED_S = 24 * 3600.0
"""A device that has not reported for so long gives its label to another."""
ENERGY = "splitfleet_answering_energy_joules"

_FOLDS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "mean": fmean,
    "min": min,
    "max": max,
}

Place = tuple[str, ...]
"""Values of the labels ``cut`` and ``device_class``, and ``device`` where there is one."""


class DeviceNames:
    """Which devices are shown by their name: the first ``most``, as long as they report.

    The others are ``other``, also when there is room again: a device keeps the name it is shown by.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._heard: dict[str, float] = {}
        self._others: dict[str, float] = {}

    def heard(self, device: str, now: float) -> str:
        """Its label; it has reported now."""
        if device not in self._others and (device in self._heard or len(self._heard) < self._most):
            self._heard[device] = now
            return device
        self._others[device] = now
        return OTHER

    def retire(self, before: float) -> list[str]:
        """Forget those that have not reported since; the names that were shown."""
        gone = [device for device, heard in self._heard.items() if heard < before]
        for device in gone:
            del self._heard[device]
        for device in [device for device, heard in self._others.items() if heard < before]:
            del self._others[device]
        return gone

    def forget(self, devices: Collection[str]) -> list[str]:
        """Forget these; the names that were shown."""
        for device in devices:
            self._others.pop(device, None)
        return [device for device in devices if self._heard.pop(device, None) is not None]


class FleetMetrics(Collector):
    """Adds up what devices gain. Told by one thread, read by others.

    ``energy`` has the classes that are known by name; any other is ``other``. ``devices`` is how
    many are shown one by one.
    """

    def __init__(self, *, energy: EnergyTable, devices: int, clock: Callable[[], float]) -> None:
        self._energy = energy
        self._clock = clock
        self._lock = threading.Lock()
        self._names = DeviceNames(devices)
        self._places: set[Place] = set()
        """Without ``device``."""
        self._named: set[Place] = set()
        """With it."""
        self._counters: dict[tuple[str, str, Place], float] = {}
        self._histograms: dict[tuple[str, str, Place], tuple[list[int], float]] = {}
        self._gauges: dict[str, tuple[float, Place, Gain]] = {}
        """By device: when it came, and its place."""
        self._joules: dict[Place, float] = {}
        self._shares: dict[str, float] = {}

    def telemetry(self, gain: Gain) -> None:
        """Add what is new."""
        now = self._clock()
        with self._lock:
            place = self._place(gain)
            named = (*place, self._names.heard(gain.device, now))
            self._places.add(place)
            self._named.add(named)
            for (name, label), amount in gain.counters.items():
                key = name, label, named if METRICS[name].by_device else place
                self._counters[key] = self._counters.get(key, 0.0) + amount
            for (name, label), (buckets, total) in gain.histograms.items():
                key = name, label, place
                before, so_far = self._histograms.get(key, ([0] * len(buckets), 0.0))
                added = [old + new for old, new in zip(before, buckets, strict=True)]
                self._histograms[key] = added, so_far + total
            self._gauges[gain.device] = now, named, gain
            self._spend(place, gain)

    def work_share(self, device: str, share: float) -> None:
        """A device is given this share of its work from now on."""
        with self._lock:
            shown = self._names.heard(device, self._clock())
            if shown != OTHER:
                self._shares[shown] = share

    def _place(self, gain: Gain) -> Place:
        known = gain.device_class in FLASHED or gain.device_class in self._energy.device
        return str(gain.cut or "none"), gain.device_class if known else OTHER

    def _spend(self, place: Place, gain: Gain) -> None:
        board = self._energy.device.get(place[1])
        if board is None:
            return
        radio = self._energy.radio.get(gain.radio)
        cpu_s = gain.counters.get(("answering_cpu_seconds", ""), 0.0)
        size = sum(gain.counters.get(("offload_bytes", way), 0.0) for way in ("up", "down"))
        joules = cpu_s * board.watts_per_core
        joules += 0.0 if radio is None else size * radio.joules_per_byte
        self._joules[place] = self._joules.get(place, 0.0) + joules

    def forget(self, devices: Collection[str]) -> None:
        """Show these devices no more; what they have counted stays in the sums."""
        with self._lock:
            self._end_series(set(self._names.forget(devices)))
            for device in devices:
                self._gauges.pop(device, None)

    def _end_series(self, gone: Collection[str]) -> None:
        if gone:
            self._shares = {name: share for name, share in self._shares.items() if name not in gone}
            self._named = {place for place in self._named if place[-1] not in gone}
            self._counters = {
                key: amount
                for key, amount in self._counters.items()
                if not (METRICS[key[0]].by_device and key[2][-1] in gone)
            }

    def _retire(self, now: float) -> None:
        self._end_series(set(self._names.retire(now - RETIRED_S)))
        self._gauges = {
            device: told for device, told in self._gauges.items() if told[0] >= now - FRESH_S
        }

    # -- collected --------------------------------------------------------------------------------

    def describe(self) -> Iterable[Metric]:
        """The families, without samples."""
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        """All families; those that nobody has reported have no samples."""
        with self._lock:
            self._retire(self._clock())
            for metric in METRICS.values():
                labels = [metric.label] if metric.label else []
                labels += ["cut", "device_class", *(["device"] if metric.by_device else [])]
                match metric.kind:
                    case "counter":
                        yield self._counter(metric, labels)
                    case "histogram":
                        yield self._histogram(metric, labels)
                    case "gauge":
                        yield self._gauge(metric, labels)
            energy = CounterMetricFamily(
                ENERGY,
                "Estimated, not measured: processor seconds of answering times the watts of a busy "
                "core of the class, and bytes of offloads times the joules of the radio",
                labels=["cut", "device_class"],
            )
            for place, joules in sorted(self._joules.items()):
                energy.add_metric(place, joules)
            yield energy
            shares = GaugeMetricFamily(
                "splitfleet_device_work_share",
                "Share of its work that a device is given, once that has changed",
                labels=["device"],
            )
            for device, share in sorted(self._shares.items()):
                shares.add_metric([device], share)
            yield shares

    def _counter(self, metric: Reported, labels: list[str]) -> Metric:
        family = CounterMetricFamily(metric.exposed, metric.help, labels=labels)
        for place in self._sorted(metric):
            for value in metric.values:
                amount = self._counters.get((metric.name, value, place), 0.0)
                family.add_metric(_values(metric, value, place), amount)
        return family

    def _histogram(self, metric: Reported, labels: list[str]) -> Metric:
        family = HistogramMetricFamily(metric.exposed, metric.help, labels=labels)
        bounds = (*map(str, metric.bounds), "+Inf")
        nothing: tuple[list[int], float] = ([0] * len(bounds), 0.0)
        for place in self._sorted(metric):
            for value in metric.values:
                counts, total = self._histograms.get((metric.name, value, place), nothing)
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                family.add_metric(_values(metric, value, place), buckets, total)
        return family

    def _gauge(self, metric: Reported, labels: list[str]) -> Metric:
        family = GaugeMetricFamily(metric.exposed, metric.help, labels=labels)
        found: dict[tuple[str, ...], list[float]] = {}
        for _, named, gain in self._gauges.values():
            place = named if metric.by_device else named[:-1]
            for value in metric.values:
                known = gain.gauges.get((metric.name, value))
                if known is not None:
                    found.setdefault(_values(metric, value, place), []).append(known)
        for key, known_values in sorted(found.items()):
            family.add_metric(key, _FOLDS[metric.fold](known_values))
        return family

    def _sorted(self, metric: Reported) -> Collection[Place]:
        return sorted(self._named if metric.by_device else self._places)


def _values(metric: Reported, value: str, place: Place) -> tuple[str, ...]:
    return (value, *place) if metric.label else place
