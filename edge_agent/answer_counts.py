"""The books of answering: every image in exactly one account."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from broker.telemetry import METRICS
from edge_agent.meters import Distribution


def _by_stage() -> dict[str, Distribution]:
    metric = METRICS["prediction_seconds"]
    return {stage: Distribution(metric.bounds) for stage in metric.values}


@dataclass(slots=True)
class Counts:
    """What became of the images that were asked about; sizes in bytes, times in seconds.

    At any time ``images`` = waiting + open + ``exits`` + ``answered`` + ``fallbacks`` +
    ``overloaded`` + ``cancelled`` + ``failed``, and ``offloads`` = open + ``answered`` +
    Σ ``lost`` + ``offloads_cancelled``, where waiting have not been looked at, and open are
    offloaded and not back yet. ``audits`` = under way + answered + lost, of images whose exit was
    sure; they are counted beside all that.

    One thread counts, any may read: no number ever falls.
    """

    requests: int = 0
    images: int = 0
    exits: int = 0
    """Answered by an exit that was sure."""
    offloads: int = 0
    """The server was asked about them."""
    answered: int = 0
    """And it answered in time."""
    held: Counter[str] = field(default_factory=Counter)
    """By reason, answered by an unsure exit because the server was not asked."""
    lost: Counter[str] = field(default_factory=Counter)
    """By reason, answered by an unsure exit because the server was asked and gave no answer."""
    overloaded: int = 0
    """Given up unseen, for newer ones or because their time was over."""
    cancelled: int = 0
    offloads_cancelled: int = 0
    """Of the cancelled, those that the server had been asked about."""
    failed: int = 0
    """Not answered because the network could not compute with them."""

    audits: int = 0
    """The server was asked although the exit was sure."""
    audits_agreed: int = 0
    """And it said the same as the exit."""
    audits_disagreed: int = 0
    audits_lost: int = 0

    messages: int = 0
    replies: int = 0
    """Messages of the server that came in time, refusals included."""
    late: int = 0
    """Messages of the server that came too late, or a second time; they change nothing."""
    bytes_up: int = 0
    bytes_down: int = 0

    labelled: int = 0
    """Images whose label was given and whose exit has spoken."""
    exit_correct: int = 0
    correct: int = 0
    """Of those that are answered: by the exit alone, and by whoever answered."""

    seconds: dict[str, Distribution] = field(default_factory=_by_stage)
    """By stage: ``queue`` and ``total`` of requests, ``exit`` of batches, ``encode`` of messages,
    ``round_trip`` of replies."""
    cpu_s: float = 0.0
    """Processor time of the thread that answers."""

    @property
    def audits_answered(self) -> int:
        """Audits that the server answered."""
        return self.audits_agreed + self.audits_disagreed

    @property
    def fallback(self) -> Counter[str]:
        """Images answered by an unsure exit, by the reason why the server did not."""
        return self.held + self.lost

    @property
    def fallbacks(self) -> int:
        """Sum of :attr:`fallback`."""
        return self.held.total() + self.lost.total()

    @property
    def refused(self) -> int:
        """Images whose features the server, or this device's encoder, would not have."""
        return sum(images for reason, images in self.fallback.items() if is_refusal(reason))


REFUSED = "refused:"


def is_refusal(reason: str) -> bool:
    """Whether that reason of a fallback is a refusal."""
    return reason.startswith(REFUSED)
