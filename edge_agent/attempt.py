"""One try at one round on one device: batches out, gradients and receipts in, books kept."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from broker.envelopes import Envelope, up
from broker.messages import Assignment
from broker.training_messages import (
    Activations,
    FeatureGradients,
    Gradients,
    LastFeatures,
    Receipt,
    Report,
    Round,
)
from edge_agent.encoding import ActivationEncoder
from edge_agent.errors import TrainingError
from edge_agent.figures import Figures
from edge_agent.learning import Learner, Stream
from edge_agent.ledger import Ledger
from edge_agent.meters import Meters
from edge_agent.offline import Kept, OfflineLimits, OfflineQueue
from edge_agent.quota import quota_of, stream_position
from tensors.codecs import parse_codec
from tensors.decoding import nonzero
from tensors.errors import CodecError, FormatError
from tensors.format import Encoded, read_header

log = logging.getLogger("splitfleet.agent")


@dataclass(slots=True)
class _Pending:
    envelope: Envelope
    made: float
    due: float
    learnt: int
    """How many batches had been learnt from when it was sent."""
    labels: Any
    """Until the classifier has learnt from them."""
    answer: Envelope | None = None
    """The gradient of its last features."""

    @property
    def last(self) -> Envelope:
        """What was said last of it."""
        return self.answer or self.envelope


class Attempt:
    """A device's work in one attempt at a round, or in one leg of it.

    ``receipt`` is the coordinator's answer to the request to join: the batches there are to make,
    where to go on, and what became of those an earlier leg or an earlier life of this device sent.
    Raises ``MessageError`` if it is absurd.

    ``online`` says in each case whether the coordinator can be reached. Without feedback an attempt
    goes on when it cannot; what it makes then waits in a queue of these limits. ``meters`` count on
    from attempt to attempt.
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
        offline: OfflineLimits,
        meters: Meters,
    ) -> None:
        self.stamp = announced.stamp
        self.version = announced.version
        self.barrier = announced.barrier
        self._device = device
        self._assignment = assignment
        self._learner = learner
        self._stream = stream
        self._clock = clock
        self._encoder = encoder
        self._credits = receipt.credits
        self._quota = quota_of(assignment, receipt)
        self._first = min(receipt.next_batch, self._quota)
        self._until = clock() + announced.train_s if announced.train_s else math.inf
        self._ledger = Ledger(limit=self._quota, produced=self._first)
        self._ledger.settle(receipt)
        self._pending: dict[int, _Pending] = {}
        self._kept = OfflineQueue(offline, clock)
        self._works_offline = assignment.feedback == "none" and offline.batches > 0
        self._to_classify: dict[int, LastFeatures] = {}
        self._to_learn: deque[tuple[Gradients, _Pending]] = deque()
        self._figures = Figures(meters, clock)
        self._overdue: set[int] = set()
        learner.rewind()
        learner.set_learning_rate(announced.learning_rate)
        weight = announced.feedback_weight
        learner.set_feedback_weight(assignment.feedback_weight if weight is None else weight)

    @property
    def produced(self) -> int:
        """Batches of this attempt so far, those of an earlier leg or life included."""
        return self._ledger.produced

    @property
    def learnt(self) -> bool:
        """Whether any batch was learnt from."""
        return self._figures.learnt > 0

    @property
    def out(self) -> int:
        """Batches that were sent and are waited for."""
        return len(self._pending)

    @property
    def kept(self) -> int:
        """Batches that wait to be sent."""
        return len(self._kept)

    def meter(self, meters: Meters) -> None:
        """Enter how it is now."""
        meters.gauge("batches_in_flight", len(self._pending))
        meters.gauge("batches_kept", len(self._kept))
        meters.gauge("credits", self._credits)

    def can_produce(self, *, online: bool = True) -> bool:
        """Whether quota, time, window and credits allow another batch now, or one that was kept.

        An answer is learnt from before the next batch: to send that first would be a little faster,
        but another step of staleness cost the exits six points (docs/benchmarks.md).
        """
        if not online:
            return self._works_offline and not self._made_all
        allowed = self._credits
        if self._assignment.feedback == "gradient":
            allowed = min(allowed, self._assignment.window - len(self._to_learn))
        return len(self._pending) < allowed and (bool(self._kept) or not self._made_all)

    @property
    def can_classify(self) -> bool:
        """Whether last features wait for the classifier."""
        return bool(self._to_classify)

    @property
    def can_learn(self) -> bool:
        """Whether an answer waits to be learnt from."""
        return bool(self._to_learn)

    @property
    def complete(self) -> bool:
        """Whether every batch is made, out, answered and learnt from."""
        return self._made_all and not (self._pending or self._to_learn or self._kept)

    @property
    def deadline(self) -> float | None:
        """When the oldest answer is overdue, a kept batch expires, or the time is up."""
        times = [pending.due for pending in self._pending.values()]
        if self._kept.deadline is not None:
            times.append(self._kept.deadline)
        if self._clock() < self._until < math.inf:
            times.append(self._until)
        return min(times, default=None)

    def produce(self, *, online: bool = True) -> list[Envelope]:
        """Compute the next batch, or take one that was kept; the activations to send."""
        if online and self._kept:
            return self._send(self._kept.take())
        made = self._compute()
        if made is None:
            return []
        if online:
            return self._send(made)
        self._keep(made)
        return []

    def features(self, features: LastFeatures) -> None:
        """Enter the last features of a batch; what is not waited for any more is dropped."""
        if features.batch in self._pending:
            self._to_classify[features.batch] = features

    def classify(self) -> list[Envelope]:
        """Let the classifier learn from the features that have waited longest; their gradient.

        A batch's features are learnt from once, however often they come.
        """
        batch = next(iter(self._to_classify))
        features, pending = self._to_classify.pop(batch), self._pending.get(batch)
        if pending is None or pending.labels is None:
            return []
        assert self._assignment.classifier is not None
        labels, pending.labels = pending.labels, None
        try:
            last = self._learner.decode(features.tensor, None)
            gradient = self._learner.classify(batch, last, labels)
            codec = parse_codec(self._assignment.classifier.gradient_codec)
            tensor = self._learner.encode(codec, gradient, seed=batch)
        except (FormatError, TrainingError, CodecError) as exc:
            log.warning("the last features of batch %d are of no use: %s", batch, exc)
            del self._pending[batch]
            self._lose([batch], "not_finite")
            if self._assignment.feedback == "gradient":
                self._learn(batch, None)
            return []
        run, number, attempt = self.stamp
        message = FeatureGradients(
            run=run, round=number, attempt=attempt, batch=batch, tensor=tensor
        )
        pending.answer = up(self._device, message)
        pending.due = self._clock() + self._assignment.gradient_timeout_s
        return [pending.answer]

    def gradient(self, gradients: Gradients) -> None:
        """Enter a gradient; one that comes after its time-out is counted and dropped."""
        self._ledger.applied([gradients.batch])
        if self._assignment.feedback != "gradient":
            return
        pending = self._pending.pop(gradients.batch, None)
        if pending is None:
            if gradients.batch in self._overdue:
                self._overdue.remove(gradients.batch)
                self._figures.came_late()
            return
        self._figures.returned(pending.made)
        self._to_learn.append((gradients, pending))

    def learn(self) -> None:
        """Learn from the gradient that has waited longest."""
        gradients, pending = self._to_learn.popleft()
        sent = pending.envelope.message
        assert isinstance(sent, Activations)
        self._figures.learn(pending.learnt)
        started = self._clock()
        try:
            gradient = self._decode(gradients.tensor, sent)
            teacher = None
            if gradients.logits is not None and self._assignment.distill_weight:
                teacher = self._learner.decode(gradients.logits, None)
        except FormatError:
            gradient = teacher = None
        self._figures.took("decode", started)
        self._learn(gradients.batch, gradient, teacher)

    def receipt(self, receipt: Receipt) -> None:
        """Enter a receipt. A batch that was discarded is learnt from at the exit alone."""
        self._credits = receipt.credits
        named = self._ledger.settle(receipt)
        self._kept.drop(named)
        for batch in sorted(named & self._pending.keys()):
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
            self._figures.timed_out()
            if self._assignment.feedback == "gradient":
                self._overdue.add(batch)
                self._learn(batch, None)
        self._lose(self._kept.expire(), "expired_offline")

    def interrupted(self) -> None:
        """The coordinator cannot be reached: without feedback, what is out is kept to be sent."""
        if self._works_offline:
            for batch, pending in self._pending.items():
                self._keep(Kept(batch, pending.last, pending.made, pending.labels))
            self._pending.clear()

    def unanswered(self) -> list[Envelope]:
        """What to say again on a new connection; the time-outs start anew."""
        now = self._clock()
        for pending in self._pending.values():
            pending.due = now + self._assignment.gradient_timeout_s
        return [pending.last for pending in self._pending.values()]

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
            **self._figures.report(),
        )

    @property
    def _made_all(self) -> bool:
        if self.produced >= self._quota:
            return True
        return self.produced > self._first and self._clock() >= self._until

    def _compute(self) -> Kept | None:
        started = self._clock()
        batch = self._ledger.produce()
        run, number, attempt = self.stamp
        position = stream_position(number, batch, self._assignment.quota)
        images, labels = self._stream.batch(position)
        if not len(labels):
            self._lose([batch], "privacy")
            return None
        features = self._learner.forward(batch, images, labels)
        self._figures.took("forward", started)
        encoding = self._clock()
        try:
            encoded = self._encoder.encode(features, images=len(labels), seed=position)
        except CodecError:
            self._learner.discard(batch)
            self._lose([batch], "not_finite")
            return None
        self._figures.took("encode", encoding)
        self._figures.made(encoded, math.prod(features.shape))
        self._encoder.spent("forward", self._clock() - started)
        if self._assignment.feedback == "none":
            self._learn(batch, None)
        keeps = self._assignment.classifier is not None
        message = Activations(
            run=run,
            round=number,
            attempt=attempt,
            batch=batch,
            version=self.version,
            labels=[] if keeps else labels.tolist(),
            tensor=encoded.data,
        )
        return Kept(batch, up(self._device, message), self._clock(), labels if keeps else None)

    def _send(self, made: Kept) -> list[Envelope]:
        due = self._clock() + self._assignment.gradient_timeout_s
        self._pending[made.batch] = _Pending(
            made.envelope, made.made, due, self._figures.learnt, made.labels
        )
        return [made.envelope]

    def _keep(self, made: Kept) -> None:
        self._lose(self._kept.keep(made), "superseded")

    def _lose(self, batches: Collection[int], reason: str) -> None:
        self._ledger.discarded(batches, reason)
        self._figures.lost(len(batches), reason)

    def _decode(self, gradient: Encoded, sent: Activations) -> Any:
        keep = nonzero(sent.tensor) if read_header(gradient).masked else None
        return self._learner.decode(gradient, keep)

    def _learn(self, batch: int, gradient: Any | None, teacher: Any | None = None) -> None:
        started = self._clock()
        try:
            result = self._learner.backward(batch, gradient, teacher)
        except TrainingError:
            return
        self._encoder.spent("backward", self._clock() - started)
        self._figures.took("backward", started)
        self._figures.learnt_from(result)
