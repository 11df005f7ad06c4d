"""One device: what it does, what it costs it, how it is doing."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import PER_SECOND, SHARE, Curve, graph, number, rising
from ops.dashboards.promql import DEVICE, mean, rate, ratio, total

PREDICTIONS = "splitfleet_predictions"


def device() -> Dashboard:
    """The dashboard *One device*."""
    return page.page(
        "device",
        "one device",
        "What one device does and what that costs it. Those beyond the number that is shown by "
        "name are together under other.",
        [_now(), _answering()],
        variables=[page.device()],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            number(
                "Images answered",
                "Images a second.",
                Curve(rate(PREDICTIONS, DEVICE), "images/s"),
                unit=PER_SECOND,
                width=6,
            ),
            number(
                "Answered by the exit",
                "Share of the answered images whose exit was sure.",
                Curve(
                    ratio(
                        rate(PREDICTIONS, 'answered_by="exit"', DEVICE), rate(PREDICTIONS, DEVICE)
                    ),
                    "exit",
                ),
                unit=SHARE,
                width=6,
            ),
            number(
                "Threshold in force",
                "Confidence above which its exit answers.",
                Curve(mean("splitfleet_exit_threshold", DEVICE), "threshold"),
                unit="none",
                width=6,
            ),
            number(
                "Drifts",
                "1 while it trusts its exit less than it was told to, for its audits agreed too "
                "seldom.",
                Curve(total("splitfleet_drifting_devices", DEVICE), "drifts"),
                levels=rising(1, 2),
                width=6,
            ),
        ],
    )


def _answering() -> Row:
    return Row(
        "Answering",
        [
            graph(
                "Answers by origin",
                "Images a second answered by its exit, by the server, or by its exit as a "
                "fallback.",
                Curve(rate(PREDICTIONS, DEVICE, by="answered_by"), "{{answered_by}}"),
                unit=PER_SECOND,
                stacked=True,
                width=12,
            ),
            graph(
                "Processor time of answering",
                "Of the threads that answer: 1 is one core all the time.",
                Curve(rate("splitfleet_answering_cpu_seconds", DEVICE), "cores"),
                unit="none",
                width=12,
            ),
        ],
    )
