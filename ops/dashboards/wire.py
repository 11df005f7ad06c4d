"""The wire and the broker: what is sent, how small it is made, what is lost."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import BYTES_PER_SECOND, PER_SECOND, Curve, graph
from ops.dashboards.promql import REPORTED, increase, rate, ratio, total

BYTES_SENT = "splitfleet_message_bytes"


def wire() -> Dashboard:
    """The dashboard *Wire and broker*."""
    return page.page(
        "wire",
        "wire and broker",
        "What goes over the broker, how small the codecs make it, and what is lost on the way.",
        [_traffic(), _links(), _losses()],
        variables=[page.cut(), page.device_class()],
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
                "Of activations as devices encode them for training: 32 is no compression at all.",
                Curve(
                    "8 * "
                    + ratio(
                        rate("splitfleet_activation_bytes", *REPORTED, by="cut"),
                        rate("splitfleet_activation_values", *REPORTED, by="cut"),
                    ),
                    "cut {{cut}}",
                ),
                unit="none",
            ),
        ],
    )


def _links() -> Row:
    return Row(
        "Links of the devices",
        [
            graph(
                "Bytes sent and received, by device class",
                "Application payload as the devices count it: a broadcast counts at every device.",
                Curve(
                    rate("splitfleet_agent_message_bytes", *REPORTED, by="direction, device_class"),
                    "{{device_class}}, {{direction}}",
                ),
                unit=BYTES_PER_SECOND,
                stacked=True,
            ),
            graph(
                "Connections that were made again, by cut",
                "Within 10 minutes, by all devices. Many at once are a broker or a network that "
                "was away; always some are a bad link.",
                Curve(increase("splitfleet_reconnects", "10m", *REPORTED, by="cut"), "cut {{cut}}"),
                stacked=True,
            ),
            graph(
                "Batches that wait for a connection, by cut",
                "Kept by the devices, newest wins, until the broker is there again.",
                Curve(total("splitfleet_batches_kept", *REPORTED, by="cut"), "cut {{cut}}"),
                stacked=True,
            ),
        ],
    )


def _losses() -> Row:
    return Row(
        "Losses",
        [
            graph(
                "Dropped by the coordinator, by reason",
                "Messages a second that it did not understand or want.",
                Curve(rate("splitfleet_messages_dropped", by="reason"), "{{reason}}"),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=12,
            ),
            graph(
                "Dropped by devices, by reason",
                "Messages a second that they did not understand or had no room for.",
                Curve(
                    rate("splitfleet_agent_messages_dropped", *REPORTED, by="reason"), "{{reason}}"
                ),
                unit=PER_SECOND,
                stacked=True,
                many=True,
                width=12,
            ),
        ],
    )
