"""Prometheus metrics of a coordinator: an observer that remembers.

Label values come from this side only (cut layers, reasons and phases that the code knows), so that
no device can fill memory with series. Those whose values are known beforehand start at 0.
"""

# ruff: noqa: ARG002 (an observer is told more than it needs)

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from broker.fields import RunPhase
from coordinator.observer import Codec
from coordinator.settings import CoordinatorSettings
from coordinator.telemetry import Gain
from coordinator.traffic import Traffic
from edge_agent.phases import Phase
from ops.answer_metrics import AnswerMetrics
from ops.energy import load_energy_table
from ops.fleet_metrics import FleetMetrics
from ops.identity_metrics import IdentityMetrics
from ops.traffic_metrics import TrafficMetrics

STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROUND_BOUNDS_S = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
OUTCOMES = ("closed", "extended", "abandoned")
PHASES: tuple[RunPhase, ...] = ("gathering", "training", "inference", "finished")
DISCARDED = (
    "bad_labels",
    "batch_too_large",
    "beyond_quota",
    "diverged",
    "foreign_run",
    "late",
    "not_a_participant",
    "not_computable",
    "not_finite",
    "outlier_loss",
    "quarantined",
    "stale_attempt",
    "unanswered",
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
    "quarantined",
    "rate_limited",
    "reassembly_full",
    "reassembly_timeout",
    "redelivered",
    "retired",
    "stale_attempt",
    "stale_join",
    "too_busy",
    "unexpected_topic",
    "unknown_telemetry",
    "unknown_version",
)
BREACHES = (
    "bad_labels",
    "bad_parameters",
    "batch_too_large",
    "corrupt",
    "invalid",
    "malformed",
    "not_finite",
    "oversized",
    "rate_limited",
    "reassembly_full",
    "wrong_shape",
)
LATE = ("folded", "not_brought", "not_kept", "run_over", "too_late")
OTHER = "other"


class Metrics(AnswerMetrics, IdentityMetrics, Collector):
    """What a coordinator is doing, in ``registry``, and what its devices report.

    Safe to read from any thread.
    """

    def __init__(
        self,
        traffic: Traffic,
        settings: CoordinatorSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        settings = settings or CoordinatorSettings()
        self.registry = CollectorRegistry()
        AnswerMetrics.__init__(self, self.registry)
        IdentityMetrics.__init__(self, self.registry)
        self._lock = threading.Lock()
        self._now = (0, 0)
        self._losses: dict[int, tuple[tuple[int, int], float, int]] = {}
        self._scores: dict[str, Any] = {}
        self._clock = clock
        self._opened: float | None = None
        self._away: float | None = None
        """Since when there has been no connection."""
        self._fleet = FleetMetrics(
            energy=load_energy_table(settings.energy_table),
            devices=settings.metrics_devices,
            clock=clock,
        )
        self.registry.register(self._fleet)
        self.registry.register(TrafficMetrics(traffic, settings.codecs_by_role))
        self._make_training_metrics()
        self._make_message_metrics()
        self._make_limits(settings)
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
        self._clipped = _counter(
            registry,
            "splitfleet_uploads_clipped",
            "Uploads of parameters that were shortened, for they had moved too far",
            "cut",
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
        self._breaches = _counter(
            registry,
            "splitfleet_breaches",
            "Rules that devices broke: too many of them bring a device into quarantine",
            "reason",
            BREACHES,
        )
        self._quarantined = Gauge(
            "splitfleet_devices_quarantined",
            "Devices that are in quarantine: out of rounds, their messages dropped",
            registry=registry,
        )
        self._late = _counter(
            registry,
            "splitfleet_late_samples",
            "Samples of contributions to earlier rounds: folded in at a discount, or dropped",
            "outcome",
            LATE,
        )
        self._make_other_metrics()

    def _make_limits(self, settings: CoordinatorSettings) -> None:
        for name, help_text, limit in (
            (
                "round_deadline_seconds",
                "The most that a round is given before it is closed, extended or abandoned",
                settings.round_deadline_s,
            ),
            (
                "answer_queue_limit_images",
                "The most images that may wait for the server's answer",
                settings.answer_queue,
            ),
        ):
            Gauge(f"splitfleet_{name}", help_text, registry=self.registry).set(limit)
        age = Gauge(
            "splitfleet_round_age_seconds",
            "Since the round that runs was opened, times without a connection to the broker not "
            "counted; 0 if none runs",
            registry=self.registry,
        )
        age.set_function(self._age)

    def _age(self) -> float:
        opened, away = self._opened, self._away
        if opened is None:
            return 0.0
        return max(0.0, (self._clock() if away is None else away) - opened)

    def _make_other_metrics(self) -> None:
        registry = self.registry
        self._codec = Histogram(
            "splitfleet_server_codec_seconds",
            "Decoding a batch's activations, and encoding its gradient, at the coordinator",
            ["stage"],
            buckets=STEP_BOUNDS_S,
            registry=registry,
        )
        for stage in ("decode", "encode"):
            self._codec.labels(stage)
        self._round_seconds = Histogram(
            "splitfleet_round_seconds",
            "From a round's opening to its close",
            buckets=ROUND_BOUNDS_S,
            registry=registry,
        )
        self._staleness = Histogram(
            "splitfleet_late_versions",
            "How many versions old contributions were that were folded in late",
            buckets=(1, 2, 4, 8, 16),
            registry=registry,
        )
        self._checkpoint_size = Gauge(
            "splitfleet_checkpoint_bytes", "Size of the newest checkpoint", registry=registry
        )
        self._checkpoint_written = Gauge(
            "splitfleet_checkpoint_timestamp_seconds",
            "When the newest checkpoint was written, since 1970",
            registry=registry,
        )
        self._broker_up = Gauge(
            "splitfleet_broker_up",
            "1 as long as the coordinator is connected to the broker",
            registry=registry,
        )
        self._connections = Counter(
            "splitfleet_coordinator_connections",
            "Connections that the coordinator made to the broker",
            registry=registry,
        )

    def _begin(self, cut: int) -> None:
        """What is counted by cut starts at 0, also for this one."""
        for metric in (self._samples, self._batches, self._step, self._images):
            metric.labels(cut)

    # -- observed ---------------------------------------------------------------------------------

    def batch_applied(self, cut: int, images: int, loss: float | None, seconds: float) -> None:
        self._samples.labels(cut).inc(images)
        self._batches.labels(cut).inc()
        self._step.labels(cut).observe(seconds)
        if loss is None:
            return
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

    def retired(self, devices: Collection[str]) -> None:
        self._fleet.forget(devices)

    def breach(self, reason: str) -> None:
        self._breaches.labels(reason).inc()

    def quarantined(self, devices: int) -> None:
        self._quarantined.set(devices)

    def upload_clipped(self, cut: int) -> None:
        self._clipped.labels(cut).inc()

    def work_changed(self, device: str, cut: int, share: float) -> None:
        self._fleet.work_share(device, share)

    def round_opened(self, number: int, rounds: int, attempt: int, quota: int) -> None:
        self._now = number, attempt
        self._opened = self._clock()
        self._round.set(number)

    def round_ended(self, number: int, outcome: str, record: dict[str, object]) -> None:
        self._rounds.labels(outcome).inc()
        if outcome != "extended":
            self._opened = None
        if outcome == "closed":
            self._score(record)
            self._time(record)

    def resumed(self, record: Mapping[str, object]) -> None:
        self._score(record)
        number = record.get("round")
        if isinstance(number, int):
            self._round.set(number)

    def _score(self, record: Mapping[str, object]) -> None:
        with self._lock:
            self._scores = dict(record)
        version = record.get("version")
        if isinstance(version, int):
            self._version.set(version)

    def _time(self, record: Mapping[str, Any]) -> None:
        if "seconds" in record:
            self._round_seconds.observe(record["seconds"])
        for late in record.get("late", ()):
            self._staleness.observe(late["staleness"])

    def codec_took(self, stage: Codec, seconds: float) -> None:
        self._codec.labels(stage).observe(seconds)

    def checkpoint(self, size: int, *, written: float) -> None:
        self._checkpoint_size.set(size)
        self._checkpoint_written.set(written)

    def connection(self, *, up: bool) -> None:
        self._broker_up.set(up)
        self._connections.inc(up)
        now, away = self._clock(), self._away
        if not up:
            self._away = now if away is None else away
        elif away is not None:
            self._away = None
            if self._opened is not None:  # deadlines stood still
                self._opened += now - max(away, self._opened)

    def telemetry(self, gain: Gain) -> None:
        self._fleet.telemetry(gain)
        if gain.cut:
            self._begin(gain.cut)

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
        with self._lock:
            yield from self._accuracies()

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
