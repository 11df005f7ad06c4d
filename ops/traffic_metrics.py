"""Metrics of the coordinator's link: bytes, and what the broker says of itself."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.messages import KINDS
from coordinator.traffic import ROLES, Traffic

_FLOWS = sorted(
    {("up" if place == "up" else "down", ROLES.get(kind, "control")) for place, kind in KINDS}
)


class TrafficMetrics(Collector):
    """Reads a :class:`Traffic` when it is asked; ``codecs`` has the codec of each role with one."""

    def __init__(self, traffic: Traffic, codecs: Mapping[str, str]) -> None:
        self._traffic = traffic
        self._codecs = codecs

    def collect(self) -> Iterable[Metric]:
        """All families; what the broker does not say has no samples."""
        yield self._bytes()
        yield from self._broker()

    def _bytes(self) -> Metric:
        family = CounterMetricFamily(
            "splitfleet_message_bytes",
            "Application payload over the coordinator's link",
            labels=["direction", "role", "codec"],
        )
        sizes = Tally(dict.fromkeys(_FLOWS, 0))
        for (direction, role, _), size in list(self._traffic.bytes.items()):
            sizes[direction, role] += size
        for (direction, role), size in sizes.items():
            family.add_metric((direction, role, self._codecs.get(role, "none")), size)
        return family

    def _broker(self) -> Iterator[Metric]:
        known = dict(self._traffic.broker)
        dropped = CounterMetricFamily(
            "splitfleet_broker_messages_dropped",
            "Messages that the broker dropped because a client's queue was full, as it says itself",
        )
        if "messages_dropped" in known:
            dropped.add_metric([], known["messages_dropped"])
        yield dropped
        for name, help_text in (
            ("clients", "Clients connected to the broker, as it says itself"),
            ("stored_messages", "Messages that the broker keeps"),
            ("stored_bytes", "Payload that the broker keeps"),
        ):
            gauge = GaugeMetricFamily(f"splitfleet_broker_{name}", help_text)
            if name in known:
                gauge.add_metric([], known[name])
            yield gauge
        overruns = CounterMetricFamily(
            "splitfleet_link_overruns",
            "Messages of QoS 0 that the coordinator's link dropped because they came too fast",
        )
        overruns.add_metric([], self._traffic.overruns())
        yield overruns
