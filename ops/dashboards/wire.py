"""The wire and the broker: what is sent, how small it is made, what is lost."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards import page
from ops.dashboards.page import Row
from ops.dashboards.panels import BYTES, BYTES_PER_SECOND, PER_SECOND, SECONDS, Curve, graph
from ops.dashboards.promql import REPORTED, increase, quantile, rate, ratio, series, total

BYTES_SENT = "splitfleet_message_bytes"


def wire() -> Dashboard:
    """The dashboard *Wire and broker*."""
    return page.page(
        "wire",
        "wire and broker",
        "What goes over the broker, how small the codecs make it, and what is lost on the way.",
        [_traffic(), _codecs(), _links(), _broker(), _losses()],
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
                "Both ways, by codec",
                "The same by the codec of the role; none is what carries no tensors.",
                Curve(rate(BYTES_SENT, by="codec"), "{{codec}}"),
                unit=BYTES_PER_SECOND,
                stacked=True,
            ),
        ],
    )


def _codecs() -> Row:
    return Row(
        "Codecs",
        [
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
            graph(
                "Time of coding at the devices",
                "Encoding the activations of a batch, decoding its gradient: medians.",
                Curve(
                    quantile(
                        0.5,
                        "splitfleet_training_seconds",
                        'part=~"encode|decode"',
                        *REPORTED,
                        by="part",
                    ),
                    "{{part}}",
                ),
                unit=SECONDS,
                logarithmic=True,
            ),
            graph(
                "Time of coding at the coordinator",
                "Decoding the activations of a batch, encoding its gradient: medians.",
                Curve(quantile(0.5, "splitfleet_server_codec_seconds", by="stage"), "{{stage}}"),
                unit=SECONDS,
                logarithmic=True,
            ),
        ],
    )


def _broker() -> Row:
    return Row(
        "Broker",
        [
            graph(
                "Connection of the coordinator",
                "1 while the coordinator is connected to the broker.",
                Curve(series("splitfleet_broker_up"), "connected"),
                high=1,
            ),
            graph(
                "Clients",
                "Connected to the broker, as it says itself: the devices, the coordinator, and "
                "whoever looks on.",
                Curve(series("splitfleet_broker_clients"), "clients"),
            ),
            graph(
                "Messages dropped by the broker",
                "Messages a second that it dropped because a client's queue was full. The sender "
                "is not told.",
                Curve(rate("splitfleet_broker_messages_dropped"), "dropped"),
                unit=PER_SECOND,
                levels=((None, "green"), (1, "red")),
            ),
            graph(
                "Messages kept by the broker",
                "Retained, and waiting for clients that are slow or away.",
                Curve(series("splitfleet_broker_stored_messages"), "messages"),
            ),
            graph(
                "Payload kept by the broker",
                "Of those messages.",
                Curve(series("splitfleet_broker_stored_bytes"), "payload"),
                unit=BYTES,
            ),
            graph(
                "Overruns of the coordinator's link",
                "Messages of QoS 0 a second that the coordinator dropped because they came too "
                "fast.",
                Curve(rate("splitfleet_link_overruns"), "overruns"),
                unit=PER_SECOND,
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
