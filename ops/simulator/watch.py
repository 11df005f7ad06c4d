"""How long devices train, and how much of that time they compute."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.phases import Phase


@dataclass(slots=True)
class Stretch:
    """Of one device: seconds in the training phase of its rounds, and busy within.

    That is from the end of the step in which it entered to the beginning of that which uploads.
    """

    training_s: float = 0.0
    busy_s: float = 0.0
    _life: int = 0
    _phase: Phase = Phase.JOINING
    _since: float = 0.0
    _seconds: float = 0.0

    def stepped(self, life: int, phase: Phase, now: float, seconds: float) -> None:
        """A step that begins ``now`` and takes ``seconds`` leads to ``phase``."""
        if life == self._life and self._phase is Phase.TRAINING:
            self.training_s += now - self._since
            self.busy_s += min(self._seconds, now - self._since)
        self._life, self._phase, self._since, self._seconds = life, phase, now, seconds
