"""Metrics of a coordinator's answering: what it is asked, what it refuses, how long it takes."""

# ruff: noqa: ARG002 (an observer is told more than it needs)

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from broker.serving_messages import CutPolicy
from broker.telemetry import REFUSALS
from coordinator.observer import Observer

SIZE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class AnswerMetrics(Observer):
    """Safe to be told from the thread that answers and read from any other."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "splitfleet_feature_requests",
            "Requests with offloaded features, as the coordinator answered them",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("answered", *REFUSALS):
            self._requests.labels(outcome)
        self._images = Counter(
            "splitfleet_feature_images",
            "Images that the server answered for devices",
            ["cut"],
            registry=registry,
        )
        self._waiting = Gauge(
            "splitfleet_answer_queue_images",
            "Images that wait for the server's answer",
            registry=registry,
        )
        self._batch = Histogram(
            "splitfleet_answer_batch_images",
            "Images answered by one forward pass",
            buckets=SIZE_BOUNDS,
            registry=registry,
        )
        self._forward = Histogram(
            "splitfleet_answer_forward_seconds",
            "One forward pass that answers, decoding and encoding not included",
            buckets=SECONDS_BOUNDS,
            registry=registry,
        )
        self._queue = Histogram(
            "splitfleet_answer_queue_seconds",
            "How long an answered request waited for its turn",
            buckets=SECONDS_BOUNDS,
            registry=registry,
        )
        self._serving = Gauge(
            "splitfleet_serving_version", "The version that answers images", registry=registry
        )
        self._pinned = Gauge(
            "splitfleet_serving_pinned",
            "1 if that version was chosen by hand, 0 if it is the last closed round's",
            registry=registry,
        )

        self._promises = {
            name: Gauge(f"splitfleet_served_{what}", help_text, ["cut"], registry=registry)
            for name, what, help_text in (
                ("threshold", "threshold", "The confidence above which the exit is to answer"),
                (
                    "agreement",
                    "agreement_ratio",
                    "Of held-out images that the exit answers, those sure to get the network's",
                ),
                ("accuracy", "accuracy_ratio", "Held-out images that device and server get right"),
                ("offload_rate", "offload_ratio", "Held-out images that are left to the server"),
            )
        }

    def features_answered(self, cut: int, images: int, refused: str | None) -> None:
        self._requests.labels("answered" if refused is None else refused).inc()
        if refused is None:
            self._images.labels(cut).inc(images)

    def answer_waited(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def answers_computed(self, questions: int, images: int, seconds: float) -> None:
        self._batch.observe(images)
        self._forward.observe(seconds)

    def answers_waiting(self, images: int) -> None:
        self._waiting.set(images)

    def serving(self, version: int, *, pinned: bool, cuts: Mapping[str, CutPolicy]) -> None:
        self._serving.set(version)
        self._pinned.set(pinned)
        for gauge in self._promises.values():
            gauge.clear()
        for cut, policy in cuts.items():
            for name, gauge in self._promises.items():
                promised = getattr(policy, name)
                if promised is not None:
                    gauge.labels(cut).set(promised)
