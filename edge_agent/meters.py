"""What a device counts, in plain numbers: by the table of ``broker.telemetry``."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from broker.messages import Buckets, Telemetry
from broker.telemetry import METRICS, UNLABELLED, Kind, Metric


class Distribution:
    """Values per bucket, and their sum. One thread observes, any may read."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Distribution) -> None:
        """Count all of another one with the same bounds."""
        assert len(other.counts) == len(self.counts)
        for bucket, count in enumerate(other.counts):
            self.counts[bucket] += count
        self.total += other.total


class Meters:
    """Every metric of the table, with all its label values, at 0; gauges are not known at first.

    Raises ``KeyError`` for a metric or label value that is not in the table.
    """

    def __init__(self) -> None:
        self.counters: dict[str, dict[str, float]] = {
            metric.name: dict.fromkeys(metric.values, 0) for metric in _of("counter")
        }
        self.histograms = {
            metric.name: {value: Distribution(metric.bounds) for value in metric.values}
            for metric in _of("histogram")
        }
        self.gauges: dict[str, dict[str, float]] = {metric.name: {} for metric in _of("gauge")}

    def count(self, name: str, amount: float = 1, label: str = UNLABELLED) -> None:
        """Add to a counter."""
        self.counters[name][label] += amount

    def count_all(self, name: str, amounts: Mapping[str, float]) -> None:
        """Add to a counter by label value."""
        for label, amount in amounts.items():
            self.counters[name][label] += amount

    def gauge(self, name: str, value: float, label: str = UNLABELLED) -> None:
        """How it is now; of several that say so, their sum."""
        assert label in METRICS[name].values
        known = self.gauges[name]
        known[label] = known.get(label, 0) + value

    def distribution(self, name: str, label: str = UNLABELLED) -> Distribution:
        """The buckets of a histogram."""
        return self.histograms[name][label]

    def add(self, other: Meters) -> None:
        """Count all that another one has counted; its gauges are left out."""
        for name, amounts in other.counters.items():
            self.count_all(name, amounts)
        for name, distributions in other.histograms.items():
            for label, distribution in distributions.items():
                self.histograms[name][label].add(distribution)

    def message(self, **about: str | float) -> Telemetry:
        """What is not 0, to be sent; ``about`` are the other fields of the message."""
        distributions = {
            name: {
                label: Buckets(counts=list(found.counts), total=found.total)
                for label, found in by_label.items()
                if any(found.counts)
            }
            for name, by_label in self.histograms.items()
        }
        counters = {
            name: {label: amount for label, amount in by_label.items() if amount}
            for name, by_label in self.counters.items()
        }
        return Telemetry.model_validate(
            {
                **about,
                "counters": _named(counters),
                "gauges": _named(self.gauges),
                "histograms": _named(distributions),
            }
        )


def _named(by_metric: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: dict(by_label) for name, by_label in by_metric.items() if by_label}


def _of(kind: Kind) -> list[Metric]:
    return [metric for metric in METRICS.values() if metric.kind == kind]
