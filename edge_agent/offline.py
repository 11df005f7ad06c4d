"""Batches made while nobody could take them: a bounded queue in which the newest win."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from broker.envelopes import Envelope


@dataclass(frozen=True, slots=True)
class OfflineLimits:
    """How much a device keeps to be sent later: so many batches, each for so many seconds.

    Without any batches nothing is made while the coordinator cannot be reached.
    """

    batches: int = 64
    expiry_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A batch that waits to be sent, and when it was made, on the clock.

    ``labels`` (N,) are its own where the device keeps those, until they were needed.
    """

    batch: int
    envelope: Envelope
    made: float
    labels: Any = None


class OfflineQueue:
    """Batches that wait to be sent, the oldest (lowest number) first.

    Never more than ``limits.batches``: a new one then takes the place of the oldest.
    """

    def __init__(self, limits: OfflineLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._kept: dict[int, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, kept: Kept) -> list[int]:
        """Take a batch in; the batches that had to go for it."""
        self._kept[kept.batch] = kept
        superseded = sorted(self._kept)[: max(0, len(self._kept) - self._limits.batches)]
        self.drop(superseded)
        return superseded

    def take(self) -> Kept:
        """Take out the oldest, to send it."""
        return self._kept.pop(min(self._kept))

    def drop(self, batches: Iterable[int]) -> None:
        """Forget these."""
        for batch in batches:
            self._kept.pop(batch, None)

    def expire(self) -> list[int]:
        """Forget what has waited too long; which batches these were."""
        now = self._clock()
        overdue = [kept.batch for kept in self._kept.values() if now >= self._due(kept)]
        self.drop(overdue)
        return overdue

    @property
    def deadline(self) -> float | None:
        """When :meth:`expire` has something to do, on the clock."""
        return min(map(self._due, self._kept.values()), default=None)

    def _due(self, kept: Kept) -> float:
        return kept.made + self._limits.expiry_s
