"""A device's own counts, for who can scrape it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from broker.telemetry import METRICS
from broker.telemetry import Metric as Reported
from edge_agent.meters import Distribution, Meters
from edge_agent.telemetry import Reporter


class AgentMetrics(Collector):
    """What a reporter would report now, in ``registry``; without cut, class and device."""

    def __init__(self, reporter: Reporter) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._reporter = reporter
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def describe(self) -> Iterable[Metric]:
        """The families of nothing, so that nobody is asked before the agent runs."""
        return self._families(Meters())

    def collect(self) -> Iterable[Metric]:
        """All families."""
        return self._families(self._reporter.meters())

    def _families(self, meters: Meters) -> Iterable[Metric]:
        for metric in METRICS.values():
            labels = [metric.label] if metric.label else []
            match metric.kind:
                case "counter":
                    counter = CounterMetricFamily(metric.exposed, metric.help, labels=labels)
                    for value, amount in meters.counters[metric.name].items():
                        counter.add_metric(_values(metric, value), amount)
                    yield counter
                case "gauge":
                    gauge = GaugeMetricFamily(metric.exposed, metric.help, labels=labels)
                    for value, now in meters.gauges[metric.name].items():
                        gauge.add_metric(_values(metric, value), now)
                    yield gauge
                case "histogram":
                    histogram = HistogramMetricFamily(metric.exposed, metric.help, labels=labels)
                    for value, found in meters.histograms[metric.name].items():
                        histogram.add_metric(_values(metric, value), _buckets(found), found.total)
                    yield histogram


def _values(metric: Reported, value: str) -> list[str]:
    return [value] if metric.label else []


def _buckets(found: Distribution) -> list[tuple[str, float]]:
    bounds = (*map(str, found.bounds), "+Inf")
    return list(zip(bounds, accumulate(found.counts), strict=True))
