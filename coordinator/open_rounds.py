"""The round that runs, and those before it for which somebody may still bring something."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from broker.envelopes import Envelope
from coordinator.contribution import Contribution
from coordinator.ledger import Stamp
from coordinator.observer import Observer
from coordinator.settings import CoordinatorSettings
from coordinator.training import RoundInProgress

log = logging.getLogger("splitfleet.coordinator")


class OpenRounds:
    """Finds the round of a message, and a round for what comes late."""

    def __init__(self, settings: CoordinatorSettings, observer: Observer) -> None:
        self._settings = settings
        self._observer = observer
        self._barrier = settings.aggregation == "rounds"
        self._earlier: list[RoundInProgress] = []
        self._late: list[Contribution] = []
        self._over = False
        self.current: RoundInProgress | None = None

    def __iter__(self) -> Iterator[RoundInProgress]:
        """The current one, if there is one, then the earlier ones."""
        if self.current is not None:
            yield self.current
        yield from self._earlier

    def find(self, stamp: Stamp) -> RoundInProgress | None:
        """The round with this stamp, if it is remembered."""
        return next((candidate for candidate in self if candidate.stamp == stamp), None)

    def trains(self, found: RoundInProgress) -> bool:
        """Whether batches of this round are trained on; of earlier ones only without a barrier."""
        return found is self.current or not self._barrier

    @property
    def at_work(self) -> set[str]:
        """Devices that have not finished some round that they entered."""
        return {name for each in self for name in each.unfinished}

    def credits(self, device: str) -> int:
        """Batches that a device may have out, in all rounds that it has not finished."""
        return sum(each.credits(device) for each in self)

    def receipts(self) -> list[Envelope]:
        """Receipts that have waited for company long enough."""
        return [receipt for each in self if self.trains(each) for receipt in each.receipts()]

    @property
    def receipts_due(self) -> float | None:
        """When :meth:`receipts` has some, on the clock."""
        due = [each.receipts_due for each in self if self.trains(each)]
        return min((time for time in due if time is not None), default=None)

    def begin(self, opened: RoundInProgress) -> None:
        """A round runs; what came between two is folded in."""
        self.current = opened
        waiting, self._late = self._late, []
        for brought in waiting:
            self.take(brought, opened.version)

    def remember(self, closed: RoundInProgress, version: int) -> None:
        """Keep a round as long as somebody may bring something for it; ``version`` is today's."""
        bound = self._settings.staleness
        kept = [r for r in self._earlier if r.unfinished and version - r.version <= bound]
        for forgotten in self._earlier:
            if forgotten not in kept:
                forgotten.forget()
        self._earlier = [*kept, closed]

    def end(self) -> None:
        """No round will run any more."""
        for each in self._earlier:
            each.forget()
        self._earlier.clear()
        self._over = True

    def give_up(self, abandoned: RoundInProgress) -> None:
        """A round is not closed; what came late to it waits for the next."""
        self._late += abandoned.late
        abandoned.late.clear()

    def _has_room(self, current: RoundInProgress, staleness: int) -> bool:
        return not staleness or len(current.late) < self._settings.late_devices

    def take(self, brought: Contribution, version: int) -> None:
        """Fold a contribution into the current round, or the next; drop one that is too late."""
        staleness = version - brought.version
        if self._over:
            outcome = "run_over"
        elif staleness > self._settings.staleness:
            outcome = "too_late"
        elif self.current is not None and self._has_room(self.current, staleness):
            self.current.add(brought)
            outcome = "taken"
        elif self.current is None and len(self._late) < self._settings.late_devices:
            self._late.append(brought)
            return
        else:
            outcome = "not_kept"
        if staleness:
            if outcome != "taken":
                self._observer.late_work(outcome, brought.samples)
            log.info(
                "%s brought %d samples %d versions late: %s",
                brought.device,
                brought.samples,
                staleness,
                outcome,
                extra={"device": brought.device},
            )
