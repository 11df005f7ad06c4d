"""Answering a labelled set of images as a service would, to measure it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from broker.serving_messages import Features, Inference, Prediction
from edge_agent.answer_counts import Counts
from edge_agent.answers import Answers, Bounds, Predictor
from edge_agent.exit_policy import ExitPolicy, Limits, Policy
from edge_agent.privacy import Release
from tensors.codecs import Codec


class InferenceRun:
    """Answers a labelled set of images batch by batch and keeps the books.

    An image is counted once: as an exit, or as an offload that was answered, refused, or timed out
    (then the exit's own answer counts). Pure: the caller sends what :meth:`work` returns and hands
    in predictions. At most ``pending`` batches are under way at once.
    """

    def __init__(
        self,
        predictor: Predictor,
        codec: Codec,
        batches: list[tuple[np.ndarray, np.ndarray]],
        policy: Policy,
        *,
        run: str,
        version: int,
        clock: Callable[[], float],
        cpu_clock: Callable[[], float] | None = None,
        pending: int = 4,
        release: Release | None = None,
        classifies: bool = False,
    ) -> None:
        self._batches = batches
        self._threshold = policy.threshold
        self._version = version
        self._pending = pending
        self._next = 0
        self._open: set[int] = set()
        most = max((len(labels) for _, labels in batches), default=1)
        self._answers = Answers(
            ExitPolicy(Limits(), seed=0, clock=clock),
            clock=clock,
            bounds=Bounds(
                waiting_images=most, batch_images=most, message_images=most, messages=pending
            ),
            cpu_clock=cpu_clock,
        )
        self._answers.use(
            run, version, predictor, policy, codec, release=release, classifies=classifies
        )

    @property
    def has_work(self) -> bool:
        """Whether :meth:`work` would do something now."""
        return self._next < len(self._batches) and len(self._open) < self._pending

    @property
    def done(self) -> bool:
        """Whether every image has its answer."""
        return self._next == len(self._batches) and not self._open

    @property
    def deadline(self) -> float | None:
        """When the oldest offload gives up waiting."""
        return self._answers.deadline

    def work(self) -> Features | None:
        """Answer the next batch; the features of the unsure images, if there are any."""
        images, labels = self._batches[self._next]
        self._next += 1
        self._open.add(self._answers.ask(images, labels))
        messages = self._answers.work()
        self._collect()
        assert len(messages) <= 1
        return messages[0] if messages else None

    def answer(self, prediction: Prediction) -> None:
        """Enter the coordinator's answer; one that comes too late changes nothing."""
        self._answers.answer(prediction)
        self._collect()

    def tick(self) -> None:
        """Give up on offloads whose time is over."""
        self._answers.tick()
        self._collect()

    @property
    def counts(self) -> Counts:
        """The books as they stand."""
        return self._answers.counts

    def result(self) -> Inference:
        """The books; times are means, in milliseconds per image and per reply."""
        counts = self._answers.counts
        seen = counts.images - self._answers.waiting
        return Inference(
            version=self._version,
            threshold=self._threshold,
            images=seen,
            exits=counts.exits,
            offloads=counts.answered + counts.fallbacks,
            answered=counts.answered,
            refused=counts.refused,
            timeouts=counts.fallbacks - counts.refused,
            correct=counts.correct,
            exit_correct=counts.exit_correct,
            bytes_up=counts.bytes_up,
            bytes_down=counts.bytes_down,
            exit_ms=1000 * counts.seconds["exit"].total / max(1, seen),
            offload_ms=1000 * counts.seconds["round_trip"].total / max(1, counts.replies),
        )

    def _collect(self) -> None:
        self._open -= {ticket for ticket, _ in self._answers.take()}
