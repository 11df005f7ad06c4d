"""Prometheus metrics of a coordinator: an observer that remembers.

Label values come from this side only (cut layers, reasons and phases that the code knows), so that
no device can fill memory with series. Those whose values are known beforehand start at 0.
"""

# ruff: noqa: ARG002 (an observer is told more than it needs)

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from broker.messages import KINDS, Report, RunPhase
from coordinator.telemetry import Gain
from coordinator.traffic import ROLES, Traffic
from edge_agent.phases import Phase
from ops.answer_metrics import AnswerMetrics
from ops.energy import EnergyTable, load_energy_table
from ops.fleet_metrics import FleetMetrics

STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OUTCOMES = ("closed", "extended", "abandoned")
PHASES: tuple[RunPhase, ...] = ("gathering", "training", "inference", "finished")
DISCARDED = (
    "bad_labels",
    "beyond_quota",
    "diverged",
    "foreign_run",
    "late",
    "not_a_participant",
    "not_finite",
    "stale_attempt",
    "wrong_shape",
    "wrong_version",
)
DROPPED = (
    "bad_parameters",
    "corrupt",
    "fleet_full",
    "foreign_version",
    "implausible_telemetry",
    "invalid",
    "malformed",
    "not_a_participant",
    "oversized",
    "reassembly_full",
    "reassembly_timeout",
    "redelivered",
    "stale_attempt",
    "stale_join",
    "too_busy",
    "unexpected_topic",
    "unknown_telemetry",
    "unknown_version",
)
LATE = ("folded", "not_brought", "not_kept", "run_over", "too_late")
OTHER = "other"

_FLOWS = sorted(
    {("up" if place == "up" else "down", ROLES.get(kind, "control")) for place, kind in KINDS}
)


class Metrics(AnswerMetrics, Collector):
    """What a coordinator is doing, in ``registry``, and what its devices report.

    Safe to read from any thread. ``devices`` is how many are shown one by one.
    """

    def __init__(
        self,
        traffic: Traffic,
        *,
        energy: EnergyTable | None = None,
        devices: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        super().__init__(self.registry)
        self._traffic = traffic
        self._lock = threading.Lock()
        self._now = (0, 0)
        self._losses: dict[int, tuple[tuple[int, int], float, int]] = {}
        self._exit_losses: dict[str, tuple[int, float]] = {}
        self._activation_bits: dict[str, tuple[int, float]] = {}
        self._scores: dict[str, Any] = {}
        self._reported: dict[str, tuple[int, int, int]] = {}
        self._fleet = FleetMetrics(
            energy=energy or load_energy_table(), devices=devices, clock=clock
        )
        self.registry.register(self._fleet)
        self._make_training_metrics()
        self._make_message_metrics()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _make_training_metrics(self) -> None:
        registry = self.registry
        self._round = Gauge(
            "splitfleet_round", "The round that the coordinator is in", registry=registry
        )
        self._version = Gauge(
            "splitfleet_parameter_version",
            "Grows by one with each closed round",
            registry=registry,
        )
        self._rounds = _counter(registry, "splitfleet_rounds", "Rounds", "outcome", OUTCOMES)
        self._samples = _counter(
            registry, "splitfleet_samples_applied", "Training samples applied", "cut"
        )
        self._batches = _counter(
            registry, "splitfleet_batches_applied", "Batches the server trained on", "cut"
        )
        self._discarded = _counter(
            registry, "splitfleet_batches_discarded", "Batches refused", "reason", DISCARDED
        )
        self._loss = Gauge(
            "splitfleet_server_loss",
            "Cross entropy of the whole network, mean over the round's batches so far",
            ["cut"],
            registry=registry,
        )
        self._step = Histogram(
            "splitfleet_training_step_seconds",
            "From taking a batch up to having its gradient, decoding and encoding included",
            ["cut"],
            buckets=STEP_BOUNDS_S,
            registry=registry,
        )

    def _make_message_metrics(self) -> None:
        registry = self.registry
        self._devices = _gauges(
            registry, "splitfleet_devices", "Devices known", "state", ("online", "offline")
        )
        self._phases = _gauges(
            registry,
            "splitfleet_devices_by_phase",
            "Devices online, by what they are doing",
            "phase",
            (*Phase, OTHER),
        )
        self._run_phase = _gauges(
            registry, "splitfleet_run_phase", "1 for the phase the run is in", "phase", PHASES
        )
        self._dropped = _counter(
            registry,
            "splitfleet_messages_dropped",
            "Messages not understood or not wanted",
            "reason",
            DROPPED,
        )
        self._late = _counter(
            registry,
            "splitfleet_late_samples",
            "Samples of contributions to earlier rounds: folded in at a discount, or dropped",
            "outcome",
            LATE,
        )
        self._shares = Gauge(
            "splitfleet_device_work_share",
            "Share of its work that a device is given, once that has changed",
            ["device"],
            registry=registry,
        )

    # -- observed ---------------------------------------------------------------------------------

    def batch_applied(self, cut: int, images: int, loss: float, seconds: float) -> None:
        self._samples.labels(cut).inc(images)
        self._batches.labels(cut).inc()
        self._step.labels(cut).observe(seconds)
        of_round, total, count = self._losses.get(cut, (self._now, 0.0, 0))
        if of_round != self._now:
            total, count = 0.0, 0
        self._losses[cut] = self._now, total + loss, count + 1
        self._loss.labels(cut).set((total + loss) / (count + 1))

    def batch_discarded(self, reason: str) -> None:
        self._discarded.labels(reason).inc()

    def message_dropped(self, reason: str) -> None:
        self._dropped.labels(reason).inc()

    def late_work(self, outcome: str, samples: int) -> None:
        self._late.labels(outcome).inc(samples)

    def work_changed(self, device: str, cut: int, share: float) -> None:
        self._shares.labels(device).set(share)

    def round_opened(self, number: int, rounds: int, attempt: int, quota: int) -> None:
        self._now = number, attempt
        self._round.set(number)

    def round_ended(self, number: int, outcome: str, record: dict[str, object]) -> None:
        self._rounds.labels(outcome).inc()
        if outcome == "closed":
            with self._lock:
                self._scores = dict(record)
            version = record.get("version")
            if isinstance(version, int):
                self._version.set(version)

    def device_report(self, device: str, cut: int, report: Report) -> None:
        """The account of an attempt counts once, however often the device repeats it."""
        if report.inference is not None:
            return
        new = report.round, report.attempt, report.produced
        if new <= self._reported.get(device, (-1, -1, -1)):
            return
        self._reported[device] = new
        with self._lock:
            if report.exit_loss is not None:
                self._exit_losses[device] = cut, report.exit_loss
            if report.activation_values:
                bits = 8 * report.activation_bytes / report.activation_values
                self._activation_bits[device] = cut, bits

    def telemetry(self, gain: Gain) -> None:
        self._fleet.telemetry(gain)

    def devices(self, by_state: dict[str, int]) -> None:
        phases: Tally[str] = Tally()
        for state, count in by_state.items():
            if state != "offline":
                phases[state if state in self._phases else OTHER] += count
        for phase, gauge in self._phases.items():
            gauge.set(phases[phase])
        self._devices["online"].set(phases.total())
        self._devices["offline"].set(by_state.get("offline", 0))

    def phase(self, phase: str) -> None:
        for name, gauge in self._run_phase.items():
            gauge.set(name == phase)

    # -- collected --------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """What is worked out when it is asked for, or absent until it is known."""
        yield self._bytes()
        with self._lock:
            yield from self._accuracies()
            yield _mean_by_cut(
                "splitfleet_exit_loss",
                "Cross entropy of the exit at a cut: mean of its devices' last reports",
                self._exit_losses.values(),
            )
            yield _mean_by_cut(
                "splitfleet_activation_bits",
                "Bits a value of activations as sent at a cut: mean of its devices' last reports",
                self._activation_bits.values(),
            )

    def _bytes(self) -> Metric:
        family = CounterMetricFamily(
            "splitfleet_message_bytes",
            "Application payload over the coordinator's link",
            labels=["direction", "role"],
        )
        sizes = Tally(dict.fromkeys(_FLOWS, 0))
        for (direction, role, _), size in list(self._traffic.bytes.items()):
            sizes[direction, role] += size
        for flow, size in sizes.items():
            family.add_metric(flow, size)
        return family

    def _accuracies(self) -> Iterator[Metric]:
        full = GaugeMetricFamily(
            "splitfleet_server_accuracy",
            "The full network on the test images, after the last closed round",
        )
        if "server_accuracy" in self._scores:
            full.add_metric([], self._scores["server_accuracy"])
        yield full
        exits = GaugeMetricFamily(
            "splitfleet_exit_accuracy",
            "The exit at a cut on the test images, after the last closed round",
            labels=["cut"],
        )
        for cut, accuracy in self._scores.get("exit_accuracy", {}).items():
            exits.add_metric([str(cut)], accuracy)
        yield exits


def _mean_by_cut(name: str, help_text: str, reported: Iterable[tuple[int, float]]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=["cut"])
    by_cut: dict[int, list[float]] = {}
    for cut, value in reported:
        by_cut.setdefault(cut, []).append(value)
    for cut, values in sorted(by_cut.items()):
        family.add_metric([str(cut)], sum(values) / len(values))
    return family


def _counter(
    registry: CollectorRegistry, name: str, help_text: str, label: str, known: Iterable[str] = ()
) -> Counter:
    counter = Counter(name, help_text, [label], registry=registry)
    for value in known:
        counter.labels(value)
    return counter


def _gauges(
    registry: CollectorRegistry, name: str, help_text: str, label: str, values: Iterable[str]
) -> dict[str, Gauge]:
    gauge = Gauge(name, help_text, [label], registry=registry)
    return {value: gauge.labels(value) for value in values}
