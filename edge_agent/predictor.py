"""Answering images: by the exit when it is sure, by the coordinator when it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from broker.messages import Features, Inference, Prediction
from tensors.codecs import Codec
from tensors.decoding import decode
from tensors.errors import CodecError, TensorsError
from tensors.exit_rules import ExitRule, confidence, exits


class Predictor(Protocol):
    """The device's half and its exit, in evaluation mode."""

    def predict(self, images: np.ndarray) -> tuple[Any, np.ndarray]:
        """Images (float32, N×C×H×W) → features at the cut and the exit's probabilities (N×K).

        The features (N×…) are an array or tensor that a boolean array can index.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When a device answers by itself, and how long it waits for the coordinator otherwise."""

    rule: ExitRule
    threshold: float
    timeout_s: float


@dataclass(slots=True)
class _Offload:
    fallback: np.ndarray
    labels: np.ndarray
    asked: float


@dataclass(slots=True)
class _Tally:
    images: int = 0
    exits: int = 0
    answered: int = 0
    refused: int = 0
    timeouts: int = 0
    replies: int = 0
    correct: int = 0
    exit_correct: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    exit_s: float = 0.0
    offload_s: float = 0.0
    round_trips: int = 0


class InferenceRun:
    """Answers a labelled set of images batch by batch and keeps the books.

    An image is counted once: as an exit, or as an offload that was answered, refused, or timed out
    (then the exit's own answer counts). Pure: the caller sends what :meth:`work` returns and hands
    in predictions.
    """

    def __init__(
        self,
        predictor: Predictor,
        codec: Codec,
        batches: list[tuple[np.ndarray, np.ndarray]],
        policy: Policy,
        *,
        version: int,
        clock: Callable[[], float],
        pending: int = 4,
    ) -> None:
        self._predictor = predictor
        self._codec = codec
        self._batches = batches
        self._policy = policy
        self._version = version
        self._clock = clock
        self._pending = pending
        self._next = 0
        self._offloads: dict[int, _Offload] = {}
        self._tally = _Tally()

    @property
    def has_work(self) -> bool:
        """Whether :meth:`work` would do something now."""
        return self._next < len(self._batches) and len(self._offloads) < self._pending

    @property
    def done(self) -> bool:
        """Whether every image has its answer."""
        return self._next == len(self._batches) and not self._offloads

    @property
    def deadline(self) -> float | None:
        """When the oldest offload gives up waiting."""
        asked = [offload.asked for offload in self._offloads.values()]
        return min(asked) + self._policy.timeout_s if asked else None

    def work(self) -> Features | None:
        """Answer the next batch; the features of the unsure images, if there are any."""
        images, labels = self._batches[self._next]
        started = self._clock()
        features, probabilities = self._predictor.predict(images)
        unsure = ~exits(confidence(probabilities, self._policy.rule), self._policy.threshold)
        self._tally.exit_s += self._clock() - started
        answers = probabilities.argmax(1)
        self._tally.images += len(labels)
        self._tally.exits += int((~unsure).sum())
        self._tally.exit_correct += int((answers == labels).sum())
        self._tally.correct += int((answers == labels)[~unsure].sum())
        request, self._next = self._next, self._next + 1
        if not unsure.any():
            return None
        offload = _Offload(answers[unsure], labels[unsure], self._clock())
        try:
            encoded = self._codec.encode(features[unsure])
        except CodecError:  # not finite: there is nothing to ask with
            self._refuse(offload)
            return None
        self._offloads[request] = offload
        self._tally.bytes_up += len(encoded)
        return Features(
            request=request,
            version=self._version,
            deadline_ms=max(1, int(self._policy.timeout_s * 1000)),
            tensor=encoded,
        )

    def answer(self, prediction: Prediction) -> None:
        """Enter the coordinator's answer; one that comes too late changes nothing."""
        offload = self._offloads.pop(prediction.request, None)
        if offload is None:
            return
        self._tally.replies += 1
        self._tally.offload_s += self._clock() - offload.asked
        self._tally.round_trips += 1
        probabilities = None
        if prediction.tensor is not None and prediction.version == self._version:
            self._tally.bytes_down += len(prediction.tensor)
            try:
                probabilities = decode(prediction.tensor)
            except TensorsError:
                probabilities = None
        if probabilities is None or not _is_answer(probabilities, len(offload.labels)):
            self._refuse(offload)
            return
        self._tally.answered += len(offload.labels)
        self._tally.correct += int((probabilities.argmax(1) == offload.labels).sum())

    def tick(self) -> None:
        """Give up on offloads whose time is over."""
        now = self._clock()
        for request, offload in list(self._offloads.items()):
            if now >= offload.asked + self._policy.timeout_s:  # as in `deadline`, to the last bit
                del self._offloads[request]
                self._fall_back(offload)
                self._tally.timeouts += len(offload.labels)

    def result(self) -> Inference:
        """The books; times are means, in milliseconds per image and per reply."""
        tally = self._tally
        offloads = tally.answered + tally.refused + tally.timeouts
        return Inference(
            version=self._version,
            threshold=self._policy.threshold,
            images=tally.images,
            exits=tally.exits,
            offloads=offloads,
            answered=tally.answered,
            refused=tally.refused,
            timeouts=tally.timeouts,
            correct=tally.correct,
            exit_correct=tally.exit_correct,
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
            exit_ms=1000 * tally.exit_s / max(1, tally.images),
            offload_ms=1000 * tally.offload_s / max(1, tally.replies),
        )

    def _refuse(self, offload: _Offload) -> None:
        self._fall_back(offload)
        self._tally.refused += len(offload.labels)

    def _fall_back(self, offload: _Offload) -> None:
        self._tally.correct += int((offload.fallback == offload.labels).sum())


def _is_answer(probabilities: np.ndarray, images: int) -> bool:
    return (
        probabilities.ndim == 2
        and len(probabilities) == images
        and probabilities.shape[1] > 0
        and bool(np.isfinite(probabilities).all())
    )
