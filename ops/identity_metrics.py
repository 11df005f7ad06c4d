"""When certificates and lists end, and who asked for some: for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from coordinator.identity.standing import CONDITIONS, OUTCOMES, Standing
from coordinator.observer import Observer


class IdentityMetrics(Observer):
    """Where the coordinator has no fleet's folder, there are no samples but the counters' 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._certificates = Gauge(
            "splitfleet_certificate_expires_timestamp_seconds",
            "When a certificate that the whole fleet depends on ends, since 1970",
            ["of"],
            registry=registry,
        )
        self._lists = Gauge(
            "splitfleet_revocation_list_expires_timestamp_seconds",
            "When a revocation list ends, since 1970: the broker then lets nobody in",
            ["of"],
            registry=registry,
        )
        self._members = Gauge(
            "splitfleet_roster_devices",
            "Devices on the roster: with a certificate that is valid, near its end (it should have "
            "been renewed) or ended, awaited with a new key, or revoked",
            ["state"],
            registry=registry,
        )
        self._asked = Counter(
            "splitfleet_certificate_requests",
            "What devices that asked for a certificate got: one, or the reason why not",
            ["outcome"],
            registry=registry,
        )
        for outcome in OUTCOMES:
            self._asked.labels(outcome)

    def certificate_asked(self, outcome: str) -> None:
        self._asked.labels(outcome).inc()

    def identity(self, standing: Standing) -> None:
        for name, ends in standing.expiry.certificates.items():
            self._certificates.labels(name).set(ends)
        for name, ends in standing.expiry.lists.items():
            self._lists.labels(name).set(ends)
        for state in CONDITIONS:
            self._members.labels(state).set(standing.devices[state])
