"""One device: what it does, what that costs it, how it is doing."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import (
    BYTES,
    BYTES_PER_SECOND,
    CELSIUS,
    PER_SECOND,
    SECONDS,
    SHARE,
    Curve,
    graph,
    number,
    rising,
)
from ops.dashboards.promql import (
    DEVICE,
    behind,
    increase,
    largest,
    mean,
    rate,
    ratio,
    series,
    total,
)

PREDICTIONS = "splitfleet_predictions"


def device() -> Dashboard:
    """The dashboard *One device*."""
    return page.page(
        "device",
        "one device",
        "What one device does, what that costs it and how it is doing. Those beyond the number "
        "that is shown by name are together under other.",
        [_now(), _doing(), _being()],
        variables=[page.device()],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            number(
                "Cut layer and class",
                "Where its half of the network ends, and what kind of board it is.",
                Curve(series("splitfleet_uptime_seconds", DEVICE), "{{cut}}, {{device_class}}"),
                named=True,
                width=6,
            ),
            number(
                "Uptime",
                "Since its agent started.",
                Curve(series("splitfleet_uptime_seconds", DEVICE), "uptime"),
                unit=SECONDS,
            ),
            number(
                "Versions behind",
                "How much older the parameters are that it trains from than the last closed "
                "round's.",
                Curve(behind(DEVICE, by="device"), "versions"),
                levels=rising(2, 5),
            ),
            number(
                "Reconnects",
                "Connections to the broker within a day after the first one of a boot.",
                Curve(increase("splitfleet_reconnects", "1d", DEVICE), "reconnects"),
                decimals=0,
                levels=rising(10, 100),
            ),
            number(
                "Drift",
                "Whether it trusts its exit less than it was told to, for its audits agreed too "
                "seldom.",
                Curve(total("splitfleet_drifting_devices", DEVICE), "drifts"),
                levels=rising(1, 2),
                words={"0": "none", "1": "drifts"},
                width=6,
            ),
        ],
    )


def _doing() -> Row:
    return Row(
        "What it does",
        [
            graph(
                "Batches made",
                "Training batches a second that it computed and encoded.",
                Curve(rate("splitfleet_batches_made", DEVICE), "batches"),
                unit=PER_SECOND,
            ),
            graph(
                "Answers by origin",
                "Images a second answered by its exit, by the server, or by its exit as a "
                "fallback.",
                Curve(rate(PREDICTIONS, DEVICE, by="answered_by"), "{{answered_by}}"),
                unit=PER_SECOND,
                stacked=True,
            ),
            graph(
                "Share answered by the exit, and its threshold",
                "The confidence above which its exit answers, and how often it did.",
                Curve(
                    ratio(
                        rate(PREDICTIONS, 'answered_by="exit"', DEVICE), rate(PREDICTIONS, DEVICE)
                    ),
                    "share",
                ),
                Curve(mean("splitfleet_exit_threshold", DEVICE), "threshold"),
                unit=SHARE,
                low=None,
                high=1,
            ),
        ],
    )


def _being() -> Row:
    return Row(
        "What that costs it",
        [
            graph(
                "Processor cores in use",
                "Of the agent's process, and of that, of the threads that answer images.",
                Curve(rate("splitfleet_agent_cpu_seconds", DEVICE), "agent"),
                Curve(rate("splitfleet_answering_cpu_seconds", DEVICE), "answering"),
                unit="none",
            ),
            graph(
                "Memory",
                "Resident memory of the agent's process.",
                Curve(total("splitfleet_agent_memory_bytes", DEVICE), "resident"),
                unit=BYTES,
            ),
            graph(
                "Bytes sent and received",
                "Application payload over its link.",
                Curve(
                    rate("splitfleet_agent_message_bytes", DEVICE, by="direction"),
                    "{{direction}}",
                ),
                unit=BYTES_PER_SECOND,
            ),
            graph(
                "Temperature",
                "Its hottest sensor; empty where a board has none.",
                Curve(series("splitfleet_temperature_celsius", DEVICE), "hottest"),
                unit=CELSIUS,
                low=None,
                levels=rising(75, 85),
                absent="no sensor",
                width=12,
            ),
            graph(
                "Privacy spent",
                "The zCDP (ρ) of its image that was released most; labels and parameters are not "
                "covered. Empty where it adds no noise.",
                Curve(largest("splitfleet_privacy_rho", DEVICE), "most released image"),
                unit="none",
                absent="no noise is added",
                width=12,
            ),
        ],
    )
