"""Who is there: the device, as it says in its status, and the coordinator, as it is heard of."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from broker.envelopes import Envelope, up
from broker.messages import Coordinator, Status
from edge_agent.phases import Phase
from edge_agent.telemetry import Reporter


class Counterpart(Enum):
    """The coordinator that has just been heard of."""

    GONE = "gone"
    KNOWN = "known"
    NEW = "new"
    """It does not know of this device, or not any more."""


class Presence:
    """What the ``device`` says of itself in its life ``boot``, and whether anybody hears it.

    ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self, device: str, boot: str, *, reporter: Reporter, clock: Callable[[], float]
    ) -> None:
        self._device = device
        self._boot = boot
        self._reporter = reporter
        self._clock = clock
        self._was_connected = False
        self._coordinator_boot: str | None = None
        self._coordinator_online = True
        self.connected = False
        """Whether the broker is there."""
        self.due = clock() + reporter.heartbeat_s
        """When the next status is, on the clock."""

    @property
    def online(self) -> bool:
        """Whether what is sent now reaches a coordinator, as far as is known."""
        return self.connected and self._coordinator_online

    def connect(self) -> None:
        """The broker is there (again)."""
        if self._was_connected:
            self._reporter.own.count("reconnects")
        self.connected = self._was_connected = True

    def disconnect(self) -> None:
        """The broker is gone."""
        self.connected = False

    def hear(self, coordinator: Coordinator, *, assigned: bool) -> Counterpart:
        """The coordinator's state; ``assigned`` says whether this device has an assignment."""
        was_online = self._coordinator_online
        self._coordinator_online = coordinator.state == "online"
        if not self._coordinator_online:
            return Counterpart.GONE
        before, self._coordinator_boot = self._coordinator_boot, coordinator.boot
        met = before is None and was_online and assigned
        return Counterpart.KNOWN if before == coordinator.boot or met else Counterpart.NEW

    def status(self, phase: Phase) -> Envelope:
        """That the device is there, and what it is at; the next is due a heartbeat later."""
        self.due = self._clock() + self._reporter.heartbeat_s
        return up(self._device, Status(state="online", connection=self._boot, phase=phase.value))

    def goodbye(self) -> Envelope:
        """The last status, when the device leaves on purpose."""
        return up(self._device, Status(state="offline", connection=self._boot))

    def report(self, cut: int | None) -> Envelope:
        """What the device has counted until now, with the cut in use."""
        return up(self._device, self._reporter.report(cut))
