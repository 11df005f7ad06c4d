"""Answering images: by the exit when it is sure, by the coordinator when it is not. Pure.

Requests wait in a bounded queue, newest matter most; several are computed together. What an exit is
not sure of goes up as features, and whatever comes back, or does not, every image is answered once
and counted once. No I/O, no thread, no torch: the caller gives the clock, sends what
:meth:`Answers.work` returns, hands in predictions and collects what is done with
:meth:`Answers.take`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from broker.serving_messages import Features, Prediction
from edge_agent.answer_counts import REFUSED, Counts
from edge_agent.errors import AgentError, InputError, NotReady, Overloaded, Unanswered
from edge_agent.exit_policy import ExitPolicy, Policy
from edge_agent.offloads import Asked, Classify, Offloads
from edge_agent.privacy import Release
from edge_agent.tickets import By, Ticket, Waiting, wrong_shape
from tensors.batches import image_key
from tensors.codecs import Codec
from tensors.errors import TensorsError
from tensors.exit_rules import confidence

log = logging.getLogger("splitfleet.agent")


class Predictor(Protocol):
    """The device's half and its exit, in evaluation mode."""

    def predict(self, images: np.ndarray) -> tuple[Any, np.ndarray]:
        """Images (float32, N×C×H×W) → features at the cut and the exit's probabilities (N×K).

        The features (N×…) are an array or tensor that a boolean array can index.
        """
        ...

    def classify(self, features: np.ndarray) -> np.ndarray:
        """The whole network's probabilities (N×K) for last features (float32, N×…).

        Asked only where the device keeps the classifier. Raises ``RuntimeError`` or ``ValueError``
        for such as it does not take.
        """
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request of N images, of K classes.

    ``labels`` int64 (N,); ``probabilities`` float32 (N, K). ``by`` says for each image who gave
    them: the exit because it was sure, the server, or the exit as a fallback, for which ``reasons``
    has the reason (None for the others): ``timeout``, ``refused:REASON``, ``offline``, ``budget``,
    ``latency``, ``busy`` (too many questions are out) or ``superseded`` (by another run).
    ``confidence`` float64 (N,) is the exit's, in [0, 1]. ``version`` of ``run`` are the parameters;
    ``seconds`` are those by stage: ``queue``, ``exit``, ``encode``, ``round_trip``, of which at the
    server ``server_queue`` and ``server_forward``, and ``total``.
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    by: tuple[By, ...]
    confidence: NDArray[np.float64]
    reasons: tuple[str | None, ...]
    version: int
    run: str
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much waits and is under way at once, in images and messages."""

    waiting_images: int = 256
    """Beyond it the oldest requests that wait give way."""
    batch_images: int = 32
    """Computed together; a request of more is computed alone."""
    message_images: int = 32
    """Offloaded in one message."""
    messages: int = 32
    """Out at once; beyond it the exit answers."""


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    run: str
    version: int
    predictor: Predictor
    codec: Codec
    shape: tuple[int, ...] | None
    message_images: int
    release: Release | None
    classify: Classify | None


class Answers:
    """Answers requests with one version of the parameters at a time.

    Messages are numbered from ``first_message`` on, so that two that answer for one device, or its
    lives before and after a restart, do not take each other's predictions for their own.
    ``cpu_clock`` measures processor time in the thread that calls :meth:`work`.
    """

    def __init__(
        self,
        policy: ExitPolicy,
        *,
        clock: Callable[[], float],
        bounds: Bounds | None = None,
        first_message: int = 0,
        cpu_clock: Callable[[], float] | None = None,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._cpu_clock = cpu_clock or clock
        self._bounds = bounds or Bounds()
        self._model: _Model | None = None
        self._online = True
        self._next_ticket = 0
        self._waiting = Waiting()
        self._open: dict[int, Ticket] = {}
        self._done: list[tuple[int, Answer | AgentError]] = []
        self.counts = Counts()
        self._offloads = Offloads(
            policy,
            self.counts,
            self._settle,
            clock=clock,
            first=first_message,
            most=self._bounds.messages,
        )

    # -- what to answer with ----------------------------------------------------------------------

    def use(
        self,
        run: str,
        version: int,
        predictor: Predictor,
        policy: Policy,
        codec: Codec,
        *,
        shape: tuple[int, ...] | None = None,
        message_images: int | None = None,
        release: Release | None = None,
        classifies: bool = False,
    ) -> None:
        """Answer with this version from now on; images have this shape (C, H, W), if it is given.

        The coordinator takes ``message_images`` at once, if that is less than this device sends;
        features leave as ``release`` lets them. With ``classifies`` it sends last features back,
        and the predictor's classifier answers. What is offloaded with another version of the same
        run may still be answered.
        """
        most = min(self._bounds.message_images, message_images or self._bounds.message_images)
        before = self._model
        classify = predictor.classify if classifies else None
        self._model = _Model(run, version, predictor, codec, shape, most, release, classify)
        self._policy.use(policy, run=run, version=version)
        if before is not None and before.run != run:
            self._offloads.give_up("superseded")
        if shape is not None:
            for ticket in self._waiting.of_other_shape(shape):
                self.counts.failed += len(ticket.images)
                self._drop(ticket, wrong_shape(ticket.images.shape, shape))

    @property
    def version(self) -> tuple[str, int] | None:
        """Run and version that answer; None as long as there is none."""
        return None if self._model is None else (self._model.run, self._model.version)

    def connected(self) -> None:
        """The coordinator can be asked (again)."""
        self._online = True

    def disconnected(self) -> None:
        """The coordinator cannot be asked: what is out is lost, and nothing more is asked."""
        self._online = False
        self._offloads.give_up("offline")

    # -- requests ---------------------------------------------------------------------------------

    def ask(
        self,
        images: NDArray[Any],
        labels: NDArray[Any] | None = None,
        deadline_s: float | None = None,
        *,
        asked: float | None = None,
    ) -> int:
        """Request an answer for images (float32, N×C×H×W); its ticket, to know the answer by.

        With ``labels`` (N,) accuracy is counted. An answer is there in ``deadline_s`` seconds, the
        exit's own if it must be; what has not been looked at by then fails. ``asked`` is when that
        was, on the clock, if it was earlier.

        Raises:
            InputError: the images, the labels or the deadline are not what they should be.
            NotReady: there are no parameters to answer with.
        """
        if self._model is None:
            raise NotReady("this device has no trained parameters yet: wait for its first round")
        shape, most = self._model.shape, self._bounds.waiting_images
        if images.ndim != 4 or (shape is not None and images.shape[1:] != shape):
            raise wrong_shape(images.shape, shape)
        if not 0 < len(images) <= most:
            raise InputError(f"{len(images)} images at once: 1 to {most} are taken")
        if labels is not None and labels.shape != images.shape[:1]:
            raise InputError(f"{labels.shape} labels for {len(images)} images: give one for each")
        if labels is not None and labels.dtype.kind not in "iub":
            raise InputError(f"labels of {labels.dtype} are not taken: give the numbers of classes")
        if deadline_s is not None and not deadline_s > 0:
            raise InputError(f"a deadline of {deadline_s} s: must be above 0")
        now = self._clock() if asked is None else asked
        number, self._next_ticket = self._next_ticket, self._next_ticket + 1
        deadline = None if deadline_s is None else now + deadline_s
        self._waiting.add(Ticket(number, images, labels, now, deadline))
        self.counts.requests += 1
        self.counts.images += len(images)
        while self._waiting.images > most:
            self._overload(self._waiting.oldest, "more is asked than this device can answer")
        return number

    def cancel(self, number: int) -> None:
        """Nobody wants the answer any more: there will be none. Unknown tickets are let be."""
        waiting = self._waiting.find(number)
        if waiting is not None:
            self.counts.cancelled += len(waiting.images)
            self._drop(waiting, None)
            return
        ticket = self._open.pop(number, None)
        if ticket is None:
            self._done = [done for done in self._done if done[0] != number]
            return
        self.counts.cancelled += ticket.open
        self.counts.offloads_cancelled += ticket.open
        self._offloads.withdraw(ticket)

    def take(self) -> list[tuple[int, Answer | AgentError]]:
        """Tickets that are done since the last call, each with its answer or why there is none."""
        done, self._done = self._done, []
        return done

    @property
    def waiting(self) -> int:
        """Images that have not been looked at."""
        return self._waiting.images

    @property
    def open(self) -> int:
        """Images that the server was asked about and that are not answered yet."""
        return sum(ticket.open for ticket in self._open.values())

    # -- work -------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether :meth:`work` would do something now."""
        return bool(self._waiting)

    def work(self) -> list[Features]:
        """Look at the next requests; the features of what the exit is not sure of."""
        model, began, cpu = self._model, self._clock(), self._cpu_clock()
        assert model is not None
        tickets = self._waiting.batch(self._bounds.batch_images)
        images = np.concatenate([ticket.images for ticket in tickets])
        try:
            features, found = model.predictor.predict(images)
        except (TensorsError, RuntimeError, ValueError, MemoryError) as exc:
            log.warning("cannot answer %d images: %s", len(images), exc)
            self.counts.failed += len(images)
            failure = Unanswered(f"the network cannot compute with these images: {exc}")
            self._done += [(ticket.number, failure) for ticket in tickets]
            return []
        finite = np.isfinite(found).all(axis=1)
        # Who knows nothing finds every class equally likely.
        probabilities = np.where(finite[:, None], found, 1 / found.shape[1])
        sure = confidence(probabilities, self._policy.policy.rule)
        predicted = self._clock()
        seconds = self.counts.seconds
        seconds["exit"].observe(predicted - began)
        start = 0
        for ticket in tickets:
            own = slice(start, start + len(ticket.images))
            start = own.stop
            self.counts.labelled += 0 if ticket.truth is None else len(ticket.images)
            self.counts.exit_correct += ticket.seen(
                model.run, model.version, probabilities[own], sure[own]
            )
            ticket.seconds |= {"queue": began - ticket.asked, "exit": predicted - began}
            seconds["queue"].observe(ticket.seconds["queue"])
            self._open[ticket.number] = ticket
        messages = self._decide(tickets, images, features, sure, finite)
        self.counts.cpu_s += self._cpu_clock() - cpu
        return messages

    def _decide(
        self,
        tickets: list[Ticket],
        images: NDArray[Any],
        features: Any,
        sure: NDArray[np.float64],
        finite: NDArray[np.bool_],
    ) -> list[Features]:
        assert self._model is not None
        now = self._clock()
        rows = [(ticket, row) for ticket in tickets for row in range(ticket.open)]
        elapsed = np.array([now - ticket.asked for ticket, _ in rows])
        decision = self._policy.decide(np.where(finite, sure, np.nan), elapsed)
        asking: list[Asked] = []
        for index, (ticket, row) in enumerate(rows):
            exits, audits = bool(decision.exits[index]), bool(decision.audits[index])
            due = self._due(ticket, now)
            image = Asked(ticket, row, index, due, not exits, audits, ticket.label(row))
            if exits:
                self.counts.exits += 1
                self._settle(image, "exit", None)
                if audits and self._online:
                    asking.append(image)
            elif not finite[index]:
                self._offloads.hold(image, REFUSED + "not_finite")
            elif not self._online:
                self._offloads.hold(image, "offline")
            elif decision.late[index]:
                self._offloads.hold(image, "latency")
            elif due <= now:
                self._offloads.hold(image, "timeout")
            else:
                asking.append(image)
        step = self._model.message_images
        parts = [asking[first : first + step] for first in range(0, len(asking), step)]
        messages = [self._offload(part, images, features) for part in parts]
        return [message for message in messages if message is not None]

    def _offload(self, asking: list[Asked], images: NDArray[Any], features: Any) -> Features | None:
        model = self._model
        assert model is not None

        def admit(asked: list[Asked]) -> NDArray[np.bool_]:
            if model.release is None:
                return np.ones(len(asked), bool)
            return model.release.admit([image_key(images[image.index]) for image in asked])

        def encode(asked: list[Asked]) -> Any:
            found = features[np.isin(np.arange(len(images)), [image.index for image in asked])]
            return model.codec.encode(found if model.release is None else model.release.of(found))

        return self._offloads.ask(
            model.run, model.version, asking, admit, encode, classify=model.classify
        )

    def _due(self, ticket: Ticket, now: float) -> float:
        """When an image that is offloaded now gives up waiting."""
        due = now + self._policy.policy.timeout_s
        if ticket.deadline is not None:
            due = min(due, ticket.deadline)
        if self._policy.latency_s is not None:
            due = min(due, ticket.asked + self._policy.latency_s)
        return due

    def answer(self, prediction: Prediction) -> None:
        """Enter the coordinator's answer; one that comes too late changes nothing."""
        self._offloads.answer(prediction)

    # -- time -------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Give up on what has waited too long: for its turn, or for the coordinator."""
        now = self._clock()
        for ticket in self._waiting.overdue(now):
            self._overload(ticket, "its time was over before this device could look at it")
        self._offloads.tick()

    @property
    def deadline(self) -> float | None:
        """When :meth:`tick` has something to do, on the clock; None if nothing waits."""
        times = self._waiting.deadline, self._offloads.deadline
        return min((time for time in times if time is not None), default=None)

    # -- done -------------------------------------------------------------------------------------

    def _overload(self, ticket: Ticket, why: str) -> None:
        self.counts.overloaded += len(ticket.images)
        self._drop(ticket, Overloaded(f"{why}; ask less at a time, or later"))

    def _drop(self, ticket: Ticket, error: AgentError | None) -> None:
        self._waiting.remove(ticket)
        if error is not None:
            self._done.append((ticket.number, error))

    def _settle(self, image: Asked, by: By, reason: str | None) -> None:
        """One image has its answer; with its last a request is done."""
        ticket = image.ticket
        ticket.by[image.row], ticket.reasons[image.row] = by, reason
        ticket.open -= 1
        self.counts.correct += ticket.is_right(image.row)
        if ticket.open:
            return
        del self._open[ticket.number]
        ticket.seconds["total"] = self._clock() - ticket.asked
        self.counts.seconds["total"].observe(ticket.seconds["total"])
        answer = Answer(
            labels=ticket.probabilities.argmax(1),
            probabilities=ticket.probabilities,
            by=tuple(ticket.by),
            confidence=ticket.confidence,
            reasons=tuple(ticket.reasons),
            version=ticket.version,
            run=ticket.run,
            seconds=ticket.seconds,
        )
        self._done.append((ticket.number, answer))
