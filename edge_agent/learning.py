"""What a device learns with and from, as its state machine sees it: no torch, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from broker.messages import Assignment, Measurement
from edge_agent.answers import Predictor
from edge_agent.figures import Outcome
from edge_agent.programs import Programs
from edge_agent.snapshots import Snapshot
from tensors.codecs import Encode
from tensors.format import Encoded


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

    def calibrate(self, counts: np.ndarray) -> None:
        """Account for how many images (K,) of each class this device has."""
        ...

    def set_learning_rate(self, rate: float) -> None: ...

    def set_feedback_weight(self, weight: float) -> None: ...

    def forward(self, batch: int, images: Any, labels: Any) -> Any:
        """Features at the cut, to encode."""
        ...

    def backward(self, batch: int, gradient: Any | None, teacher: Any | None = None) -> Outcome: ...

    def classify(self, batch: int, features: Any, labels: Any) -> Any:
        """A step of the classifier on a batch's last features; their gradient, to encode."""
        ...

    @property
    def encode(self) -> Encode:
        """How features are encoded."""
        ...

    def decode(self, data: Encoded, keep: np.ndarray | None) -> Any:
        """An encoded tensor as :meth:`backward` takes it; ``keep`` if it is masked."""
        ...

    def discard(self, batch: int) -> None:
        """Forget a batch without learning from it."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """What was learnt: parameters and buffers as they are now; empty if nothing ever is."""
        ...

    def predictor(self) -> Predictor:
        """Answers with the parameters of the last :meth:`load`."""
        ...


class Learners(Protocol):
    """Makes what a device learns with."""

    @property
    def programs(self) -> Programs | None:
        """What learners are built from; None if this device has the network as code."""
        ...

    def build(self, assignment: Assignment) -> Learner:
        """The learner for an assignment with a cut. Raises :class:`AssignmentError`."""
        ...

    def measure(self, assignment: Assignment) -> Measurement:
        """Time the device, for cut ``auto``. Raises :class:`AssignmentError`."""
        ...


class Stream(Protocol):
    """Training batches by position: a pure function of seed, device and position."""

    def batch(self, position: int) -> tuple[Any, Any]:
        """Images and labels, as the learner's :meth:`Learner.forward` takes them."""
        ...

    def keys(self, position: int) -> Sequence[bytes]:
        """By what its images are known: see ``tensors.batches.image_key``."""
        ...


class Data(Protocol):
    """A device's own images."""

    def stream(self, assignment: Assignment, device: str) -> Stream:
        """Its training batches."""
        ...

    def label_counts(self, classes: int) -> np.ndarray:
        """How many of its training images are of each class."""
        ...

    def test_batches(self, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Its test images and their labels, at most so many at a time."""
        ...
