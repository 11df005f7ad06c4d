"""What is said about a round: who trains on what, what became of it, and what was learnt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import FailFast, Field

from broker.errors import MessageError
from broker.fields import (
    BY_REASON,
    MAX_BATCH,
    Amount,
    Blob,
    Count,
    Label,
    Message,
    Name,
    Range,
    Ranges,
    RunPhase,
    Tensor,
)
from broker.serving_messages import Inference


class Stamp(Message):
    """Which try at which round of which run a message belongs to."""

    run: Name
    round: Count
    attempt: Count

    @property
    def stamp(self) -> tuple[str, int, int]:
        """``(run, round, attempt)``, to compare."""
        return self.run, self.round, self.attempt


class Round(Stamp):
    """Retained: what the fleet is doing now, and with which version of the parameters.

    With ``train_s`` a device produces batches for so many seconds, at least one and at most its
    quota. Without a ``barrier`` it finishes the round it is in before it enters this one. A
    ``feedback_weight`` is for this round, in place of the assignment's.
    """

    phase: RunPhase
    version: Count
    rounds: Count
    learning_rate: Amount = 0.0
    feedback_weight: Amount | None = None
    deadline_s: Amount = 0.0
    train_s: Amount = 0.0
    barrier: bool = True


class Receipt(Stamp):
    """What became of a device's batches in this attempt.

    ``applied`` and ``discarded`` (reason → batches) name what is new since the last receipt; in a
    ``complete`` one (the answer to a join, and the final one) they name all. ``next_batch`` is the
    first number the coordinator has not seen, where a device that lost its memory goes on.
    ``quota``, in the answer to a join, are the device's batches in this round; without it those of
    its assignment.
    """

    applied: Ranges = Field(default_factory=list)
    discarded: Annotated[dict[Name, Ranges], BY_REASON] = Field(default_factory=dict)
    credits: Annotated[int, Field(ge=0, le=1024)]
    next_batch: Count = 0
    quota: Count | None = None
    complete: bool = False
    participant: bool = True
    final: bool = False


class Activations(Stamp):
    """Activations at the cut for one batch, with the labels the coordinator trains on.

    Without labels where the device keeps the classifier.
    """

    batch: Count
    version: Count
    labels: Annotated[list[Label], FailFast(), Field(max_length=MAX_BATCH)] = Field(
        default_factory=list
    )
    tensor: Tensor


class LastFeatures(Stamp):
    """What the coordinator's blocks made of one batch of activations, for the device's classifier.

    Answered with :class:`FeatureGradients`.
    """

    batch: Count
    tensor: Tensor


class FeatureGradients(Stamp):
    """The gradient of a device's loss at the last features of one batch (:class:`LastFeatures`)."""

    batch: Count
    tensor: Tensor


class Gradients(Stamp):
    """The gradient of the server's loss at the cut, for one batch of activations.

    ``logits``: what the whole network answered before the step, (N, K), for the exit to learn from.
    ``loss`` and ``correct`` are left out where the device keeps the classifier: it knows them.
    """

    batch: Count
    loss: float | None = None
    correct: Count | None = None
    logits: Blob | None = None
    tensor: Tensor


class DeviceParameters(Stamp):
    """A device's blocks and exit head after its last batch of the round.

    With ``base``, ``state`` holds what changed since that version (``tensors.deltas``); it must be
    the version of the round.
    """

    version: Count
    produced: Count
    base: Count | None = None
    state: Blob


class Report(Stamp):
    """A device's own account of an attempt (or, with ``inference``, of answering test images)."""

    produced: Count = 0
    applied: Count = 0
    discarded: Annotated[dict[Name, Count], BY_REASON] = Field(default_factory=dict)
    expired: Count = 0
    late_gradients: Count = 0
    timeouts: Count = 0
    exit_loss: Amount | None = None
    exit_accuracy: Amount | None = None
    activation_bytes: Count = 0
    """Encoded activations of the batches produced here, and how many values they stand for."""
    activation_values: Count = 0
    activation_levels: Amount | None = None
    """Mean number of levels of a batch; absent for floats."""
    inference: Inference | None = None


def to_ranges(numbers: Iterable[int]) -> list[Range]:
    """Sorted runs of consecutive numbers."""
    ranges: list[Range] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def from_ranges(ranges: Iterable[Range], *, limit: int) -> set[int]:
    """The numbers in ``ranges``; at most ``limit`` of them, else :class:`MessageError`."""
    numbers: set[int] = set()
    for first, last in ranges:
        if last < first or last - first >= limit or len(numbers) + last - first >= limit:
            raise MessageError("invalid", f"batch range {first}–{last} is not plausible")
        numbers.update(range(first, last + 1))
    return numbers
