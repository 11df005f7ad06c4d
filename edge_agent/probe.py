"""How a device without a cut finds out what it can do: its uplink first, then itself."""

from __future__ import annotations

from collections.abc import Callable

from broker.messages import Assignment, Measurement, Request

PROBE_BYTES = 256 << 10
PROBE_WAIT_S = 20.0


class Probe:
    """Waits until the uplink is known, or has had its time, and measures the device then."""

    def __init__(
        self,
        assignment: Assignment,
        measure: Callable[[Assignment], Measurement],
        *,
        uplink: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._assignment = assignment
        self._measure = measure
        self._uplink = uplink
        self._clock = clock
        self._by = clock() + PROBE_WAIT_S

    @staticmethod
    def request() -> Request:
        """What is sent to time the uplink by."""
        return Request(what="probe", padding=bytes(PROBE_BYTES))

    @property
    def ready(self) -> bool:
        """Whether :meth:`result` may be called."""
        return self._uplink() > 0 or self._clock() >= self._by

    @property
    def due(self) -> float | None:
        """When it is ready at the latest, on the clock; None when that is past."""
        return self._by if self._clock() < self._by else None

    def result(self) -> Measurement:
        """Measure. Raises :class:`AssignmentError` or ``TensorsError`` if that cannot be."""
        measured = self._measure(self._assignment)
        return measured.model_copy(update={"uplink_bytes_per_s": self._uplink()})
