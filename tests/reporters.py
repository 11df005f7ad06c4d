"""A device's reporter that has something to report."""

from __future__ import annotations

from edge_agent.telemetry import Reporter
from tests.tiny import Clock


def counted_reporter() -> Reporter:
    """One that has a counter, a histogram and a gauge."""
    reporter = Reporter("boot", clock=Clock())
    reporter.own.count("predictions", 2, "exit")
    reporter.own.distribution("round_trip_seconds").observe(0.3)
    reporter.add(lambda meters: meters.gauge("exit_threshold", 0.7))
    return reporter
