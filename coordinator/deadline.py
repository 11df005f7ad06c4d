"""A time limit of which the time without the broker is no part."""

from __future__ import annotations

from collections.abc import Callable


class Deadline:
    """When what the fleet is waited for is overdue, on a monotonic ``clock`` in seconds.

    It stands still from :meth:`pause` to :meth:`resume`, for then nobody can be heard.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due: float | None = None
        self._paused_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether there is one, be it that it stands still."""
        return self._due is not None

    @property
    def due(self) -> float | None:
        """When it is over, on the clock; None without one and while it stands still."""
        return self._due if self._paused_at is None else None

    @property
    def overdue(self) -> bool:
        """Whether it is over."""
        due = self.due
        return due is not None and self._clock() >= due

    @property
    def left_s(self) -> float | None:
        """Seconds until then; None as with :attr:`due`. May be asked for in any thread."""
        due = self.due
        return None if due is None else due - self._clock()

    def begin(self, seconds: float) -> None:
        """From now on, in place of any other."""
        self._due = self._clock() + seconds

    def end(self) -> None:
        """Nothing is waited for."""
        self._due = None

    def pause(self) -> None:
        """The broker is gone."""
        if self._paused_at is None:
            self._paused_at = self._clock()

    def resume(self) -> None:
        """The broker is there."""
        if self._paused_at is not None and self._due is not None:
            self._due += self._clock() - self._paused_at
        self._paused_at = None
