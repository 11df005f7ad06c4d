"""Virtual time: events in the order of their times, and of their making where times are equal."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from itertools import count

from ops.errors import FleetFailed

LIMIT_S = 86_400.0
MAX_EVENTS = 200_000_000


class Event:
    """Something that will happen, unless it is cancelled before."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Let it not happen; also after it has."""
        self.action = None


class World:
    """A clock that jumps from event to event, and the randomness of one ``seed``.

    Nothing in it depends on the machine: the same seed and the same calls give the same run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.now = 0.0
        """Seconds since the start."""
        self.events = 0
        """How many have happened."""
        self._queue: list[tuple[float, int, Event]] = []
        self._order = count()

    def at(self, time: float, action: Callable[[], None]) -> Event:
        """Do ``action`` at ``time``, or as soon as possible if that has passed."""
        event = Event(action)
        heapq.heappush(self._queue, (max(time, self.now), next(self._order), event))
        return event

    def after(self, delay: float, action: Callable[[], None]) -> Event:
        """Do ``action`` ``delay`` seconds from now, after what is due then already."""
        return self.at(self.now + delay, action)

    def rng(self, name: str) -> random.Random:
        """A generator of its own for each ``name``: one more user changes nobody else's numbers."""
        return random.Random(f"{self.seed}/{name}")

    def step(self) -> bool:
        """Let the next event happen; False if there is none."""
        while self._queue:
            time, _, event = heapq.heappop(self._queue)
            action = event.action
            if action is not None:
                self.now = time
                self.events += 1
                event.action = None
                action()
                return True
        return False

    def run(
        self,
        *,
        until: Callable[[], bool] = lambda: False,
        limit_s: float = LIMIT_S,
        max_events: int = MAX_EVENTS,
    ) -> bool:
        """Let events happen until ``until()``, or for ``limit_s`` seconds of virtual time.

        True if ``until()`` became true. False if there are no more events before the limit; the
        clock then stands at the limit if it was reached.

        Raises :class:`FleetFailed` after ``max_events``: something goes round in circles.
        """
        end = self.now + limit_s
        last = self.events + max_events
        while not until():
            due = self._due()
            if due is None:
                return False
            if due > end:
                self.now = end
                return False
            if self.events >= last:
                raise FleetFailed(f"{max_events} events and no end, at {self.now:.0f} s")
            self.step()
        return True

    def wait(self, seconds: float) -> None:
        """Let so much time pass, and what happens in it."""
        end = self.now + seconds
        self.run(limit_s=seconds)
        self.now = end

    def _due(self) -> float | None:
        while self._queue and self._queue[0][2].action is None:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None
