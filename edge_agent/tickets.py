"""Requests for answers that are waiting, and what is known of one that is under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import InputError

By = Literal["exit", "server", "fallback"]
STAGES = ("queue", "exit", "encode", "round_trip", "server_queue", "server_forward", "total")


@dataclass(slots=True, eq=False)
class Ticket:
    """One request: its images until the exit has seen them, then what it said of them.

    ``open``: how many of them are not answered yet, once the exit has seen them. ``asked`` and
    ``deadline`` are on the clock.
    """

    number: int
    images: NDArray[Any]
    truth: NDArray[Any] | None
    asked: float
    deadline: float | None
    run: str = ""
    version: int = 0
    probabilities: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    confidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    by: list[By] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    open: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def seen(
        self,
        run: str,
        version: int,
        probabilities: NDArray[np.float64],
        confidence: NDArray[np.float64],
    ) -> int:
        """The exit has spoken, with these parameters; how often it was right, if labels say."""
        self.run, self.version = run, version
        self.probabilities = probabilities.astype(np.float32)
        self.confidence = confidence
        self.open = len(confidence)
        self.by, self.reasons = ["exit"] * self.open, [None] * self.open
        self.images = self.images[:0]
        if self.truth is None:
            return 0
        return int((self.probabilities.argmax(1) == self.truth).sum())

    def label(self, row: int) -> int:
        """The answer to one image as it stands."""
        return int(self.probabilities[row].argmax())

    def is_right(self, row: int) -> bool:
        """Whether that is the truth, as far as labels say."""
        return self.truth is not None and self.label(row) == int(self.truth[row])


class Waiting:
    """Requests in their order. Their number of images is for the owner to bound."""

    def __init__(self) -> None:
        self._tickets: deque[Ticket] = deque()
        self.images = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, ticket: Ticket) -> None:
        """The newest."""
        self._tickets.append(ticket)
        self.images += len(ticket.images)

    def remove(self, ticket: Ticket) -> None:
        """Whichever."""
        self._tickets.remove(ticket)
        self.images -= len(ticket.images)

    @property
    def oldest(self) -> Ticket:
        """The one whose turn is next."""
        return self._tickets[0]

    def find(self, number: int) -> Ticket | None:
        """The one with this number."""
        return next((ticket for ticket in self._tickets if ticket.number == number), None)

    def of_other_shape(self, shape: tuple[int, ...]) -> list[Ticket]:
        """Those whose images do not have this shape."""
        return [ticket for ticket in self._tickets if ticket.images.shape[1:] != shape]

    def batch(self, images: int) -> list[Ticket]:
        """Take the next requests, at most so many images together, but at least one request."""
        taken = [self._tickets.popleft()]
        total = len(taken[0].images)
        while self._tickets and total + len(self._tickets[0].images) <= images:
            taken.append(self._tickets.popleft())
            total += len(taken[-1].images)
        self.images -= total
        return taken

    def overdue(self, now: float) -> list[Ticket]:
        """Those whose deadline has come."""
        return [t for t in self._tickets if t.deadline is not None and now >= t.deadline]

    @property
    def deadline(self) -> float | None:
        """When the next is overdue."""
        times = [ticket.deadline for ticket in self._tickets if ticket.deadline is not None]
        return min(times, default=None)


def wrong_shape(shape: tuple[int, ...], wanted: tuple[int, ...] | None) -> InputError:
    """What is raised for images (N, …) of this shape where each must have the wanted one."""
    each = "(C, H, W)" if wanted is None else str(wanted)
    return InputError(f"images of shape {shape} are not taken: must be N times {each}")
