"""The machine that answers what devices offload, beside the one that trains.

It shares with it the versions of the parameters and what is known of the devices; it is driven in a
thread of its own (``coordinator.service``), so that an answer never waits for a training step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from broker.envelopes import Envelope, down
from broker.serving_messages import Features, Prediction
from broker.telemetry import RefusalReason
from broker.topics import Address
from coordinator.answering import Question, Refusal, Waiting
from coordinator.identity.standing import IDENTITY
from coordinator.observer import Observer
from coordinator.registry import Device
from coordinator.settings import CoordinatorSettings
from coordinator.updates.rollouts import UPDATES
from coordinator.versions import Version, Versions
from tensors.codecs import parse_codec
from tensors.decoding import decode_torch
from tensors.errors import FormatError
from tensors.format import Limits, read_header
from tensors.networks import State

log = logging.getLogger("splitfleet.coordinator")

TRAINING, ANSWERING = "training", "answering"
STARVED_S = 0.05
"""What waits to be computed is, after so long, even if messages keep coming."""
_DTYPES = torch.float32, torch.bfloat16
"""No bytes decode to the latter."""


class Network(Protocol):
    """What answers; ``coordinator.responder.Responder`` is the real one."""

    def holds(self, version: int) -> bool:
        """Whether :meth:`answer` can be called for it."""
        ...

    def load(self, version: int, state: State) -> None:
        """Take the parameters of a version."""
        ...

    def answer(self, version: int, questions: Sequence[tuple[int, Tensor]]) -> list[np.ndarray]:
        """Cuts and features (N×…) → probabilities (N×K) of each, or last features."""
        ...


@dataclass(frozen=True, slots=True)
class Answers:
    """What images are answered with."""

    versions: Versions
    network: Network


def route(address: Address) -> Collection[str]:
    """Which machine of a coordinator a message is for."""
    if address.direction == "up":
        if address.kind == "features":
            return (ANSWERING,)
        if address.kind in ("enrol", "renew"):
            return (IDENTITY,)
        if address.kind in ("software", "fetch"):
            return (UPDATES,)
        if address.kind == "status":
            return (TRAINING, UPDATES)
    return (TRAINING,)


class AnsweringMachine:
    """Features of ``run`` in, predictions out; see ``broker.drive.Machine``.

    ``shapes[c-1]`` is the shape of one image's features at cut ``c``; ``find`` gives the device of
    a name, None for one that is not known.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        run: str,
        answers: Answers,
        shapes: Sequence[tuple[int, ...]],
        *,
        find: Callable[[str], Device | None],
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._run = run
        self._versions = answers.versions
        self._network = answers.network
        self._shapes = shapes
        self._batch_size = settings.batch_size
        # Probabilities are small; last features have to be coded as features are.
        self._codec = parse_codec("fp32" if settings.labels == "server" else settings.codec)
        self._find = find
        self._observer = observer
        self._clock = clock
        self.waiting = Waiting(
            batch_images=settings.answer_batch,
            queue_images=settings.answer_queue,
            wait_s=settings.batch_wait_s,
            clock=clock,
        )

    # -- events -----------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Never by itself: it ends with the training machine."""
        return False

    @property
    def has_work(self) -> bool:
        """Whether there is something to compute, or parameters to get ready."""
        return self.waiting.ready or not self._network.holds(self._versions.serving.number)

    @property
    def next_tick(self) -> float | None:
        """When those that wait have waited for company long enough."""
        return self.waiting.due

    def connected(self) -> list[Envelope]:
        """Nothing."""
        return []

    def disconnected(self) -> list[Envelope]:
        """Nothing: the connection may be back before the deadlines."""
        return []

    def receive(self, envelope: Envelope) -> list[Envelope]:
        """Let a question wait, or refuse it at once."""
        device, message = envelope.address.device, envelope.message
        if device is None or not isinstance(message, Features):
            self._observer.message_dropped("unexpected_topic")
            return []
        now = self._clock()
        checked = self._check(device, message, now)
        refused = [checked] if isinstance(checked, Refusal) else self.waiting.admit(checked)
        self._observer.answers_waiting(self.waiting.images)
        out = [self._refuse(refusal) for refusal in refused]
        due = self.waiting.due
        if due is not None and now > due + STARVED_S:
            out += self.work()
        return out

    def tick(self) -> list[Envelope]:
        """Waited long enough."""
        return self.work()

    def prepare(self) -> list[Envelope]:
        """Another version serves: get its parameters ready before somebody asks."""
        serving = self._versions.serving
        if not self._network.holds(serving.number):
            self._network.load(serving.number, serving.state)
        return []

    def work(self) -> list[Envelope]:
        """Answer one batch."""
        if not self.waiting.ready:
            return self.prepare()
        batch, refused = self.waiting.take()
        out = [self._refuse(refusal) for refusal in refused]
        if batch:
            out += self._answer(batch)
        self._observer.answers_waiting(self.waiting.images)
        return out

    # -- a question -------------------------------------------------------------------------------

    def _check(self, name: str, message: Features, now: float) -> Question | Refusal:
        """A question that can wait for its turn; its tensor is not opened yet."""
        device = self._find(name)
        cut = 0 if device is None or device.cut is None else device.cut
        images = 0
        reason: RefusalReason | None = None
        if device is None or device.hello is None:
            reason = "unknown_device"
        elif not cut:
            reason = "untrained"
        elif message.run != self._run or not self._versions.answers(message.version):
            reason = "version"
        else:
            images, reason = self._images(cut, message)
        question = Question(
            name,
            message.request,
            message.version,
            cut,
            images,
            message.tensor,
            now,
            now + message.deadline_ms / 1000,
        )
        return question if reason is None else Refusal(question, reason)

    def _images(self, cut: int, message: Features) -> tuple[int, RefusalReason | None]:
        shape = self._shapes[cut - 1]
        limits = Limits(max_elements=self._batch_size * math.prod(shape))
        try:
            header = read_header(message.tensor, limits=limits)
        except FormatError:
            return 0, "bad_tensor"
        if len(header.shape) != len(shape) + 1 or header.shape[1:] != shape or not header.shape[0]:
            return 0, "wrong_shape"
        return header.shape[0], None

    # -- a batch ----------------------------------------------------------------------------------

    def _answer(self, batch: Sequence[Question]) -> list[Envelope]:
        version = self._versions.find(batch[0].version)
        if version is None:
            return [self._refuse(Refusal(question, "version")) for question in batch]
        if not version.trained:
            return [self._refuse(Refusal(question, "untrained")) for question in batch]
        out: list[Envelope] = []
        opened: list[tuple[Question, Tensor]] = []
        for question in batch:
            features = self._open(question)
            if isinstance(features, Tensor):
                opened.append((question, features))
            else:
                out.append(self._refuse(Refusal(question, features)))
        return out + (self._compute(version, opened) if opened else [])

    def _open(self, question: Question) -> Tensor | RefusalReason:
        """Its features, finite and of the right shape and type, or why not."""
        try:
            features = decode_torch(question.tensor)
        except FormatError:
            return "bad_tensor"
        if features.dtype not in _DTYPES:
            return "wrong_shape"
        finite = math.isfinite(features.sum(dtype=torch.float32).item())
        return features if finite else "not_finite"

    def _compute(
        self, version: Version, opened: Sequence[tuple[Question, Tensor]]
    ) -> list[Envelope]:
        if not self._network.holds(version.number):
            self._network.load(version.number, version.state)
        started = self._clock()
        answers = self._together(version, opened)
        seconds = self._clock() - started
        images = sum(question.images for question, _ in opened)
        self.waiting.pace.measured(images, seconds)
        self._observer.answers_computed(len(opened), images, seconds)
        out = []
        for (question, _), answer in zip(opened, answers, strict=True):
            if answer is None:
                out.append(self._refuse(Refusal(question, "overloaded")))
            elif not np.isfinite(answer).all():
                out.append(self._refuse(Refusal(question, "not_finite")))
            else:
                out.append(self._say(question, answer, started, seconds))
        return out

    def _together(
        self, version: Version, opened: Sequence[tuple[Question, Tensor]]
    ) -> list[np.ndarray | None]:
        """One forward pass; if it fails each on its own, None for what fails even so."""
        questions = [(question.cut, features) for question, features in opened]
        try:
            return [*self._network.answer(version.number, questions)]
        except RuntimeError as exc:  # torch has no memory left, say
            log.warning("%d questions cannot be answered together: %s", len(questions), exc)
        answers: list[np.ndarray | None] = []
        for question in questions:
            try:
                answers += self._network.answer(version.number, [question])
            except RuntimeError as exc:
                log.error("a question cannot be answered: %s", exc)  # noqa: TRY400
                answers.append(None)
        return answers

    # -- what is said -----------------------------------------------------------------------------

    def _say(
        self, question: Question, answer: np.ndarray, started: float, seconds: float
    ) -> Envelope:
        waited = max(0.0, started - question.arrived)
        self._observer.features_answered(question.cut, question.images, None)
        self._observer.answer_waited(waited)
        prediction = Prediction(
            request=question.request,
            version=question.version,
            tensor=self._codec.encode(answer),
            queue_ms=1000 * waited,
            forward_ms=max(0.0, 1000 * seconds),
        )
        return down(question.device, prediction)

    def _refuse(self, refusal: Refusal) -> Envelope:
        question = refusal.question
        self._observer.features_answered(question.cut, 0, refusal.reason)
        prediction = Prediction(
            request=question.request, version=question.version, refused=refusal.reason
        )
        return down(question.device, prediction)
