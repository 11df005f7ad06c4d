"""What somebody on a device wants answered, and how the answering goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edge_agent.answer_counts import Counts
from edge_agent.answers import Answer
from edge_agent.errors import AgentError
from edge_agent.exit_policy import Drift


@dataclass(slots=True, eq=False)
class Enquiry:
    """A request of somebody on this device. ``done`` is called once, in the machine's thread.

    ``images`` (float32, N×C×H×W), ``labels`` (N,) or None; ``asked`` on the clock. ``cancelled``
    may be set by anybody at any time.
    """

    images: np.ndarray
    labels: np.ndarray | None
    deadline_s: float | None
    asked: float
    done: Callable[[Answer | AgentError], None]
    cancelled: bool = False
    ticket: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How the device answers at the moment.

    ``version`` of ``run``, computed up to ``cut``, answers; None as long as nothing does.
    ``online``: whether the coordinator is asked when the exit is unsure. ``waiting`` and ``open``
    are images that the exit has not seen, and that the coordinator has been asked about.
    """

    run: str | None
    version: int | None
    cut: int | None
    online: bool
    waiting: int
    open: int
    threshold: float | None
    threshold_in_force: float | None
    drift: Drift | None
    expected_round_trip_s: float | None
    counts: Counts = field(default_factory=Counts)
