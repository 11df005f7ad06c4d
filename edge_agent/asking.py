"""A device's open question: said again, ever more slowly, until it is answered."""

from __future__ import annotations

from collections.abc import Callable

from broker.envelopes import Envelope

FIRST_RETRY_S = 2.0
LAST_RETRY_S = 30.0


class Question:
    """What the device wants to know now; it asks one thing at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wait = FIRST_RETRY_S
        self._said: list[Envelope] = []
        self.due: float | None = None
        """When :meth:`tick` says it again, on the clock; None if nothing is asked."""

    @property
    def open(self) -> list[Envelope]:
        """What is asked; empty if nothing is."""
        return list(self._said)

    def ask(self, envelope: Envelope) -> list[Envelope]:
        """Ask this, instead of what was asked before."""
        self._said, self._wait = [envelope], FIRST_RETRY_S
        self.due = self._clock() + self._wait
        return self.open

    def close(self) -> None:
        """It is answered, or no longer of interest."""
        self._said, self.due = [], None

    def tick(self) -> list[Envelope]:
        """What to say again now."""
        now = self._clock()
        if self.due is None or now < self.due:
            return []
        self._wait = min(2 * self._wait, LAST_RETRY_S)
        self.due = now + self._wait
        return self.open
