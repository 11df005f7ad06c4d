from __future__ import annotations

import re

import pytest

from broker.fields import MAX_LABELS, MAX_METRICS
from broker.telemetry import METRICS, UNLABELLED, Metric

EACH = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
UNITS = {"bytes", "seconds", "batches"}
"""Of histograms."""


def test_all_fit_one_report() -> None:
    assert len(METRICS) <= MAX_METRICS


@EACH
def test_names_are_those_of_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]{2,62}[a-z]", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
    assert metric.help[0].isupper()
    assert not metric.help.endswith(".")
    unit = metric.name.rpartition("_")[2]
    assert (metric.kind == "histogram") <= (unit in UNITS)
    assert metric.label not in {"cut", "device", "device_class", "le"}


@EACH
def test_label_values_are_few_and_known(metric: Metric) -> None:
    assert len(set(metric.values)) == len(metric.values) <= MAX_LABELS
    assert (metric.label == "") == (metric.values == (UNLABELLED,))
    assert all(len(value) <= 64 for value in metric.values)


@EACH
def test_only_histograms_have_bounds_and_those_rise(metric: Metric) -> None:
    assert (metric.kind == "histogram") == bool(metric.bounds)
    assert list(metric.bounds) == sorted(set(metric.bounds))
    assert not (metric.kind == "histogram" and metric.by_device)
