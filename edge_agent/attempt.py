"""One try at one round on one device: batches out, gradients and receipts in, books kept."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from broker.envelopes import Envelope, up
from broker.messages import Activations, Assignment, Gradients, Histogram, Receipt, Report, Round
from edge_agent.encoding import ActivationEncoder
from edge_agent.errors import TrainingError
from edge_agent.ledger import Ledger
from edge_agent.predictor import Predictor
from edge_agent.snapshots import Snapshot
from tensors.decoding import nonzero
from tensors.errors import CodecError, FormatError
from tensors.format import Buffer, read_header

ROUND_TRIP_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Result(Protocol):
    """What a batch did at the exit."""

    @property
    def loss(self) -> float: ...

    @property
    def correct(self) -> int: ...

    @property
    def images(self) -> int: ...


class Learner(Protocol):
    """The device's half, as the state machine sees it; ``edge_agent.learner`` has torch's."""

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take new parameters; this is where :meth:`rewind` returns to."""
        ...

    @property
    def start(self) -> Snapshot:
        """The start of the round: what :meth:`rewind` returns to."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Take parameters and momentum as the start of the next round."""
        ...

    def rewind(self) -> None:
        """Return to the start of the round: parameters, buffers and optimizer."""
        ...

    def set_learning_rate(self, rate: float) -> None: ...

    def forward(self, batch: int, images: np.ndarray, labels: np.ndarray) -> Any:
        """Features at the cut, to encode."""
        ...

    def backward(self, batch: int, gradient: Any | None) -> Result: ...

    def decode(self, data: Buffer, keep: np.ndarray | None) -> Any:
        """An encoded gradient as :meth:`backward` takes it; ``keep`` if it is masked."""
        ...

    def discard(self, batch: int) -> None:
        """Forget a batch without learning from it."""
        ...

    def state(self) -> dict[str, np.ndarray]: ...

    def predictor(self) -> Predictor:
        """Answers with the parameters of the last :meth:`load`."""
        ...


class Stream(Protocol):
    """Training batches by position: a pure function of seed, device and position."""

    def batch(self, position: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(slots=True)
class _Pending:
    envelope: Envelope
    sent: float
    due: float


class Attempt:
    """A device's work in one attempt at a round.

    ``receipt`` is the coordinator's answer to the request to join: where to go on, and what became
    of the batches an earlier life of this device sent. Raises ``MessageError`` if it is absurd.
    """

    def __init__(
        self,
        device: str,
        assignment: Assignment,
        announced: Round,
        receipt: Receipt,
        learner: Learner,
        stream: Stream,
        *,
        encoder: ActivationEncoder,
        clock: Callable[[], float],
    ) -> None:
        self.stamp = announced.stamp
        self.version = announced.version
        self._device = device
        self._assignment = assignment
        self._learner = learner
        self._stream = stream
        self._clock = clock
        self._encoder = encoder
        self._credits = receipt.credits
        self._ledger = Ledger(
            limit=assignment.quota, produced=min(receipt.next_batch, assignment.quota)
        )
        self._ledger.settle(receipt)
        self._pending: dict[int, _Pending] = {}
        self._to_learn: deque[tuple[Gradients, Activations]] = deque()
        self._round_trips = [0] * (len(ROUND_TRIP_BOUNDS_S) + 1)
        self._round_trip_s = 0.0
        self._loss_sum, self._correct, self._images = 0.0, 0, 0
        self._late_gradients = self._timeouts = 0
        self._activation_bytes = self._activation_values = 0
        self._levels: list[int] = []
        learner.rewind()
        learner.set_learning_rate(announced.learning_rate)

    @property
    def produced(self) -> int:
        """Batches of this attempt so far, those of an earlier life included."""
        return self._ledger.produced

    @property
    def can_produce(self) -> bool:
        """Whether quota, window and credits allow another batch now.

        An answer is learnt from before the next batch: to send that first would be a little faster,
        but another step of staleness cost the exits six points (docs/benchmarks.md).
        """
        allowed = self._credits
        if self._assignment.feedback == "gradient":
            allowed = min(allowed, self._assignment.window - len(self._to_learn))
        return self.produced < self._assignment.quota and len(self._pending) < allowed

    @property
    def can_learn(self) -> bool:
        """Whether an answer waits to be learnt from."""
        return bool(self._to_learn)

    @property
    def complete(self) -> bool:
        """Whether every batch of the quota is out, answered and learnt from."""
        waits = self._pending or self._to_learn
        return self.produced >= self._assignment.quota and not waits

    @property
    def deadline(self) -> float | None:
        """When the oldest answer is overdue."""
        return min((pending.due for pending in self._pending.values()), default=None)

    def produce(self) -> list[Envelope]:
        """Compute the next batch; the activations to send."""
        started = self._clock()
        batch = self._ledger.produce()
        run, number, attempt = self.stamp
        position = (number - 1) * self._assignment.quota + batch
        images, labels = self._stream.batch(position)
        features = self._learner.forward(batch, images, labels)
        try:
            encoded = self._encoder.encode(features, images=len(labels), seed=position)
        except CodecError:
            self._learner.discard(batch)
            self._ledger.discarded([batch], "not_finite")
            return []
        self._activation_bytes += len(encoded.data)
        self._activation_values += math.prod(features.shape)
        if encoded.levels is not None:
            self._levels.append(encoded.levels)
        self._encoder.spent("forward", self._clock() - started)
        if self._assignment.feedback == "none":
            self._learn(batch, None)
        message = Activations(
            run=run,
            round=number,
            attempt=attempt,
            batch=batch,
            version=self.version,
            labels=labels.tolist(),
            tensor=encoded.data,
        )
        now = self._clock()
        envelope = up(self._device, message)
        self._pending[batch] = _Pending(envelope, now, now + self._assignment.gradient_timeout_s)
        return [envelope]

    def gradient(self, gradients: Gradients) -> None:
        """Enter a gradient; one that comes after its time-out is counted and dropped."""
        self._ledger.applied([gradients.batch])
        if self._assignment.feedback != "gradient":
            return
        pending = self._pending.pop(gradients.batch, None)
        if pending is None:
            self._late_gradients += 1
            return
        trip = self._clock() - pending.sent
        self._round_trips[bisect_left(ROUND_TRIP_BOUNDS_S, trip)] += 1
        self._round_trip_s += trip
        sent = pending.envelope.message
        assert isinstance(sent, Activations)
        self._to_learn.append((gradients, sent))

    def learn(self) -> None:
        """Learn from the gradient that has waited longest."""
        gradients, sent = self._to_learn.popleft()
        try:
            self._learn(gradients.batch, self._decode(gradients.tensor, sent))
        except FormatError:
            self._learn(gradients.batch, None)

    def receipt(self, receipt: Receipt) -> None:
        """Enter a receipt. A batch that was discarded is learnt from at the exit alone."""
        self._credits = receipt.credits
        for batch in self._ledger.settle(receipt):
            if batch not in self._pending:
                continue
            if self._assignment.feedback == "none":
                del self._pending[batch]
            elif not self._ledger.is_applied(batch):
                del self._pending[batch]
                self._learn(batch, None)

    def tick(self) -> None:
        """Stop waiting for answers that are overdue; those batches step on the exit alone."""
        now = self._clock()
        for batch in [b for b, pending in self._pending.items() if now >= pending.due]:
            del self._pending[batch]
            self._timeouts += 1
            if self._assignment.feedback == "gradient":
                self._learn(batch, None)

    def unanswered(self) -> list[Envelope]:
        """What to say again on a new connection; the time-outs start anew."""
        now = self._clock()
        for pending in self._pending.values():
            pending.due = now + self._assignment.gradient_timeout_s
        return [pending.envelope for pending in self._pending.values()]

    def report(self) -> Report:
        """The books of this attempt."""
        run, number, attempt = self.stamp
        account = self._ledger.account()
        return Report(
            run=run,
            round=number,
            attempt=attempt,
            produced=account.produced,
            applied=account.applied,
            discarded=dict(account.discarded),
            expired=account.expired,
            late_gradients=self._late_gradients,
            timeouts=self._timeouts,
            exit_loss=self._loss_sum / self._images if self._images else None,
            exit_accuracy=self._correct / self._images if self._images else None,
            activation_bytes=self._activation_bytes,
            activation_values=self._activation_values,
            activation_levels=sum(self._levels) / len(self._levels) if self._levels else None,
            round_trip=Histogram(
                bounds=list(ROUND_TRIP_BOUNDS_S),
                counts=self._round_trips,
                total=self._round_trip_s,
            ),
        )

    def _decode(self, gradient: Buffer, sent: Activations) -> Any:
        keep = nonzero(sent.tensor) if read_header(gradient).masked else None
        return self._learner.decode(gradient, keep)

    def _learn(self, batch: int, gradient: Any | None) -> None:
        started = self._clock()
        try:
            result = self._learner.backward(batch, gradient)
        except TrainingError:
            return
        self._encoder.spent("backward", self._clock() - started)
        self._loss_sum += result.loss * result.images
        self._correct += result.correct
        self._images += result.images
