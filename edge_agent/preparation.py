"""What an assignment takes before there is work under it: to be measured, a program, a learner."""

from __future__ import annotations

from collections.abc import Callable

from broker.messages import Assignment, Measurement, Request
from edge_agent.holding import SnapshotStore
from edge_agent.learning import Data, Learners
from edge_agent.meters import Meters
from edge_agent.offline import OfflineLimits
from edge_agent.privacy import Privacy
from edge_agent.probe import Probe
from edge_agent.programs import Programs
from edge_agent.telemetry import Reporter
from edge_agent.workplace import Workplace


class Preparation:
    """Measures a device that has no cut yet, and makes the workplace of one that has.

    ``uplink`` is the speed to the broker in bytes per second, 0 as long as it is unknown. ``clock``
    is monotonic, in seconds. ``offline`` is how much is kept to be sent later when the coordinator
    cannot be reached, ``privacy`` what may leave of the images.
    """

    def __init__(
        self,
        device: str,
        data: Data,
        *,
        uplink: Callable[[], float],
        learners: Learners,
        snapshots: SnapshotStore,
        reporter: Reporter,
        clock: Callable[[], float],
        offline: OfflineLimits | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        self._device = device
        self._data = data
        self._uplink = uplink
        self._learners = learners
        self._snapshots = snapshots
        self._reporter = reporter
        self._clock = clock
        self._offline = offline or OfflineLimits()
        self._privacy = privacy or Privacy()
        self._probe: Probe | None = None

    # -- without a cut ----------------------------------------------------------------------------

    def probe(self, assignment: Assignment) -> Request:
        """Begin to measure the device; what is sent to time its uplink by."""
        self._probe = Probe(
            assignment, self._learners.measure, uplink=self._uplink, clock=self._clock
        )
        return self._probe.request()

    @property
    def probing(self) -> bool:
        """Whether the device is to be measured."""
        return self._probe is not None

    @property
    def ready(self) -> bool:
        """Whether :meth:`measure` may be called."""
        return self._probe is not None and self._probe.ready

    @property
    def due(self) -> float | None:
        """When it is ready at the latest, on the clock; None when that is past."""
        return None if self._probe is None else self._probe.due

    def measure(self) -> Measurement:
        """Measure. Raises :class:`AssignmentError` or ``TensorsError`` if that cannot be."""
        probe, self._probe = self._probe, None
        assert probe is not None
        return probe.result()

    def stop(self) -> None:
        """The device need not be measured any more."""
        self._probe = None

    # -- with one ---------------------------------------------------------------------------------

    @property
    def programs(self) -> Programs | None:
        """What learners are built from; None if this device has the network as code."""
        return self._learners.programs

    def workplace(self, assignment: Assignment) -> Workplace:
        """Where it is worked under an assignment with a cut, and the program if that takes one.

        Raises :class:`AssignmentError` or ``TensorsError`` for one that cannot be followed.
        """
        applied = self._privacy.applied_to(assignment)
        return Workplace(
            self._device,
            applied,
            self._learners.build(applied),
            self._data,
            uplink=self._uplink,
            snapshots=self._snapshots,
            clock=self._clock,
            offline=self._offline,
            meters=self._reporter.own,
            cpu_clock=self._reporter.cpu_clock,
            release=self._privacy.release(applied),
        )

    def meter(self, meters: Meters) -> None:
        """Enter what has left of the images."""
        self._privacy.meter(meters)
