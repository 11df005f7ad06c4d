"""What comes of the batches of an attempt, in figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from edge_agent.meters import Meters
from tensors.rate import Rated


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one batch at the device's exit: mean loss, correct answers, images."""

    loss: float
    correct: int
    images: int


class Figures:
    """Counts for the report of one attempt, and into the device's meters, which count on."""

    def __init__(self, meters: Meters, clock: Callable[[], float]) -> None:
        self._meters = meters
        self._clock = clock
        self._loss_sum, self._correct, self._images = 0.0, 0, 0
        self._late = self._timeouts = 0
        self._bytes = self._values = 0
        self._levels: list[int] = []
        self.learnt = 0
        """Batches that were learnt from."""

    def took(
        self, part: Literal["forward", "encode", "decode", "backward"], started: float
    ) -> None:
        """A part of a batch's work is done; it began then, on the clock."""
        seconds = self._clock() - started
        self._meters.distribution("training_seconds", part).observe(seconds)

    def made(self, encoded: Rated, values: int) -> None:
        """A batch of so many values is encoded."""
        self._bytes += len(encoded.data)
        self._values += values
        if encoded.levels is not None:
            self._levels.append(encoded.levels)
        self._meters.count("batches_made")
        self._meters.count("activation_bytes", len(encoded.data))
        self._meters.count("activation_values", values)

    def lost(self, batches: int, reason: str) -> None:
        """So many came to nothing."""
        self._meters.count("batches_lost", batches, reason)

    def timed_out(self) -> None:
        """The answer to one did not come in time."""
        self._timeouts += 1
        self.lost(1, "timeout")

    def came_late(self) -> None:
        """A gradient came after its time-out."""
        self._late += 1
        self._meters.count("gradients_late")

    def returned(self, made: float) -> None:
        """The gradient of a batch made then, on the clock, is here."""
        trip = self._clock() - made
        self._meters.distribution("round_trip_seconds").observe(trip)

    def learn(self, learnt_before: int) -> None:
        """A gradient is about to be learnt from that was asked for after so many batches."""
        stale = self.learnt - learnt_before
        self._meters.distribution("gradient_staleness_batches").observe(stale)

    def learnt_from(self, result: Outcome) -> None:
        """The exit learnt from a batch."""
        self.learnt += 1
        self._loss_sum += result.loss * result.images
        self._correct += result.correct
        self._images += result.images
        if math.isfinite(result.loss):
            self._meters.count("exit_training_loss", result.loss * result.images)
            self._meters.count("exit_training_images", result.images)
            self._meters.count("exit_training_correct", result.correct)

    def report(self) -> dict[str, Any]:
        """Fields of the attempt's report."""
        images, levels = self._images, self._levels
        return {
            "late_gradients": self._late,
            "timeouts": self._timeouts,
            "exit_loss": self._loss_sum / images if images else None,
            "exit_accuracy": self._correct / images if images else None,
            "activation_bytes": self._bytes,
            "activation_values": self._values,
            "activation_levels": sum(levels) / len(levels) if levels else None,
        }
