"""A row of the matrix: something that can happen, and how it ends in each phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.faults.trial import BACK_OFF_S, NOTICED_S, UNTROUBLED_S, Outcome, Phase, Trial


@dataclass(frozen=True, slots=True)
class Fault:
    """``strike`` lets it happen at the instant of a phase."""

    name: str
    strike: Callable[[Trial, Phase], None]
    lasts_s: float
    outcomes: Mapping[Phase, Outcome] = field(default_factory=dict)

    @property
    def within_s(self) -> float:
        """Virtual time in which a run with it ends."""
        return UNTROUBLED_S + self.lasts_s + NOTICED_S + BACK_OFF_S
