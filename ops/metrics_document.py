"""Writes docs/metrics.md from the code: ``python -m ops.metrics_document > docs/metrics.md``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

from broker.serving_messages import CutPolicy
from broker.telemetry import METRICS, PREFIX
from broker.telemetry import Metric as Reported
from coordinator.identity.standing import CONDITIONS, Expiry, Standing
from coordinator.telemetry import Gain
from coordinator.traffic import BROKER_FIGURES, Traffic
from ops.metrics import Metrics

_HEAD = """\
# Metrics

Written from the code by `python -m ops.metrics_document`; a test holds it to that.

The coordinator serves all of these at `http://HOST:PORT/metrics` (`--metrics-port`,
`--metrics-host`). Devices are not scraped: they report over MQTT what they have counted since they
started, and the coordinator adds what is new ([protocol.md](protocol.md), `up/telemetry`).
`splitfleet agent --metrics-port` also serves a device's own counts, without the labels `cut`,
`device_class` and `device`.

- `cut` is the cut layer, `none` as long as a device has none.
- `device_class` is what the agent's setting of that name says, if `splitfleet flash` has such a
  class or `ops/energy.toml` (or the coordinator's `energy_table`) an entry for it; else `other`.
- `device` is there on few metrics, for the first `metrics_devices` (50) devices; all others are
  `other`. A device that has not reported for a day is forgotten, and its series end.
- Counters begin at 0 with the coordinator, and for a cut and class when a device first reports with
  them. What a device did before the coordinator started, or between its last report and the end of
  its process, is not in them. Gauges that a device has not reported for ten minutes are left out.
- Rates and shares are for PromQL:

      sum by (cut) (rate(splitfleet_predictions_total{answered_by="exit"}[5m]))
        / sum by (cut) (rate(splitfleet_predictions_total[5m]))

`process_…` are those of the Prometheus client: processor time, memory and files of the coordinator.
"""


def document() -> str:
    """The whole text."""
    reported = {metric.exposed for metric in METRICS.values()}
    own = [family for family in _families() if family.name not in reported]
    parts = [
        _HEAD,
        "## What the coordinator counts\n",
        *_table(
            (family.name, family.type, _labels(family), family.documentation) for family in own
        ),
        "\n## What devices report\n",
        "The name on the wire is without `splitfleet_` and `_total`.\n",
        *_table(
            (metric.exposed, metric.kind, _reported_labels(metric), metric.help)
            for metric in METRICS.values()
        ),
    ]
    return "\n".join(parts) + "\n"


def filled() -> Metrics:
    """Metrics that have been told of everything once, so that every family has samples."""
    traffic = Traffic(lambda _: None)
    metrics = Metrics(traffic, clock=lambda: 0.0)
    for topic in BROKER_FIGURES:
        traffic.system(topic, b"1")
    metrics.batch_applied(1, 1, 1.0, 1.0)
    metrics.features_answered(1, 1, None)
    metrics.upload_clipped(1)
    metrics.work_changed("device", 1, 0.5)
    scores = {"server_accuracy": 0.5, "exit_accuracy": {"1": 0.5}}
    metrics.round_ended(1, "closed", {"version": 1, "seconds": 1.0, **scores})
    policy = CutPolicy(threshold=0.5, agreement=0.5, accuracy=0.5, offload_rate=0.5)
    metrics.serving(1, pinned=False, cuts={"1": policy})
    sides = {"fleet": 0.0, "claims": 0.0}
    ends = dict.fromkeys(("broker", "coordinator", "fleet-ca", "claims-ca"), 0.0)
    metrics.identity(Standing(Expiry(ends, sides), dict.fromkeys(CONDITIONS, 0)))
    gauges = {
        (metric.name, value): 1.0
        for metric in METRICS.values()
        if metric.kind == "gauge"
        for value in metric.values
    }
    metrics.telemetry(Gain("device", 1, "raspberry-pi-4", "wifi", gauges=gauges))
    return metrics


def _families() -> Iterator[Metric]:
    for family in filled().registry.collect():
        if family.name.startswith(PREFIX):
            yield family


_OPEN = ("cut", "device", "device_class", "codec", "le")
"""Labels whose values depend on the fleet."""


def _labels(family: Metric) -> str:
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            known = values.setdefault(label, [])
            if value not in known:
                known.append(value)
    values.pop("le", None)
    return "; ".join(
        f"`{label}`" if label in _OPEN else f"`{label}`: {', '.join(sorted(found))}"
        for label, found in values.items()
    )


def _reported_labels(metric: Reported) -> str:
    own = [f"`{metric.label}`: {', '.join(metric.values)}"] if metric.label else []
    named = ["`device`"] if metric.by_device else []
    return "; ".join([*own, "`cut`", "`device_class`", *named])


def _table(rows: Iterable[tuple[str, str, str, str]]) -> list[str]:
    lines = ["| name | type | labels | |", "|---|---|---|---|"]
    for name, kind, labels, meaning in rows:
        shown = f"{name}_total" if kind == "counter" else name
        lines.append(f"| `{shown}` | {kind} | {labels} | {meaning} |")
    return lines


if __name__ == "__main__":
    print(document(), end="")
