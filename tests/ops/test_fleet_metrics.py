from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from broker.telemetry import METRICS
from coordinator.settings import CoordinatorSettings
from coordinator.telemetry import Gain
from coordinator.traffic import Traffic
from ops.energy import load_energy_table
from ops.flash.classes import CLASSES, device_class
from ops.fleet_metrics import ENERGY, FRESH_S, RETIRED_S
from ops.metrics import Metrics
from tests.tiny import Clock

EXIT = "predictions", "exit"
PREDICTIONS = "splitfleet_predictions_total"


class Fleet:
    """The metrics of a coordinator that shows two devices one by one."""

    def __init__(self, devices: int = 2) -> None:
        self.clock = Clock()
        settings = CoordinatorSettings(metrics_devices=devices)
        self.metrics = Metrics(Traffic(lambda reason: None), settings, clock=self.clock)

    def tell(
        self, device: str = "a", cut: int = 2, device_class: str = "generic", **gained: Any
    ) -> None:
        self.metrics.telemetry(Gain(device, cut, device_class, "wifi", **gained))

    def values(self, name: str, **labels: str) -> dict[str, float]:
        """Samples by device (or "" where there is none) with these labels."""
        text = generate_latest(self.metrics.registry).decode()
        return {
            sample.labels.get("device", ""): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }


def test_a_cut_and_class_that_is_new_begins_at_0() -> None:
    fleet = Fleet()
    assert fleet.values(PREDICTIONS) == {}
    fleet.tell()
    for value in METRICS["offloads"].values:
        assert fleet.values("splitfleet_offloads_total", outcome=value, cut="2") == {"": 0.0}
    assert fleet.values(PREDICTIONS, answered_by="exit") == {"a": 0.0}
    assert fleet.values("splitfleet_prediction_seconds_count", stage="exit") == {"": 0.0}


def test_what_the_coordinator_counts_by_cut_begins_at_0_with_its_first_device() -> None:
    fleet = Fleet()
    fleet.tell(cut=0)
    assert fleet.values("splitfleet_batches_applied_total") == {}
    fleet.tell(cut=2)
    for name in (
        "samples_applied_total",
        "batches_applied_total",
        "feature_images_total",
        "training_step_seconds_count",
    ):
        assert fleet.values(f"splitfleet_{name}", cut="2") == {"": 0.0}


def test_devices_of_a_cut_and_class_are_added() -> None:
    fleet = Fleet()
    histogram = {("prediction_seconds", "exit"): ([1] + [0] * 13 + [1], 20.0)}
    fleet.tell("a", counters={("offloads", "timeout"): 2}, histograms=histogram)
    fleet.tell("b", counters={("offloads", "timeout"): 3}, histograms=histogram)
    fleet.tell("b", 3, counters={("offloads", "timeout"): 4})
    offloads = "splitfleet_offloads_total"
    assert fleet.values(offloads, outcome="timeout", cut="2") == {"": 5.0}
    assert fleet.values(offloads, outcome="timeout", cut="3") == {"": 4.0}
    seconds = "splitfleet_prediction_seconds"
    assert fleet.values(f"{seconds}_bucket", stage="exit", le="0.0005", cut="2") == {"": 2.0}
    assert fleet.values(f"{seconds}_bucket", stage="exit", le="+Inf", cut="2") == {"": 4.0}
    assert fleet.values(f"{seconds}_sum", stage="exit", cut="2") == {"": 40.0}


def test_devices_beyond_the_bound_are_one_and_stay_so() -> None:
    fleet = Fleet(devices=2)
    for device in "abcd":
        fleet.tell(device, counters={EXIT: 1})
    fleet.tell("c", counters={EXIT: 1})
    assert fleet.values(PREDICTIONS, answered_by="exit") == {"a": 1, "b": 1, "other": 3}
    fleet.clock.advance(RETIRED_S / 2)
    for device in "bc":
        fleet.tell(device, counters={EXIT: 1})
    fleet.clock.advance(RETIRED_S / 2 + 1)
    assert fleet.values(PREDICTIONS, answered_by="exit") == {"b": 2, "other": 4}
    for device in "ce":
        fleet.tell(device, counters={EXIT: 1})
    assert fleet.values(PREDICTIONS, answered_by="exit") == {"b": 2, "e": 1, "other": 5}


def test_no_device_is_shown_if_none_shall_be() -> None:
    fleet = Fleet(devices=0)
    fleet.tell("a", counters={EXIT: 1})
    assert fleet.values(PREDICTIONS, answered_by="exit") == {"other": 1}


def test_gauges_of_devices_together_are_a_sum_or_a_mean() -> None:
    fleet = Fleet(devices=0)
    for device, threshold in (("a", 0.5), ("b", 0.75)):
        gauges = {("exit_threshold", ""): threshold, ("drifting_devices", ""): 1.0}
        fleet.tell(device, gauges=gauges)
    assert fleet.values("splitfleet_exit_threshold") == {"other": 0.625}
    assert fleet.values("splitfleet_drifting_devices") == {"other": 2}


def test_a_gauge_nobody_reports_any_more_is_gone() -> None:
    fleet = Fleet()
    fleet.tell("a", gauges={("exit_threshold", ""): 0.5})
    fleet.clock.advance(FRESH_S)
    assert fleet.values("splitfleet_exit_threshold") == {"a": 0.5}
    fleet.clock.advance(1)
    assert fleet.values("splitfleet_exit_threshold") == {}


def test_a_device_that_is_retired_makes_room_and_its_counts_stay_in_the_sums() -> None:
    fleet = Fleet(devices=1)
    for device in ("a", "b"):
        fleet.tell(device, counters={EXIT: 5.0}, gauges={("uptime_seconds", ""): 7.0})
    fleet.metrics.retired(frozenset({"a", "b", "c"}))
    assert fleet.values("splitfleet_uptime_seconds") == {}
    assert fleet.values(PREDICTIONS, answered_by="exit").get("a") is None
    fleet.tell("d", counters={EXIT: 1.0}, gauges={("uptime_seconds", ""): 7.0})
    assert fleet.values("splitfleet_uptime_seconds") == {"d": 7.0}


def test_a_class_that_a_device_made_up_makes_no_series() -> None:
    fleet = Fleet()
    for number in range(50):
        fleet.tell(device_class=f"board-{number}", counters={("offloads", "timeout"): 1})
    offloads = "splitfleet_offloads_total"
    assert fleet.values(offloads, outcome="timeout", device_class="other") == {"": 50}


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_flashed_is_a_class_of_its_own(name: str) -> None:
    fleet = Fleet()
    label = device_class(name).label
    fleet.tell(device_class=label, counters={("offloads", "timeout"): 1})
    found = fleet.values("splitfleet_offloads_total", outcome="timeout", device_class=label)
    assert found == {"": 1}


def test_energy_is_cpu_time_and_bytes_of_a_class_that_is_known() -> None:
    fleet = Fleet()
    spent = {
        ("answering_cpu_seconds", ""): 4.0,
        ("offload_bytes", "up"): 900.0,
        ("offload_bytes", "down"): 100.0,
    }
    fleet.tell("a", device_class="raspberry-pi-4", counters=spent)
    fleet.tell("b", counters=spent)
    rates = load_energy_table().rates("raspberry-pi-4", "wifi")
    joules = fleet.values(f"{ENERGY}_total", device_class="raspberry-pi-4")
    assert joules == {"": pytest.approx(rates.joules(4.0, 1000.0))}
    assert fleet.values(f"{ENERGY}_total", device_class="generic") == {}
