"""The wire and the broker: what is sent, how small it is made, what is lost."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import BYTES_PER_SECOND, PER_SECOND, Curve, graph
from ops.dashboards.promql import CUT, rate, series

BYTES_SENT = "splitfleet_message_bytes"


def wire() -> Dashboard:
    """The dashboard *Wire and broker*."""
    return page.page(
        "wire",
        "wire and broker",
        "What goes over the broker, how small the codecs make it, and what is lost on the way.",
        [_traffic(), _losses()],
        variables=[page.cut()],
    )


def _traffic() -> Row:
    return Row(
        "Traffic",
        [
            graph(
                "From devices, by role",
                "Application payload a second that devices send: activations, parameters, features "
                "and the small messages around them.",
                Curve(rate(BYTES_SENT, 'direction="up"', by="role"), "{{role}}"),
                unit=BYTES_PER_SECOND,
                stacked=True,
            ),
            graph(
                "To devices, by role",
                "Application payload a second that devices receive. Parameters for a whole cut "
                "count once: the broker multiplies them.",
                Curve(rate(BYTES_SENT, 'direction="down"', by="role"), "{{role}}"),
                unit=BYTES_PER_SECOND,
                stacked=True,
            ),
            graph(
                "Bits a value, by cut",
                "Of activations as they are sent, mean of the devices' last reports: 32 is no "
                "compression at all.",
                Curve(series("splitfleet_activation_bits", CUT), "cut {{cut}}"),
                unit="none",
            ),
        ],
    )


def _losses() -> Row:
    return Row(
        "Losses",
        [
            graph(
                "Messages dropped, by reason",
                "Messages a second that the coordinator did not understand or want.",
                Curve(rate("splitfleet_messages_dropped", by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=24,
            ),
        ],
    )
